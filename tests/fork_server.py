"""The training that the fork server does before it starts processes: each of them would set up as much for itself."""

import contextlib
import gc
import io
import os
import tempfile
import threading
from pathlib import Path

import pytest  # noqa: F401
import torch
import wandb.cli.cli
import wandb.sdk.launch  # noqa: F401 - a second, when a run starts
from helpers import train_here
from PIL import Image
from tqdm import tqdm


def train_once() -> None:
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name in ("a", "b"):
            Path(folder, "images", name).mkdir(parents=True)
            Image.new("RGB", (28, 28)).save(Path(folder, "images", name, "1.png"))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        flags = ("--data_path", f"{folder}/images", "--output_dir", f"{folder}/run")
        code = train_here(*flags, "--batch_size", "1", "--max_steps", "2")
    assert code == 0, printed.getvalue()


os.fsync = lambda descriptor: None  # as in conftest.py
torch.set_num_threads(1)  # the others would not come along
tqdm.set_lock(threading.RLock())  # its own is one for all processes, and one that is killed may hold it for ever
if not torch.cuda.is_available():  # for which torch keeps threads
    tqdm.monitor_interval = 0  # a thread, too
    train_once()
    assert threading.active_count() == 1, threading.enumerate()
gc.freeze()  # what each process shares with this one is neither looked through nor copied
