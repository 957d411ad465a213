"""Bad input, as a user meets it: a message with flag, value, rule and remedy, exit code 2, nothing lost."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Group, last_checkpoint, rows, state, train_here

from jit_accel.base.devices import chosen_precision
from jit_accel.base.errors import UserError
from jit_accel.train.trainer import Trainer


@pytest.fixture
def refused(tmp_path, capsys):
    """Train with these flags, and return the error after checking that it is one and that nothing was written."""

    def run(*flags, writes_nothing=True):
        out = tmp_path / "out"
        given = [*flags] if "--output_dir" in flags else [*flags, "--output_dir", str(out)]
        assert train_here(*given) == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        if writes_nothing and "--output_dir" not in flags:
            assert not out.exists()
        return next(line for line in printed.err.splitlines() if line.startswith("error: "))

    return run


def test_missing_folder(refused, tmp_path):
    assert f"--data_path {tmp_path}/photos: no such file or folder" in refused("--data_path", f"{tmp_path}/photos")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--resume", "nowhere"), "--resume nowhere"),
        (("--eval_every_steps", "2", "--eval_features", "nope"), "--eval_features nope"),
    ],
)
def test_what_is_named_but_not_there(refused, images, flags, message):
    assert message in refused("--data_path", str(images), *flags)


def test_folder_without_images(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"--data_path {tmp_path}/empty" in refused("--data_path", f"{tmp_path}/empty")
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    assert f"--data_path {tmp_path}/empty" in refused("--data_path", f"{tmp_path}/empty")


def test_too_few_classes(refused, images):
    message = refused("--data_path", str(images), "--num_classes", "3")
    assert "--num_classes 3: the data has 4 classes (labels 0 to 3): leave the flag out" in message


def test_batch_larger_than_the_data(refused, images):
    message = refused("--data_path", str(images), "--batch_size", "45")
    assert "--batch_size 45 x 1 processes x 1 accumulation steps = 45: must not be larger" in message
    assert "(44 images)" in message


def test_patch_that_does_not_divide(refused, images):
    message = refused("--data_path", str(images), "--img_size", "30")
    assert "--img_size 30: must be a multiple of the patch size 7 (JiT-XS/7): use 28 or 35" in message


def test_output_folder_under_a_file(refused, images, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = refused("--data_path", str(images), "--output_dir", f"{tmp_path}/file/run")
    assert f"--output_dir {tmp_path}/file/run: {tmp_path}/file is not a folder that can be written to" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_output_folder_with_too_long_a_name(refused, images, tmp_path):
    message = refused("--data_path", str(images), "--output_dir", f"{tmp_path}/{300 * 'x'}")
    assert "cannot be written to (File name too long)" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_output_folder(refused, images, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written to" in refused("--data_path", str(images), "--output_dir", f"{tmp_path}/locked/run")


def test_output_folder_of_another_run(refused, images, tmp_path):
    out = tmp_path / "run"
    assert train_here("--data_path", str(images), "--output_dir", str(out)) == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert "holds another run (checkpoints/step_00000006): add --resume auto to continue it" in refused(
        "--data_path", str(images), "--output_dir", str(out)
    )
    differences = refused(
        *("--data_path", "builtin:fashion_mnist", "--output_dir", str(out), "--resume", "auto", "--seed", "1")
    )
    assert "--num_classes is 10, the checkpoint has 4" in differences
    assert "--seed is 1, the checkpoint has 0" in differences
    assert "--data_path is builtin:fashion_mnist (10,000 images, 10 classes), the checkpoint has" in differences
    assert "clothes (44 images, 4 classes)" in differences
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_resume_path_without_a_checkpoint(refused, images, tmp_path):
    message = refused("--data_path", str(images), "--resume", str(tmp_path))
    assert f"--resume {tmp_path}: holds no complete checkpoint" in message


def test_resume_from_a_path_into_a_new_folder(images, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    flags = ["--data_path", str(images), "--save_every_steps", "3", "--keep_checkpoints", "9"]
    assert train_here(*flags, "--output_dir", str(a)) == 0
    from_three = ["--resume", str(a / "checkpoints" / "step_00000003"), "--output_dir", str(b)]
    assert train_here(*flags, *from_three) == 0
    assert rows(b) == rows(a)[3:]
    assert last_checkpoint(b).name == "step_00000006"


def test_going_on_from_an_older_checkpoint_sets_later_ones_aside_but_a_dry_run_does_not(images, tmp_path):
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path), "--save_every_steps", "3"]
    assert train_here(*flags) == 0
    older = [*flags, "--resume", str(tmp_path / "checkpoints" / "step_00000003")]
    before = sorted(tmp_path.rglob("*"))
    assert train_here(*older, "--dry_run") == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert train_here(*older) == 0
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["abandoned_step_00000006", "step_00000003", "step_00000006"]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_fp16_without_a_gpu(refused, images):
    message = refused("--data_path", str(images), "--mixed_precision", "fp16")
    assert "--mixed_precision fp16: needs a GPU: use bf16 or no" in message


@pytest.mark.multiprocess
def test_two_processes_refuse_together_and_one_of_them_says_why(tmp_path):
    group = Group(["--data_path", f"{tmp_path}/photos"], tmp_path / "log.txt", 2)
    assert group.wait() == [2, 2], group.output()
    assert group.output().count("error: --data_path") == 1
    assert "Traceback" not in group.output()


def test_wrong_flag_ends_before_torch_is_loaded():
    code = "import sys, jit_accel.train as t; c = t.main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(c)"
    command = [sys.executable, "-c", code, "--data_path", "x", "--batchsize", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --batchsize: no such flag. Did you mean '--batch_size'? --help lists them all.\n"


def test_a_few_broken_images_are_skipped_and_named(images, tmp_path, capsys):
    broken = copy_with_broken(images, tmp_path, 1)
    flags = ["--data_path", str(broken), "--output_dir", str(tmp_path / "out"), "--max_bad_images", "0.05"]
    assert train_here(*flags, "--max_steps", "12") == 0
    printed = capsys.readouterr().out
    assert "Skipped 1 images that cannot be decoded:" in printed
    assert printed.count("broken_0.png") == 1


def test_too_many_broken_images_stop_the_run_but_lose_nothing(refused, images, tmp_path):
    broken = copy_with_broken(images, tmp_path, 6)
    message = refused("--data_path", str(broken), "--max_steps", "12", writes_nothing=False)
    assert "--max_bad_images 0.01:" in message
    assert "broken_" in message
    assert last_checkpoint(tmp_path / "out").exists()


@pytest.mark.multiprocess
def test_broken_images_of_every_process_are_named(images, tmp_path):
    broken = copy_with_broken(images, tmp_path, 3)
    flags = ["--data_path", str(broken), "--output_dir", str(tmp_path / "out"), "--max_bad_images", "0.1"]
    group = Group([*flags, "--max_steps", "6"], tmp_path / "log.txt", 2)  # 48 images, one epoch
    assert group.wait() == [0, 0], group.output()
    assert "Skipped 3 images that cannot be decoded:" in group.output()


def copy_with_broken(images, tmp_path, count):
    folder = tmp_path / "with broken"
    shutil.copytree(images, folder)
    for i in range(count):
        (folder / "Bag" / f"broken_{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(refused, images, tmp_path, monkeypatch):
    """From step 5 on the network's output overflows; the checkpoint of step 4 must stay the newest."""
    honest = Trainer.loss

    def overflowing(self, batch):
        return honest(self, batch) * (float("inf") if self.step >= 4 else 1)

    monkeypatch.setattr(Trainer, "loss", overflowing)
    flags = ["--data_path", str(images), "--save_every_steps", "2", "--max_steps", "8", "--log_every_steps", "4"]
    message = refused(*flags, writes_nothing=False)
    good = last_checkpoint(tmp_path / "out")
    assert good.name == "step_00000004"
    assert "train/loss is inf at step 5: training stopped and no checkpoint was overwritten" in message
    assert f"the last good checkpoint is {good}" in message
    assert all(torch.isfinite(tensor).all() for tensor in state(tmp_path / "out").values())
    assert not (tmp_path / "out" / "pipeline").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed, which is not supported: shard .*fsdp2.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM, which is not supported"),
        *(
            (
                {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", f"PARALLELISM_CONFIG_{short}_SIZE": "2"},
                rf"asks for {name} parallelism \(parallelism_config_{short.lower()}_size: 2\), which is not supported",
            )
            for short, name in (("TP", "tensor"), ("CP", "context"), ("SP", "sequence"))
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version 1: accelerate's configuration must say fsdp_version: 2"),
        *(
            ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"} | sizes, message)
            for sizes, message in (
                ({"PARALLELISM_CONFIG_TP_SIZE": "two"}, "tensor parallelism .*: two"),
                ({"PARALLELISM_CONFIG_DP_SHARD_SIZE": "two"}, "1 copies of the model of two parts each"),
                ({"PARALLELISM_CONFIG_DP_SHARD_SIZE": "-1"}, "1 copies of the model of -1 parts each"),
                ({"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "3"}, "there are 1 processes: their product must be"),
                ({"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "WORLD_SIZE": "2"}, "which FSDP2 alone can: .*hsdp.yaml"),
                (
                    {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"},
                    "leaves FSDP2 nothing to do",
                ),
            )
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"},
            "which it leaves out on CPUs, .*: start with accelerate_configs/cpu_2_processes.yaml",
        ),
        *(
            ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | settings, message)
            for settings, message in (
                (
                    {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
                    "fsdp_activation_checkpointing gives dropout wrong",
                ),
                ({"FSDP_OFFLOAD_PARAMS": "True"}, "fsdp_offload_params is not supported: leave it out"),
                ({"FSDP_IGNORED_MODULES": "blocks.*"}, "fsdp_ignored_modules is not supported"),
                ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer"}, "BertLayer: the layers here are called JiTBlock"),
                ({"FSDP_AUTO_WRAP_POLICY": "NOPE"}, "cannot be used .*Invalid auto wrap policy: NOPE"),
                ({"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "cannot be used .*full_shard"),
                ({"FSDP_STATE_DICT_TYPE": "NOPE"}, "cannot be used .*NOPE"),
                ({"FSDP_VERSION": "2.0"}, "fsdp_version: 2"),
            )
        ),
        ({"ACCELERATE_USE_SAGEMAKER": "true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "DATA_PARALLEL"}, "SageMaker"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, "gradient_accumulation_steps auto: must be a number"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "-1"}, "gradient_accumulation_steps -1: must be a number"),
        ({"ACCELERATE_MIXED_PRECISION": "int8"}, "mixed_precision int8: .* is none: give bf16, fp16 or no"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8: .* is not supported: use bf16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "nope"}, "accelerate's configuration cannot be used .*NOPE"),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor", "ACCELERATE_DYNAMO_MODE": "fastest"}, "cannot be used .*fastest"),
        ({"ACCELERATE_DYNAMO_BACKEND": "eager", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "maybe"}, "cannot be used .*maybe"),
        ({"ACCELERATE_DEBUG_MODE": "maybe"}, "cannot be used .*maybe"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:0"}, "ACCELERATE_TORCH_DEVICE cuda:0: "),
    ],
)
def test_what_accelerates_configuration_asks_for_and_is_not_supported(
    images, tmp_path, capsys, monkeypatch, environment, message
):
    """Found before the data are looked at."""
    monkeypatch.setattr("jit_accel.train.build.open_data", lambda *_, **__: pytest.fail("reads the data"))
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "run"), "--mixed_precision", "none"]
    assert train_here(*flags, **environment) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "run").exists()


def test_accelerates_fp8_is_refused_and_not_taken_for_another_precision(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match=r"mixed_precision fp8: .* is not supported: use bf16"):
        chosen_precision()
    assert chosen_precision("no") == "no"  # what is given wins


@pytest.mark.multiprocess
def test_a_folder_that_the_machines_do_not_share_is_found_before_the_first_step(images, tmp_path):
    (tmp_path / "1").mkdir()
    flags = ["--data_path", str(images), "--output_dir", "run", "--max_steps", "2"]
    environment = {"TEST_SETUP": "test_bad_input:_on_a_disk_of_its_own", "TEST_FOLDER": str(tmp_path)}
    group = Group(flags, tmp_path / "log.txt", 2, environment)
    assert group.wait() == [2, 2], group.output()
    said = rf"--output_dir run: is another folder on {re.escape(socket.gethostname())} than on the machine of the main"
    assert re.search(said, group.output().replace("\n", " "))
    assert not list(tmp_path.glob("**/metrics.jsonl"))
    assert not (tmp_path / "1" / "run").exists()


def _on_a_disk_of_its_own():
    from jit_accel.base import folder_lock

    folder_lock.SEEN_WITHIN_S = 1
    os.chdir(Path(os.environ["TEST_FOLDER"]) / ("1" if os.environ["RANK"] == "1" else "."))
