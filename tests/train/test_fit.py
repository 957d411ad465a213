"""Training from Python is training from the command line."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import TINY, assert_same_state, in_fresh_accelerate, train_here

from jit_accel.base.errors import UserError
from jit_accel.config.command_line import parse_args
from jit_accel.config.settings import Config
from jit_accel.train import fit


def test_fit_trains_as_the_command_line_does(images, tmp_path):
    flags = ("--data_path", str(images), "--output_dir")
    assert train_here(*flags, str(tmp_path / "a")) == 0
    with in_fresh_accelerate():
        run = fit(parse_args([*TINY, *flags, str(tmp_path / "b")]))
    assert run == tmp_path / "b"
    assert (run / "pipeline" / "model_index.json").exists()
    assert_same_state(tmp_path / "a", run)


def test_fit_raises_what_the_command_line_prints(tmp_path):
    with in_fresh_accelerate(), pytest.raises(UserError, match=rf"^data_path {tmp_path}/gone: no such file"):
        fit(Config.of(data_path=f"{tmp_path}/gone", output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_trainings_of_one_process_may_differ_in_precision_and_run_in_a_thread(images, tmp_path):
    with in_fresh_accelerate(), ThreadPoolExecutor(1) as thread:
        for precision in ("no", "bf16"):
            flags = ("--data_path", str(images), "--output_dir", str(tmp_path / precision), "--max_steps", "1")
            config = parse_args([*TINY, *flags, "--warmup_steps", "1", "--mixed_precision", precision])
            assert (thread.submit(fit, config).result() / "pipeline" / "model_index.json").exists()
