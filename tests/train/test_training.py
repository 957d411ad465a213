import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline  # noqa: F401 (imported once, before the processes)
from helpers import (
    TINY,
    Group,
    as_parquet,
    assert_same_state,
    last_checkpoint,
    rows,
    seal_as_before,
    state,
    train_group,
    train_here,
)
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from jit_accel import JiTPipeline
from jit_accel.model.loading import load_pipeline
from jit_accel.model.transformer import JiTTransformer2DModel
from jit_accel.monitor.log import MetricsLog, read_metrics
from jit_accel.monitor.metric_table import VAL_LOSS
from jit_accel.monitor.metrics import StepMetrics
from jit_accel.train import forecast
from jit_accel.train.trainer import Trainer


def losses(output_dir):
    return [row["train/loss"] for row in rows(output_dir)]


def test_a_run_leaves_all_it_promises(images, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ("--data_path", str(images), "--output_dir", str(out), "--save_every_steps", "2")
    assert train_here(*flags, draws_curve=True) == 0
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]
    assert [row["train/learning_rate"] for row in rows(out)][:3] == [0, 5e-4, 1e-3]
    assert all(row["train/grad_norm"] > 0 for row in rows(out))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    for picture in ("samples/step_00000006.png", "loss_curve.png", "pipeline/samples.png"):
        with PILImage.open(out / picture) as image:
            assert min(image.size) > 100
    files = {str(p.relative_to(out / "pipeline")) for p in (out / "pipeline").rglob("*") if p.is_file()}
    assert {"model_index.json", "README.md", "transformer/diffusion_pytorch_model.safetensors"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    card = (out / "pipeline" / "README.md").read_text()
    assert "Trouser" in card
    assert str(tmp_path) not in card

    pipe = JiTPipeline.from_pretrained(out / "pipeline")
    weights = dict(pipe.transformer.named_parameters())
    for name, average in state(out).items():
        if name.startswith("ema_auto/"):
            assert torch.equal(weights[name.removeprefix("ema_auto/")], average)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(["trouser", "Bag"], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in made] == [(28, 28)] * 2

    printed = capsys.readouterr().out
    assert f"Pipeline:   {out / 'pipeline'}" in printed
    # Run again, nothing is done again.
    before = (out / "pipeline" / "model_index.json").stat().st_mtime_ns
    assert train_here("--data_path", str(images), "--output_dir", str(out), "--resume", "auto") == 0
    assert (out / "pipeline" / "model_index.json").stat().st_mtime_ns == before
    assert len(rows(out)) == 6


def test_the_recorded_configuration_runs_the_run_again(images, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert train_here("--data_path", str(images), "--output_dir", str(a), "--label_drop_prob", "0.3") == 0
    assert train_here("--config", str(a / "config.yaml"), "--output_dir", str(b)) == 0
    assert rows(a) == rows(b)
    assert_same_state(a, b)


def test_twenty_golden_steps_on_a_cpu(images, tmp_path):
    """The losses of the first version; a change here is a change of the training, and must be meant."""
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path), "--max_steps", "20", "--model", "JiT-Ti/7"]
    assert train_here(*flags) == 0
    assert losses(tmp_path)[::4] + losses(tmp_path)[-1:] == pytest.approx(GOLDEN_LOSSES, rel=2e-3)


GOLDEN_LOSSES = [1.54733, 1.40861, 0.757317, 0.811358, 0.769387, 0.578921]


def test_muon_learns_too(images, tmp_path):
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path), "--max_steps", "20", "--optimizer", "muon"]
    assert train_here(*flags) == 0
    assert sum(losses(tmp_path)[-5:]) < 0.8 * sum(losses(tmp_path)[:5])


@pytest.mark.parametrize("prediction", ["x", "e", "v"])
@pytest.mark.parametrize("space", ["x", "e", "v"])
def test_every_pair_of_prediction_and_loss_learns(images, tmp_path, prediction, space):
    flags = ["--prediction", prediction, "--loss_space", space, "--max_steps", "12", "--batch_size", "8"]
    flags += ["--learning_rate", "1e-2"]
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path), *flags) == 0
    assert sum(losses(tmp_path)[-3:]) < sum(losses(tmp_path)[:3])


def test_a_dry_run_that_memory_may_end_says_so_before_its_steps(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(forecast, "free_gib", lambda device: 0.0)
    monkeypatch.delattr(Trainer, "train_step")
    with pytest.raises(AttributeError):
        train_here("--data_path", str(images), "--output_dir", str(tmp_path / "run"), "--dry_run")
    said = capsys.readouterr()
    assert "Ahead:" in said.out
    assert "more than are free: halve --batch_size" in said.err


def test_a_dry_run_writes_nothing(images, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_here("--data_path", str(images), "--output_dir", str(out), "--dry_run") == 0
    assert not out.exists()
    printed = capsys.readouterr().out
    assert "Dry run: loss 1.5" in printed  # the first of the golden losses
    assert re.search(r"^Ahead:  about .*: 6 steps of .* s.*; about .* GiB of memory$", printed, re.MULTILINE)


def test_gradient_checkpointing_changes_nothing_but_memory_even_with_dropout(images, tmp_path):
    flags = ["--data_path", str(images), "--proj_dropout", "0.2", "--max_steps", "3"]
    assert train_here(*flags, "--output_dir", str(tmp_path / "a")) == 0
    assert train_here(*flags, "--output_dir", str(tmp_path / "b"), "--gradient_checkpointing") == 0
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-6)


def test_accelerates_compiler_compiles_the_blocks_in_place(images, tmp_path, monkeypatch):
    """So the weights keep their names; checkpoints whose names begin with a wrapper's are read."""
    asked, compiled = [], JiTTransformer2DModel.compile_repeated_blocks

    def compile_here(network, **how):
        asked.append(how)
        compiled(network, **how)

    monkeypatch.setattr(JiTTransformer2DModel, "compile_repeated_blocks", compile_here)
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path)]
    assert train_here(*flags, "--max_steps", "2", ACCELERATE_DYNAMO_BACKEND="EAGER") == 0
    assert asked == [{"backend": "eager"}]
    assert not [name for name in state(tmp_path) if "_orig_mod" in name]
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
    checkpoint = last_checkpoint(tmp_path)
    weights = load_pipeline(checkpoint).transformer.state_dict()
    for file in checkpoint.glob("*.safetensors"):
        save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file)
    seal_as_before(checkpoint)
    again = load_pipeline(checkpoint).transformer.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert train_here(*flags, "--max_steps", "3", "--resume", "auto") == 0
    assert len(losses(tmp_path)) == 3


@pytest.mark.parametrize("backend", ["ONNXRT", "FOO"])
def test_a_compiler_that_is_not_there_is_told(images, tmp_path, capsys, backend):
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "run")]
    assert train_here(*flags, ACCELERATE_DYNAMO_BACKEND=backend) == 2
    assert backend.lower() in capsys.readouterr().err.lower()


@pytest.mark.multiprocess
def test_accumulation_and_processes_are_the_same_thing(images, tmp_path):
    """(1 process, 4 micro-steps) = (2, 2) = (4, 1): the same images, noise, steps and weights, on all ranks."""
    runs = {}
    for processes, accumulation in ((1, 4), (2, 2), (4, 1)):
        out = runs[processes] = tmp_path / f"{processes}"
        flags = ["--data_path", str(images), "--output_dir", str(out), "--batch_size", "3", "--max_steps", "5"]
        flags += ["--gradient_accumulation_steps", str(accumulation)]
        own = {"TEST_WEIGHTS_FOLDER": str(tmp_path)}
        train_group(tmp_path, *flags, num_processes=processes, environment=own if processes == 2 else None)
    for processes in (2, 4):
        assert losses(runs[processes]) == pytest.approx(losses(runs[1]), rel=1e-4)
        for a, b in zip(rows(runs[1]), rows(runs[processes])):
            assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-3)
            assert a["train/learning_rate"] == b["train/learning_rate"]  # counts optimizer steps
        one, other = state(runs[1]), state(runs[processes])
        start = dict(initial_weights())
        for name in start:
            # Adam turns rounding into a whole step where a gradient is next to nothing, so: distance against travel.
            key = f"model/{name}"
            travel = (one[key] - start[name]).norm()
            assert (one[key] - other[key]).norm() <= 0.02 * travel + 1e-6, name
    weights = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    moved = [name for name, p in initial_weights().items() if not torch.equal(weights[0][name], p)]
    assert len(moved) > 20


def initial_weights():
    from jit_accel.model.transformer import build_model

    torch.manual_seed(0)
    return build_model("JiT-XS/7", img_size=28, num_classes=4).state_dict()


FLAGS_OF_KILLED = ("--max_steps", "32", "--save_every_steps", "3", "--resume", "auto")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return a function that trains to the end, without workers, once for each data and number of processes."""
    runs = {}

    def run(data, processes, *flags):
        if (data, processes) not in runs:
            folder = tmp_path_factory.mktemp("whole")
            given = ("--data_path", str(data), *FLAGS_OF_KILLED, *flags, "--output_dir", str(folder / "run"))
            train_group(folder, *given, num_processes=processes)
            runs[data, processes] = folder / "run"
        return runs[data, processes]

    return run


@pytest.mark.multiprocess
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(images, uninterrupted, tmp_path, processes, workers):
    """kill -9 three times, at whatever moment, across an epoch's end (44 images); bit for bit the same run."""
    whole, broken = uninterrupted(images, processes, "--proj_dropout", "0.1"), tmp_path / "broken"
    flags = ["--data_path", str(images), "--num_workers", str(workers), *FLAGS_OF_KILLED, "--proj_dropout", "0.1"]
    for kill_at in (1, 6, 12):
        group = Group([*flags, "--output_dir", str(broken)], tmp_path / "killed.txt", processes)
        deadline = time.monotonic() + 120
        while len(rows(broken)) < kill_at and time.monotonic() < deadline:
            time.sleep(0.002)
        group.kill()
    assert len(rows(broken)) < 32
    printed = train_group(tmp_path, *flags, "--output_dir", str(broken), num_processes=processes)
    assert "Resumed from" in printed
    assert rows(broken) == rows(whole)
    assert_same_state(whole, broken)


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [3, 4])
def test_more_than_two_processes_sum_up_alike_before_and_after_a_resume(images, tmp_path, processes):
    flags = ["--data_path", str(images), "--save_every_steps", "3", "--resume", "auto", "--batch_size", "2"]
    train_group(tmp_path, *flags, "--output_dir", str(tmp_path / "whole"), num_processes=processes)
    shutil.copytree(tmp_path / "whole/checkpoints/step_00000003", tmp_path / "part/checkpoints/step_00000003")
    train_group(tmp_path, *flags, "--output_dir", str(tmp_path / "part"), num_processes=processes)
    assert_same_state(tmp_path / "whole", tmp_path / "part")


@pytest.mark.multiprocess
def test_a_random_access_run_resumes_on_another_number_of_processes(images, tmp_path):
    """2 processes for three steps, then 1 with the same global batch = 2 all the way, across an epoch's end."""
    flags = ["--data_path", str(images), "--save_every_steps", "3", "--resume", "auto", "--lr_schedule", "constant"]
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    train_group(tmp_path, *flags, "--output_dir", str(whole), num_processes=2)
    train_group(tmp_path, *flags, "--output_dir", str(changed), "--max_steps", "3", num_processes=2)
    train_group(tmp_path, *flags, "--output_dir", str(changed), "--batch_size", "8", num_processes=1)
    assert [row["step"] for row in rows(changed)] == [1, 2, 3, 4, 5, 6]
    assert losses(changed) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("processes", "rank", "number"),
    [(1, 0, signal.SIGTERM), (1, 0, signal.SIGUSR1), (2, 0, signal.SIGTERM), (2, 1, signal.SIGUSR2)],
)
def test_a_signal_to_any_process_saves_the_very_step_and_leaves_a_note(images, tmp_path, processes, rank, number):
    out = tmp_path / "run"
    flags = ["--data_path", str(images), "--output_dir", str(out), "--max_steps", "100000", "--resume", "auto"]
    flags += ["--log_every_steps", "100000"]  # the processes agree at each step, not where metrics are read
    reached = tmp_path / "reached"
    environment = {"TEST_SETUP": "test_training:_say_when_at_step_5", "TEST_REACHED": str(reached)}
    group = Group(flags, tmp_path / "log.txt", processes, environment)
    while not reached.exists():
        time.sleep(0.01)
    os.kill(group.processes[rank].pid, number)  # one of them is enough
    assert group.wait() == [128 + number] * processes, group.output()
    assert f"{processes} x cpu" in group.output()
    step = rows(out)[-1]["step"]
    assert [row["step"] for row in rows(out)] == [*range(1, step + 1)]
    assert step >= 5
    assert last_checkpoint(out).name == f"step_{step:08d}"
    assert "go on with --resume auto" in (out / "INTERRUPTED").read_text()


def _say_when_at_step_5():
    step = Trainer.train_step

    def train_step(self):
        step(self)
        if self.step == 5 and self.accelerator.is_main_process:
            Path(os.environ["TEST_REACHED"]).touch()

    Trainer.train_step = train_step


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say that a parent is gone")
def test_a_training_ends_in_order_when_its_launcher_is_killed(images, tmp_path):
    out, reached = tmp_path / "run", tmp_path / "reached"
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, test_training\n"
        "from jit_accel.train import main\n"
        "test_training._say_when_at_step_5()\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    flags = [*TINY, "--data_path", str(images), "--output_dir", str(out), "--max_steps", "100000"]
    environment = os.environ | {"TEST_REACHED": str(reached), "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [Path(__file__).parent, Path(__file__).parents[1], *sys.path]))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    with open(tmp_path / "log.txt", "w") as log:
        launcher = subprocess.Popen([*launch, str(program), *flags], env=environment, stdout=log, stderr=log)
    while not reached.exists():
        assert launcher.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 120
    while not (out / "INTERRUPTED").exists():
        assert time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    assert int(last_checkpoint(out).name.removeprefix("step_")) >= 5


def test_a_stop_while_saving_costs_no_sheet(images, tmp_path, monkeypatch):
    flags = ("--data_path", str(images), "--save_every_steps", "3", "--sample_every_steps", "3")
    flags += ("--report_to", "tensorboard")
    whole, stopped, sheet = tmp_path / "whole", tmp_path / "stopped", "samples/step_00000003.png"
    assert train_here(*flags, "--output_dir", str(whole)) == 0
    write = Trainer.save

    def write_and_be_told(self):
        write(self)
        self.stop.number = signal.SIGTERM

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save", write_and_be_told)
        assert train_here(*flags, "--output_dir", str(stopped)) == 128 + signal.SIGTERM
    assert last_checkpoint(stopped).name == "step_00000003"
    assert not (stopped / sheet).exists()  # whoever stops a run soon kills it
    assert train_here(*flags, "--output_dir", str(stopped), "--resume", "auto") == 0
    assert (stopped / sheet).read_bytes() == (whole / sheet).read_bytes()
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stopped / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("samples/grid")] == [3, 6]


def test_the_log_of_a_resumed_run_has_no_doubled_and_no_missing_step(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    log.write([{"step": step} for step in range(1, 8)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "tr')  # killed while writing
    log = MetricsLog(tmp_path, step=5)
    log.write([{"step": 6}])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("damaged", [1, 4, 9])
@pytest.mark.parametrize("number", [2, 7, 900])
def test_a_flipped_bit_in_the_log_costs_a_resumed_run_no_other_row(tmp_path, damaged, number):
    """Whatever step the damaged row seems to be of, before and behind the one that is gone on from."""
    log = MetricsLog(tmp_path, step=0)
    log.write([{"step": number if step == damaged else step} for step in range(1, 11)])
    log = MetricsLog(tmp_path, step=6)
    log.write([{"step": step} for step in (7, 8)])
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert steps == [number if step == damaged else step for step in range(1, 9)]


@pytest.mark.multiprocess
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_training_equals_replicated_training_and_their_checkpoints_are_the_same(images, tmp_path, optimizer):
    """FSDP2 on two processes = DDP on two, with samples, a holdout's loss, two averages and dropout; and each continues
    the other's checkpoint."""
    flags = ["--sample_every_steps", "1", "--optimizer", optimizer, "--ema_decays", "0.5", "auto"]
    flags += ["--holdout", "0.2", "--val_every_steps", "2", "--proj_dropout", "0.2"]
    flags += ["--data_path", str(images), "--save_every_steps", "3", "--resume", "auto", "--keep_checkpoints", "9"]
    replicated, sharded, mixed = tmp_path / "ddp", tmp_path / "fsdp", tmp_path / "mixed"
    fsdp2 = {"TEST_FSDP2_PRECISION": "no"}
    train_group(tmp_path, *flags, "--output_dir", str(replicated), num_processes=2)
    train_group(tmp_path, *flags, "--output_dir", str(sharded), num_processes=2, environment=fsdp2)
    assert losses(sharded) == pytest.approx(losses(replicated), rel=1e-5)
    held_out = [[row[VAL_LOSS] for row in rows(folder) if VAL_LOSS in row] for folder in (sharded, replicated)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    assert len(held_out[0]) == 3
    one, other = state(replicated), state(sharded)
    assert {name: tensor.shape for name, tensor in one.items()} == {n: t.shape for n, t in other.items()}
    assert all(torch.allclose(tensor, other[name], atol=1e-6) for name, tensor in one.items())
    for half, continued, environment in ((sharded, "a", None), (replicated, "b", fsdp2)):
        out = mixed / continued
        shutil.copytree(half / "checkpoints" / "step_00000003", out / "checkpoints" / "step_00000003")
        train_group(tmp_path, *flags, "--output_dir", str(out), num_processes=2, environment=environment)
        assert losses(out) == pytest.approx(losses(replicated)[3:], rel=1e-5)
        assert all(torch.allclose(tensor, one[name], atol=1e-6) for name, tensor in state(out).items())
    assert JiTPipeline.from_pretrained(sharded / "pipeline").transformer.num_parameters() > 0


@pytest.mark.multiprocess
def test_sharded_training_in_bf16_has_the_losses_of_replicated_training(images, tmp_path):
    """Accelerate's own policy, which casts what goes into the network, fails here."""
    flags = ["--data_path", str(images), "--mixed_precision", "bf16", "--max_steps", "4", "--output_dir"]
    replicated, sharded = tmp_path / "ddp", tmp_path / "fsdp"
    train_group(tmp_path, *flags, str(replicated), num_processes=2)
    fsdp2 = {"TEST_FSDP2_PRECISION": "bf16"}
    train_group(tmp_path, *flags, str(sharded), num_processes=2, environment=fsdp2)
    assert losses(sharded) == pytest.approx(losses(replicated), rel=1e-4)


@pytest.mark.multiprocess
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_copies_of_two_shards_each_train_as_four_copies(images, tmp_path, optimizer):
    """HSDP on four processes = DDP on four, with samples, accumulation and recomputation; it goes on from DDP."""
    flags = ["--data_path", str(images), "--batch_size", "1", "--gradient_accumulation_steps", "2", "--max_steps", "4"]
    flags += ["--save_every_steps", "2", "--resume", "auto", "--keep_checkpoints", "9", "--sample_every_steps", "2"]
    flags += ["--gradient_checkpointing", "--optimizer", optimizer]
    replicated, sharded = tmp_path / "ddp", tmp_path / "hsdp"
    hsdp = {"TEST_FSDP2_PRECISION": "no", "TEST_SHARDS": "2"}
    train_group(tmp_path, *flags, "--output_dir", str(replicated), num_processes=4)
    train_group(tmp_path, *flags, "--output_dir", str(sharded), num_processes=4, environment=hsdp)
    assert losses(sharded) == pytest.approx(losses(replicated), rel=1e-5)
    one, other = state(replicated), state(sharded)
    assert all(torch.allclose(tensor, other[name], atol=1e-6) for name, tensor in one.items())
    out = tmp_path / "on"
    shutil.copytree(replicated / "checkpoints" / "step_00000002", out / "checkpoints" / "step_00000002")
    train_group(tmp_path, *flags, "--output_dir", str(out), num_processes=4, environment=hsdp)
    assert losses(out) == pytest.approx(losses(replicated)[2:], rel=1e-5)


def test_a_finished_run_that_is_made_longer_leaves_a_new_pipeline(images, tmp_path):
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path), "--resume", "auto", "--max_steps"]
    assert train_here(*flags, "3") == 0
    before = (tmp_path / "pipeline" / "samples.png").read_bytes()
    assert train_here(*flags, "6") == 0
    assert (tmp_path / "pipeline" / "samples.png").read_bytes() != before
    assert (tmp_path / "samples" / "step_00000006.png").exists()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory):
    return as_parquet(images, tmp_path_factory.mktemp("parquet") / "shards", num_shards=4)


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_stream_resumes_exactly(shards, uninterrupted, tmp_path, workers):
    """The same law for streamed Parquet, on two processes."""
    whole, broken = uninterrupted(shards, 2), tmp_path / "broken"
    flags = ["--data_path", str(shards), "--num_workers", str(workers), *FLAGS_OF_KILLED]
    group = Group([*flags, "--output_dir", str(broken)], tmp_path / "killed.txt", 2)
    deadline = time.monotonic() + 120
    while len(rows(broken)) < 8 and time.monotonic() < deadline:
        time.sleep(0.002)
    group.kill()
    assert "Resumed from" in train_group(tmp_path, *flags, "--output_dir", str(broken), num_processes=2)
    assert rows(broken) == rows(whole)
    assert_same_state(whole, broken)


def test_the_default_averages_of_a_resumed_run_are_those_it_began_with(images, tmp_path, monkeypatch):
    """They depend on the run's length, which a user may change; this must not refuse the checkpoint."""
    monkeypatch.setattr("jit_accel.config.completion.PAPER_EMA_DECAYS", (0.5,))
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path), "--resume", "auto", "--max_steps"]
    assert train_here(*flags, "3") == 0
    assert train_here(*flags, "30") == 0
    assert not (last_checkpoint(tmp_path) / "ema_0.5.safetensors").exists()
    assert rows(tmp_path)[-1]["step"] == 30


def test_metrics_are_reduced_on_the_device_even_where_there_are_none():
    """NCCL reduces only what is on a GPU."""
    devices = []

    def reduce_mean(values):
        devices.append(values.device.type)
        return torch.zeros(values.shape)

    metrics = StepMetrics(torch.device("meta"))
    assert metrics.flush(reduce_mean, [1.0, 0.0]) == ([], [0.0, 0.0])
    metrics.record(1, 0.1, torch.zeros((), device="meta"), torch.zeros((), device="meta"))
    assert len(metrics.flush(reduce_mean, [1.0])[0]) == 1
    assert devices == ["meta", "meta"]
