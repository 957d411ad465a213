"""What the training tests share: a small real data set, and processes that run the trainer."""

import contextlib
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors import safe_open
from safetensors.torch import load_file

from jit_accel.config.presets import PRESETS, Preset
from jit_accel.monitor.log import read_metrics

OLD_FOLDERS = Path(__file__).parent / "fixtures" / "fc94876"  # made by its make.py

# For laws whose body takes the device: what is wrong there is seen without a GPU, too.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NEEDS_TWO = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
DEVICES_OF_TWO = ["cpu", pytest.param("cuda", marks=NEEDS_TWO)]

# A network of some thousand parameters, for tests where it may be any.
PRESETS["JiT-XS"] = Preset(2, 8, 2, 4, 1, in_context_len=2)

# Half a second instead of ten for each training process: the server has done everything once.
SPAWNER = multiprocessing.get_context("forkserver")
SPAWNER.set_forkserver_preload(["fork_server"])
# Where the server finds that module; it does not get this process's paths.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def offer_fork_server() -> None:
    """Start the fork server for the workers of pytest-xdist, which would start one each."""
    forkserver.ensure_running()
    os.environ["TEST_FORK_SERVER"] = forkserver._forkserver._forkserver_address.removeprefix("\0")


def join_fork_server(address: str) -> None:
    """Let this process use the fork server at this address, which another one has started and ends."""
    server = forkserver._forkserver
    server._forkserver_address = address if os.path.exists(address) else f"\0{address}"  # a socket without a file
    server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)
    server.ensure_running = resource_tracker.ensure_running


if "TEST_FORK_SERVER" in os.environ:
    join_fork_server(os.environ["TEST_FORK_SERVER"])

# Metrics that differ from run to run.
OF_TIME = ("data/", "perf/", "train/time", "train/elapsed", "train/epoch_time", "train/samples_per_second")
OF_TIME += ("health/data_starving",)

TINY = [
    *("--model", "JiT-XS/7", "--img_size", "28", "--batch_size", "4", "--max_steps", "6"),
    *("--learning_rate", "1e-3", "--warmup_steps", "2", "--log_every_steps", "1", "--mixed_precision", "no"),
    *("--num_workers", "0", "--num_inference_steps", "2", "--sample_every_steps", "0", "--save_every_steps", "0"),
    "--no_html_report",
]


# Below the ports that systems hand out, so that nobody is given one between its choice and its use.
PORTS = itertools.count(10_000 + os.getpid() % 200 * 100)


def free_port() -> int:
    """A port of this machine for processes to meet at; each call gives another one."""
    for port in PORTS:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def in_fresh_accelerate(**environment: str):
    """Train in this process, alone, on the CPU unless `environment` says otherwise, inside the block."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    _reset_accelerate()
    environment = {"ACCELERATE_USE_CPU": "true"} | environment
    os.environ.update(environment)
    try:
        yield
    finally:
        for name in environment:
            del os.environ[name]
        _reset_accelerate()


def _reset_accelerate() -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def train_here(*flags: str, draws_curve: bool = False, **environment: str) -> int:
    """Train in this process, alone, and return the exit code."""
    from jit_accel.train import main, results

    cheap = CHEAP | ({"draw_loss_curve": results.draw_loss_curve} if draws_curve else {})
    with in_fresh_accelerate(**environment), mock.patch.multiple(results, **cheap):
        return main([*TINY, *flags])


def touch_curve(output_dir: Path) -> None:
    """Stand in for `draw_loss_curve`."""
    (output_dir / "loss_curve.png").touch()


# What short trainings would spend half their time on; each has a test of its own.
CHEAP = {"draw_loss_curve": touch_curve, "git_commit": lambda: 40 * "0"}


def _record_weights(folder: str) -> None:
    """Make each process leave its own weights in a file when training ends."""
    from jit_accel.train.trainer import Trainer

    finish = Trainer._finish

    def finish_and_record(self):
        torch.save(self.network.state_dict(), f"{folder}/rank{self.accelerator.process_index}.pt")
        return finish(self)

    Trainer._finish = finish_and_record


def _record_images(folder: str) -> None:
    """Make each process note, step by step, which images it trains on."""
    from jit_accel.train.trainer import Trainer

    loss = Trainer.loss

    def loss_noted(self, batch):
        hashes = [hashlib.sha1(image.numpy().tobytes()).hexdigest() for image in batch.images.cpu()]
        with open(f"{folder}/images_{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, "images": dict(zip(batch.positions.tolist(), hashes))}) + "\n")
        return loss(self, batch)

    Trainer.loss = loss_noted


def images_seen(folder: Path, before_step: int) -> dict[int, str]:
    """Of each position in the run the image that was there, as noted until `before_step`; notes are used up."""
    seen = {}
    for file in folder.glob("images_*.jsonl"):
        for line in file.read_text().splitlines():
            note = json.loads(line)
            if note["step"] < before_step:
                seen |= {int(position): image for position, image in note["images"].items()}
        file.unlink()
    return seen


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "JiTBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def _use_fsdp2(precision: str, shards: int | None = None) -> None:
    """Shard the model with FSDP2, which Accelerate ignores on CPUs unless told after it was built.

    With `shards` fewer than processes it is HSDP: so many share a copy of the weights.
    """
    from accelerate import ParallelismConfig
    from accelerate.utils import DistributedType

    from jit_accel.train import build as startup
    from jit_accel.train.accelerator import build_fsdp_plugin

    build = startup.build_accelerator

    def build_sharding(*args):
        accelerator = build(*args)
        os.environ |= FSDP2
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        if shards:
            replicas = accelerator.num_processes // shards
            config = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)
            accelerator.state.parallelism_config = config
            accelerator.state.device_mesh = config.get_device_mesh("cpu")
        accelerator.state.fsdp_plugin = build_fsdp_plugin(precision)
        return accelerator

    startup.build_accelerator = build_sharding


def _read_slowly(rank: str) -> None:
    """Make one process wait for its data."""
    from jit_accel.data.reading.images import TableImages

    read = TableImages.read
    if os.environ["RANK"] == rank:
        TableImages.read = lambda *args: (time.sleep(0.3), read(*args))[1]


def on_device(device: str, fsdp2: bool = False) -> dict[str, str]:
    """The environment of a training there, whose weights processes share if that is asked for."""
    found = {"ACCELERATE_USE_CPU": str(device == "cpu").lower()}
    return found | ({} if not fsdp2 else {"TEST_FSDP2_PRECISION": "no"} if device == "cpu" else FSDP2)


def _process(flags, environment, log):
    os._exit(run_program(flags, environment, log))  # without waiting for the data workers of a group that may be gone


def run_program(flags, environment, log) -> int:
    """Train, or run what TEST_MAIN names, in this process, which the fork server has made; return the exit code."""
    assert "fork_server" in sys.modules  # Python passes over one that it does not find
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    module, function = environment.get("TEST_MAIN", "jit_accel.train:main").split(":")
    main = getattr(importlib.import_module(module), function)
    if module == "jit_accel.train":
        from jit_accel.train import results

        flags = [*TINY, *flags]
        vars(results).update(CHEAP)
    if "TEST_WEIGHTS_FOLDER" in environment:
        _record_weights(environment["TEST_WEIGHTS_FOLDER"])
    if "TEST_IMAGES_FOLDER" in environment:
        _record_images(environment["TEST_IMAGES_FOLDER"])
    if "TEST_FSDP2_PRECISION" in environment:
        _use_fsdp2(environment["TEST_FSDP2_PRECISION"], int(environment.get("TEST_SHARDS", 0)))
    if "TEST_SLOW_RANK" in environment:
        _read_slowly(environment["TEST_SLOW_RANK"])
    if "TEST_SETUP" in environment:  # module:function
        module, function = environment["TEST_SETUP"].split(":")
        getattr(importlib.import_module(module), function)()
    return main(flags)


class Group:
    """Real processes that train together, over gloo where there are several; or run what TEST_MAIN names."""

    def __init__(self, flags, log: Path, num_processes: int = 1, environment: dict[str, str] | None = None):
        self.log = log
        base = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        base |= {name: os.environ[name] for name in ("JIT_ACCEL_CACHE",) if name in os.environ}
        base |= environment or {}
        self.processes = []
        for rank in range(num_processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
            environment = base | ({k: str(v) for k, v in ranks.items()} if num_processes > 1 else {})
            self.processes.append(SPAWNER.Process(target=_process, args=(list(flags), environment, str(log))))
        for process in self.processes:
            process.start()

    def wait(self, timeout_s: float = 300) -> list[int]:
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill()
            raise TimeoutError(f"still running after {timeout_s} s:\n{self.output()}")
        return codes

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def train_group(tmp_path: Path, *flags: str, num_processes: int = 1, environment=None) -> str:
    """Train to the end in real processes; return what they printed."""
    group = Group(flags, tmp_path / f"log_{time.monotonic_ns()}.txt", num_processes, environment)
    codes = group.wait()
    assert codes == [0] * num_processes, group.output()
    is_on_cpu = (environment or {}).get("ACCELERATE_USE_CPU", "true") == "true"
    assert f"{num_processes} x {'cpu' if is_on_cpu else torch.cuda.get_device_name()}" in group.output()
    return group.output()


def clothes(folder: Path) -> Path:
    """Make a folder of 44 Fashion-MNIST images in four class folders."""
    from jit_accel.data.formats.sources import open_images

    source, counts = open_images("builtin:fashion_mnist"), dict.fromkeys((0, 1, 5, 8), 0)
    for row in source.images.dataset:
        label = row["label"]
        if counts.get(label, 11) < 11:
            path = folder / source.class_names[label].replace("/", "-") / f"{counts[label]:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row["image"]["bytes"])
            counts[label] += 1
        if all(count == 11 for count in counts.values()):
            return folder
    raise AssertionError("the embedded data set ended early")


def as_parquet(images: Path, folder: Path, num_shards: int) -> Path:
    """Write the pictures of class folders as Parquet files, shuffled."""
    from datasets import Dataset, Features, Image, Value

    folder.mkdir()
    files = sorted(images.glob("*/*.png"))
    names = sorted({file.parent.name for file in files})
    table = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": [names.index(file.parent.name) for file in files],
    }
    data = Dataset.from_dict(table, features=Features({"image": Image(), "label": Value("int64")})).shuffle(seed=0)
    for i in range(num_shards):
        data.shard(num_shards, i).to_parquet(folder / f"train-{i:05d}.parquet")
    return folder


def rows(output_dir: Path) -> list[dict]:
    """The metrics that follow from settings and data; how long things took is left out."""
    return [{key: row[key] for key in row if not key.startswith(OF_TIME)} for row in read_metrics(output_dir)]


def last_checkpoint(output_dir: Path) -> Path:
    return sorted(path for path in (output_dir / "checkpoints").glob("step_*") if path.name[5:].isdigit())[-1]


def seal_as_before(checkpoint: Path) -> None:
    """Give a checkpoint the manifest that it would have had before there were checksums."""
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir() if file.name != "manifest.json"}
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 2, "files": sizes}))


def flip_a_bit(file: Path, place: float = 0.7) -> None:
    """Damage a file in the byte that lies at this share of it."""
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 4
    file.write_bytes(data)


def state(output_dir: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by default the newest, put together where several processes wrote them."""
    found = {}
    path = last_checkpoint(output_dir) if step is None else output_dir / "checkpoints" / f"step_{step:08d}"
    for file in sorted(path.glob("*.safetensors")):
        part = re.sub(r"-\d+-of-\d+", "", file.stem)
        with safe_open(file, framework="pt") as opened:
            pieces = json.loads((opened.metadata() or {}).get("pieces", "{}"))
            for name, tensor in load_file(file).items():
                offset, shape = pieces.get(name, ([0] * tensor.ndim, tensor.shape))
                whole = found.setdefault(f"{part}/{name}", torch.full(shape, -1, dtype=tensor.dtype))
                whole[tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape))] = tensor
    return found


def assert_same_state(a: Path, b: Path) -> None:
    one, other = state(a), state(b)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []
