"""Every configuration, recipe, script and documented command works.

The scripts run for real, but for the slow part: an `accelerate` that only notes its arguments stands in for the real
one, and what it was told is then tried in this process with `--dry_run`, a small model and a few images. Three
commands run for real from end to end.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import patch_environment
from data_samples import image_folder
from golden import load_golden
from helpers import train_here
from hub_server import stand_in
from packaging.requirements import Requirement
from PIL import Image
from toy_features import load_toy

from jit_accel import JiTPipeline, JiTScheduler
from jit_accel.base.errors import UserError
from jit_accel.compare import main as compare
from jit_accel.compare import run as comparison
from jit_accel.config.command_line import parse_args, read_recipe
from jit_accel.config.completion import complete, plan_run
from jit_accel.config.facts import Facts
from jit_accel.config.groups import AuxConfig, ConditionConfig, TechniqueConfig, TuneConfig
from jit_accel.config.identity import run_folder
from jit_accel.config.run_groups import EvalConfig, HealthConfig, HubConfig, TrackingConfig
from jit_accel.config.settings import SETTINGS, Config
from jit_accel.convert import main as convert
from jit_accel.evaluate import main as evaluate
from jit_accel.evaluate.features import LOADERS
from jit_accel.model.transformer import build_model
from jit_accel.monitor.health import KINDS
from jit_accel.plan import main as plan
from jit_accel.prepare import main as prepare
from jit_accel.report import main as report
from jit_accel.report import parse_args as report_arguments
from jit_accel.sample import main as sample

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "accelerate_configs").glob("*.yaml"))
PAPER_BASE = REPOSITORY / "launch" / "recipes" / "paper.yaml"
RECIPES = sorted({*PAPER_BASE.parent.glob("*.yaml")} - {PAPER_BASE})
SCRIPTS = [*sorted((REPOSITORY / "launch").glob("*.sh")), REPOSITORY / ".ci" / "run"]
IMAGENET_IMAGES = 1_281_167


def by_name(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Two classes of four images."""
    folder = tmp_path_factory.mktemp("photos")
    colours = np.random.default_rng(0)
    for i in range(8):
        path = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(colours.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return folder


# --- accelerate_configs


WORLDS = {  # distributed type, processes of all nodes together, nodes, precision
    "single_device": ("NO", 1, 1, "no"),
    "single_gpu": ("NO", 1, 1, "bf16"),
    "multi_gpu": ("MULTI_GPU", 8, 1, "bf16"),
    "multi_node": ("MULTI_GPU", 16, 2, "bf16"),
    "fsdp2": ("FSDP", 8, 1, "bf16"),
    "hsdp": ("FSDP", 16, 2, "bf16"),
    "cpu_2_processes": ("MULTI_GPU", 2, 1, "no"),
}


@pytest.mark.parametrize("path", CONFIGS, ids=by_name)
def test_accelerate_reads_each_file_as_the_world_it_describes(path):
    loaded = load_config_from_file(str(path))
    world = (loaded.distributed_type.value, loaded.num_processes, loaded.num_machines, loaded.mixed_precision)
    assert world == WORLDS[path.stem]
    arguments = validated_launch(["--config_file", str(path), "-m", "jit_accel.train"])
    assert (arguments.num_processes, arguments.num_machines, arguments.mixed_precision) == WORLDS[path.stem][1:]
    assert arguments.multi_gpu == (WORLDS[path.stem][0] == "MULTI_GPU")
    assert arguments.use_fsdp == (WORLDS[path.stem][0] == "FSDP")


@pytest.mark.parametrize("name", ["fsdp2", "hsdp"])
def test_fsdp2_splits_the_blocks_and_leaves_recomputation_to_the_model(name):
    from jit_accel.model.transformer import JiTTransformer2DModel

    path = REPOSITORY / "accelerate_configs" / f"{name}.yaml"
    arguments = validated_launch(["--config_file", str(path), "-m", "jit_accel.train"])
    assert arguments.fsdp_version == 2
    assert arguments.fsdp_transformer_layer_cls_to_wrap in JiTTransformer2DModel._no_split_modules
    assert arguments.fsdp_activation_checkpointing is False
    assert arguments.use_parallelism_config == (name == "hsdp")


def test_hsdp_has_a_copy_on_each_machine():
    arguments = validated_launch(["--config_file", str(REPOSITORY / "accelerate_configs/hsdp.yaml"), "-m", "x"])
    copies, parts = arguments.parallelism_config_dp_replicate_size, arguments.parallelism_config_dp_shard_size
    assert (copies, copies * parts) == (arguments.num_machines, arguments.num_processes)


def validated_launch(argv: list[str]):
    """The arguments of `accelerate launch` after its own checks and the configuration file."""
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    return arguments


# --- recipes


# What may differ between machines and users; everything else is in each recipe, so that a changed default
# changes no recipe.
NOT_IN_RECIPES = {
    *(
        "data_path",
        "data_format",
        "value_range",
        "vector_column",
        "raw_shape",
        "raw_dtype",
        "label_separator",
        "split",
        "renumber_labels",
        "image_column",
        "label_column",
        "streaming",
        "shuffle_buffer",
        "lanes",
        "num_workers",
        "num_classes",
    ),
    *("in_channels", "epochs", "max_steps", "warmup_epochs", "warmup_steps", "learning_rate", "mixed_precision"),
    *("val_every_steps", "val_images", "max_stall_minutes", "profile_steps", "average_snapshots"),
    *("decay_fraction", "muon_scale"),
    *("output_dir", "resume", "dry_run"),
    *(
        field.name
        for group in (
            AuxConfig,
            ConditionConfig,
            EvalConfig,
            HealthConfig,
            HubConfig,
            TechniqueConfig,
            TrackingConfig,
            TuneConfig,
        )
        for field in fields(group)
    ),
    # Of no effect where there is no condition, or no further loss.
    *("condition_drop_prob", "guidance_on", "path"),
    "model_guidance",
}


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_each_recipe_is_complete_and_commented(path):
    recipe = read_recipe(path)
    assert set(SETTINGS) - NOT_IN_RECIPES <= set(recipe)
    assert len({"epochs", "max_steps"} & set(recipe)) == 1
    assert len({"warmup_epochs", "warmup_steps"} & set(recipe)) == 1
    config = parse_args(["--config", str(path), *([] if "data_path" in recipe else ["--data_path", "photos"])])
    flat = config.flat()
    written = yaml.safe_load(path.read_text())
    base = yaml.safe_load(path.with_name(written["base"]).read_text()) if "base" in written else {}
    for name, value in (base | written).items():
        if name != "base":
            assert flat[name] == (list(map(str, value)) if name == "ema_decays" else value), name
    assert path.read_text().startswith("# ")


# On purpose: see docs/benchmarks.md, and of solvers docs/generate.md.
CHANGED_SINCE = {
    "quickstart": {"learning_rate": 0.007, "max_steps": 900, "warmup_steps": 45},
    **{name: {"num_inference_steps": 25} for name in ("my_images_64", "my_images_256", "my_images_few")},
}


def test_each_recipe_means_what_it_did_when_it_was_complete_in_itself():
    before = json.loads((REPOSITORY / "tests/fixtures/fc94876/recipes.json").read_text())
    assert {path.stem for path in RECIPES} >= set(before)
    for name, settings in before.items():
        now = parse_args(["--config", str(PAPER_BASE.with_name(f"{name}.yaml")), "--data_path", settings["data_path"]])
        settings |= CHANGED_SINCE.get(name, {})
        assert {key: value for key, value in now.flat().items() if key in settings} == settings, name


PAPER = {  # size, patch, image size: dropout, noise scale, guidance
    "imagenet256_b16": ("JiT-B/16", 256, 0.0, 1.0, 3.0),
    "imagenet256_l16": ("JiT-L/16", 256, 0.0, 1.0, 2.4),
    "imagenet256_h16": ("JiT-H/16", 256, 0.2, 1.0, 2.2),
    "imagenet256_g16": ("JiT-G/16", 256, 0.2, 1.0, None),
    "imagenet512_b32": ("JiT-B/32", 512, 0.0, 2.0, 3.0),
    "imagenet512_l32": ("JiT-L/32", 512, 0.0, 2.0, 2.5),
    "imagenet512_h32": ("JiT-H/32", 512, 0.2, 2.0, 2.3),
    "imagenet1024_b64": ("JiT-B/64", 1024, 0.0, 4.0, None),
}


def test_there_is_a_recipe_for_each_row_of_the_paper():
    assert set(PAPER) == {path.stem for path in RECIPES if path.stem.startswith("imagenet")}


@pytest.mark.parametrize("name", PAPER)
def test_an_imagenet_recipe_gives_the_numbers_of_the_paper_on_eight_gpus(name):
    config = parse_args(["--config", str(REPOSITORY / f"launch/recipes/{name}.yaml"), "--data_path", "imagenet"])
    model, img_size, dropout, noise_scale, guidance = PAPER[name]
    assert (config.model.model, config.data.img_size, config.model.num_classes) == (model, img_size, 1000)
    assert (config.model.proj_dropout, config.model.attn_dropout) == (dropout, 0.0)
    assert config.objective.noise_scale == noise_scale
    assert guidance is None or config.sample.guidance_scale == guidance

    optim = config.optim
    plan = plan_run(optim, Facts(IMAGENET_IMAGES, processes=8, accumulation=optim.gradient_accumulation_steps or 1))
    assert plan.global_batch_size == 1024
    assert (optim.learning_rate or 5e-5 * plan.global_batch_size / 256) == pytest.approx(2e-4)
    assert plan.total_steps == -(-600 * IMAGENET_IMAGES // 1024)
    assert plan.warmup_steps == round(5 * IMAGENET_IMAGES / 1024)
    assert (optim.optimizer, optim.adam_betas, optim.weight_decay) == ("adamw", (0.9, 0.95), 0.0)
    assert (optim.lr_schedule, optim.max_grad_norm) == ("constant", 0.0)
    assert {"0.9996", "0.9998", "0.9999"} < set(optim.ema_decays)


# --- constraints.txt


def test_constraints_pin_every_direct_dependency_inside_the_range_that_setup_states():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\d.]+", str(pin.specifier)) for pin in pins)
    for line in metadata.requires("jit_accel"):
        stated = Requirement(line)
        for python in ("3.10", "3.11", "3.12", "3.13"):
            pinned = [
                pin
                for pin in pins
                if pin.name.lower().replace("-", "_") == stated.name.lower().replace("-", "_")
                and (pin.marker is None or pin.marker.evaluate({"python_version": python}))
            ]
            assert len(pinned) == 1, f"{stated.name} on Python {python}"
            assert stated.specifier.contains(str(pinned[0].specifier).removeprefix("==")), stated.name


# --- scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_script_is_valid_bash(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.fixture
def recorder(tmp_path) -> dict[str, str]:
    """An environment in which `accelerate`, `ruff`, `lint-imports` and pytest only note what they were told."""
    programs = tmp_path / "programs"
    programs.mkdir()
    noting = "import json, sys; print(json.dumps(sys.argv[1:]))"
    note = f"""exec {sys.executable} -c '{noting}' "$0" "$@" >>{tmp_path}/calls\n"""
    for name in ("accelerate", "ruff", "lint-imports"):
        (programs / name).write_text(f"#!/bin/sh\n{note}")
    (programs / "python").write_text(f"#!/bin/sh\n{note}")
    for program in programs.iterdir():
        program.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "SLURM_", "JIT_ACCEL_"))}
    return {**kept, "JIT_ACCEL_PYTHON": str(programs / "python"), "CALLS": str(tmp_path / "calls")}


def calls(environment: dict[str, str]) -> list[list[str]]:
    """What was noted: the program's name and its arguments; a launcher below a supervisor by itself."""
    lines = Path(environment["CALLS"]).read_text().splitlines()
    found = [[Path(program).name, *arguments] for program, *arguments in map(json.loads, lines)]
    return [call[3:] if call[:3] == ["python", "-m", "jit_accel.supervise"] else call for call in found]


def run_script(command: str, environment: dict[str, str], **more) -> list[list[str]]:
    """Run a shell command whose programs are those of `recorder`; return what they were told."""
    path = f"{Path(environment['JIT_ACCEL_PYTHON']).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        env={**environment, "PATH": path, **more},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return calls(environment)


def split_launch(call: list[str]) -> tuple:
    """The checked launcher arguments of an `accelerate launch -m jit_accel.train`, and what the trainer gets."""
    assert call[:2] == ["accelerate", "launch"]
    arguments = validated_launch(call[2:])
    assert arguments.module
    assert arguments.training_script == "jit_accel.train"
    return arguments, arguments.training_script_args


def try_here(flags: list[str], photos: Path, tmp_path: Path, monkeypatch) -> None:
    """Parse the flags as they are, then dry-run them with a small model of the same patch on a few images."""
    monkeypatch.chdir(REPOSITORY)
    config = parse_args(flags)
    patch = (config.model.model or "JiT-Ti/7").partition("/")[2]
    model = f"JiT-Ti/{patch}" if config.tune.lora_rank else f"JiT-XS/{patch}"  # too small for the ranks
    if config.tune.init_from:
        flags = [*flags, "--init_from", str(untrained_pipeline(tmp_path / "source", model))]
    small = [
        *("--dry_run", "--model", model, "--batch_size", "2", "--gradient_accumulation_steps", "1"),
        *("--num_workers", "0", "--mixed_precision", "no", "--no_compile", "--output_dir", str(tmp_path / "run")),
    ]
    if config.condition.condition_path:
        small += ["--condition_path", str(photos)]
        photos = shutil.copytree(photos, tmp_path / "images")
    if columns := config.data.vector_column:
        photos = shutil.copytree(photos, tmp_path / "listed")
        lines = [",".join([str(path.relative_to(photos)), *["1"] * len(columns)]) for path in photos.glob("*/*.png")]
        (photos / "metadata.csv").write_text("\n".join([",".join(["file_name", *columns]), *lines]))
    if not config.data.data_path.startswith("builtin:"):
        small += ["--data_path", str(photos)]
    assert train_exactly(*flags, *small) == 0


def untrained_pipeline(folder: Path, model: str) -> Path:
    """A small one for the two classes of photos."""
    network = build_model(model, img_size=4 * int(model.partition("/")[2]), num_classes=2)
    JiTPipeline(network, JiTScheduler()).save_pretrained(folder)
    return folder


def train_exactly(*flags: str) -> int:
    """Run the trainer in this process with these flags and no others, as if it had just been started."""
    from jit_accel.train import main

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    with patch_environment(ACCELERATE_USE_CPU="true"):
        return main(list(flags))


def test_train_sh_passes_its_settings_on(recorder, photos, tmp_path, monkeypatch):
    settings = {
        "DATA_PATH": "some/photos",
        "MODEL": "JiT-S/8",
        "IMG_SIZE": "128",
        "BATCH_SIZE": "7",
        "ACCUMULATION": "3",
        "EPOCHS": "9",
        "LEARNING_RATE": "None",
        "OUTPUT_DIR": "out put",
        "USE_WANDB": "true",
        "NUM_PROCESSES": "4",
        "WANDB_PROJECT": "project",
        "WANDB_NAME": "a name",
        "WANDB_ENTITY": "team",
        "WANDB_TAGS": " faces, two words,,small , ",
        "WANDB_NOTES": "-a longer 'note' with $signs",
        "WANDB_GROUP": "--all seeds",
        "ACCELERATE_CONFIG": "accelerate_configs/multi_gpu.yaml",
    }
    (call,) = run_script("bash launch/train.sh --seed 5", recorder, **settings)
    launch, flags = split_launch(call)
    assert (launch.num_processes, launch.multi_gpu) == (4, True)
    flat = parse_args(flags).flat()
    expected = {
        "data_path": "some/photos",
        "model": "JiT-S/8",
        "img_size": 128,
        "batch_size": 7,
        "epochs": 9.0,
        "gradient_accumulation_steps": 3,
        "learning_rate": None,
        "output_dir": "out put",
        "resume": "auto",
        "use_wandb": True,
        "wandb_project": "project",
        "wandb_name": "a name",
        "wandb_entity": "team",
        "wandb_tags": ["faces", "two words", "small"],
        "wandb_notes": "-a longer 'note' with $signs",
        "wandb_group": "--all seeds",
        "seed": 5,
    }
    assert {name: flat[name] for name in expected} == expected


SCRIPTS_THAT_TRAIN = ("train", "multi_node", "quickstart")


def told(script: str, flags: str = "", *, recorder: dict, **settings: str) -> Config:
    """What a script has the trainer do."""
    Path(recorder["CALLS"]).unlink(missing_ok=True)
    (call,) = run_script(f"bash launch/{script}.sh {flags}", recorder, **settings)
    words = split_launch(call)[1] if call[0] == "accelerate" else call[3:]
    return parse_args([str(REPOSITORY / word) if word.endswith("quickstart.yaml") else word for word in words])


@pytest.fixture
def scripts(recorder):
    return partial(told, recorder=recorder)


@pytest.mark.parametrize("script", ["train", "multi_node"])
def test_use_wandb_means_the_same_in_every_script(scripts, script):
    used = {word: scripts(script, USE_WANDB=word).tracking.use_wandb for word in ("true", "1", "yes", "on", "True")}
    assert all(used.values()), used
    unused = {word: scripts(script, USE_WANDB=word).tracking.use_wandb for word in ("false", "0", "no", "off", "")}
    assert not any(unused.values()), unused
    with pytest.raises(UserError, match="use_wandb maybe: must be true or false"):
        scripts(script, USE_WANDB="maybe")


@pytest.mark.parametrize(
    ("script", "name", "settings", "folder"),
    [
        ("train", "jit-v1-bs32", {}, "runs/jit-v1-bs32"),
        ("train", "exp-b", {"WANDB_NAME": "exp-b"}, "runs/exp-b"),
        ("train", "a/b c", {"WANDB_NAME": "a/b c"}, "runs/a-b-c"),
        ("train", "exp-b", {"WANDB_NAME": "exp-b", "USE_WANDB": "1"}, "runs/exp-b"),
        ("train", "exp-b", {"WANDB_NAME": "exp-b", "OUTPUT_DIR": "out put"}, "out put"),
        ("multi_node", "multi_node", {}, "runs/multi_node"),
        ("multi_node", "exp-b", {"WANDB_NAME": "exp-b"}, "runs/exp-b"),
        ("multi_node", "big", {"OUTPUT_DIR": "/mnt/runs/big"}, "/mnt/runs/big"),
        ("quickstart", "quickstart", {}, "runs/quickstart"),
    ],
)
def test_another_name_is_another_folder(scripts, script, name, settings, folder):
    config = scripts(script, **settings)
    assert (config.tracking.wandb_name, run_folder(config), config.run.resume) == (name, folder, "auto")


@pytest.mark.parametrize("script", SCRIPTS_THAT_TRAIN)
def test_what_stands_behind_a_scripts_name_wins(scripts, script, tmp_path):
    config = scripts(
        script, "--max_steps 6 --seed=3 --resume none --no_horizontal_flip --wandb_name mine --use_wandb=no"
    )
    assert (config.optim.max_steps, config.optim.epochs, config.run.seed, config.run.resume) == (6, None, 3, "none")
    assert (config.data.horizontal_flip, config.tracking.wandb_name, config.tracking.use_wandb) == (
        False,
        "mine",
        False,
    )
    assert run_folder(config) == "runs/mine"
    config = scripts(script, "--epochs 2 --warmup_epochs=1")
    assert (config.optim.max_steps, config.optim.epochs, config.optim.warmup_steps) == (None, 2, None)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: JiT-S/8\nimg_size: 32\nmax_steps: 9\nbatch_size: 5\nlearning_rate: 1e-3\n")
    config = scripts(script, f"--config {recipe} --batch_size 6 --data_path=y")
    assert (config.model.model, config.data.img_size, config.optim.batch_size) == ("JiT-S/8", 32, 6)
    assert (config.optim.max_steps, config.optim.epochs, config.optim.learning_rate) == (9, None, 1e-3)


def test_the_guides_python_command_trains_as_train_sh_does(scripts):
    lines = (REPOSITORY / "docs" / "guide.md").read_text().splitlines()
    (command,) = [line for line in lines if line.startswith("python -m jit_accel.train") and "jit-v1-bs32" in line]
    by_hand = parse_args(shlex.split(command)[3:])
    by_script = scripts("train", USE_WANDB="true")
    facts = Facts(num_images=5_000, num_classes=10)
    ours, theirs = (complete(config, facts)[0].recorded() for config in (by_hand, by_script))
    assert ours | {"resume": "auto"} == theirs
    assert ours["learning_rate"] == 3e-4


def test_multi_node_sh_takes_its_ranks_from_slurm(recorder):
    slurm = {"SLURM_JOB_NUM_NODES": "4", "SLURM_NODEID": "3", "SLURM_GPUS_ON_NODE": "8", "BATCH_SIZE": "32"}
    (call,) = run_script("bash launch/multi_node.sh", recorder, MAIN_PROCESS_IP="10.0.0.7", **slurm)
    launch, flags = split_launch(call)
    assert (launch.num_machines, launch.num_processes, int(launch.machine_rank)) == (4, 32, 3)
    assert (launch.main_process_ip, launch.main_process_port) == ("10.0.0.7", 29500)
    assert plan_run(parse_args(flags).optim, Facts(IMAGENET_IMAGES, processes=32)).global_batch_size == 1024


def test_test_sh_checks_style_imports_and_tests(recorder):
    told = run_script("bash .ci/run", recorder, JIT_ACCEL_NO_APT="1")
    assert told[:3] == [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["lint-imports"]]
    assert told[3][:3] == ["python", "-m", "pytest"]


@pytest.mark.parametrize("failing", ["ruff", "lint-imports", "python"])
def test_test_sh_fails_loudly_when_a_check_fails(recorder, failing):
    program = Path(recorder["JIT_ACCEL_PYTHON"]).with_name(failing)
    program.write_text("#!/bin/sh\nexit 3\n")
    done = subprocess.run(
        ["bash", "launch/test.sh"], env=recorder, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert "FAILED" in done.stderr


def test_set_up_is_repeated_only_where_something_changed(tmp_path):
    """The parts of launch/common.sh, with an environment in which pip only notes that it was called."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "accelerate").write_text("#!/bin/sh\n")
    (venv / "bin" / "accelerate").chmod(0o755)
    python = venv / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$2" = pip ]; then echo "pip $*" >>{tmp_path}/calls; exit $(cat {tmp_path}/code); fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    (tmp_path / "code").write_text("0")
    repository = tmp_path / "repository"
    (repository / "launch").mkdir(parents=True)
    for name in ("setup.cfg", "constraints.txt", "launch/common.sh"):
        (repository / name).write_text((REPOSITORY / name).read_text())

    path: list[str] = []

    def set_up() -> tuple[int, int, str]:
        command = f"set -euo pipefail; source {repository}/launch/common.sh; set_up; command -v accelerate"
        environment = {k: v for k, v in os.environ.items() if k != "JIT_ACCEL_PYTHON"} | {"JIT_ACCEL_VENV": str(venv)}
        environment["PYTHONPATH"] = os.pathsep.join(path)
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
        log = tmp_path / "calls"
        return done.returncode, len(log.read_text().splitlines()) if log.exists() else 0, done.stdout + done.stderr

    code, installs, output = set_up()
    assert (code, installs) == (0, 2), output
    # This interpreter's torch was there before, and is kept in the version that is there.
    assert re.search(r"^torch \S+ \(\w+.* build, kept", output, re.MULTILINE), output
    assert f"torch=={metadata.version('torch')}" in (venv / "constraints.txt").read_text().splitlines()
    assert str(venv / "bin" / "accelerate") in output

    assert set_up()[:2] == (0, 2)  # nothing to do
    # From here on a torch that is quickly imported.
    (tmp_path / "quick" / "torch").mkdir(parents=True)
    (tmp_path / "quick" / "torch" / "__init__.py").write_text(
        "__version__ = '2'\nclass version:\n    cuda = hip = None\n"
    )
    path.append(str(tmp_path / "quick"))
    (repository / "constraints.txt").write_text((REPOSITORY / "constraints.txt").read_text() + "# changed\n")
    (tmp_path / "code").write_text("1")
    code, installs, output = set_up()
    assert (code, installs) == (1, 3)
    assert "pip could not install" in output
    (tmp_path / "code").write_text("0")
    assert set_up()[:2] == (0, 5)  # the interrupted installation is repeated
    assert set_up()[:2] == (0, 5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 1", "no Python >= 3.10 found"),
        # Debian's python3 without python3-venv
        (f'case "$2" in *ensurepip*) exit 1 ;; esac; exec {sys.executable} "$@"', "venv package"),
    ],
)
def test_set_up_says_what_is_missing_on_the_machine(tmp_path, body, message):
    for name in ("python3.13", "python3.12", "python3.11", "python3.10", "python3", "python"):
        program = tmp_path / name
        # Each claims to be its own base interpreter.
        claim = f'case "$2" in *_base_executable*) echo {program}; exit ;; esac\n' if "ensurepip" in body else ""
        program.write_text(f"#!/bin/sh\n{claim}{body}\n")
        program.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "JIT_ACCEL_PYTHON"}
    environment |= {"PATH": f"{tmp_path}:{environment['PATH']}", "JIT_ACCEL_VENV": str(tmp_path / "venv")}
    command = f"set -euo pipefail; source {REPOSITORY}/launch/common.sh; set_up"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr, done.stderr


# --- documented commands


def documented_commands() -> list[str]:
    """Every command in a bash block of the documentation, and in the comments of configurations and recipes."""
    found = []
    for page in ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in REPOSITORY.glob("docs/*.md"))):
        for block in re.findall(r"^```bash\n(.*?)^```", (REPOSITORY / page).read_text(), re.DOTALL | re.MULTILINE):
            found += re.sub(r"\\\n\s*", "", block).splitlines()
    for path in [*CONFIGS, *RECIPES, *SCRIPTS]:
        comments = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
        joined = re.sub(r"\\\n\s*", "", "\n".join(comments))
        found += re.findall(r"^  +(?:srun )?((?:\w+=\S+ )*(?:accelerate|python|bash) .*)$", joined, re.MULTILINE)
    return sorted({re.sub(r"\s+(#|\|\|).*", "", command) for command in found if command.strip()})


COMMANDS = documented_commands()


def test_the_commands_of_the_documentation_are_found():
    for start in ("python -m jit_accel.train", "accelerate launch", "bash launch/quickstart.sh", "bash launch/test.sh"):
        assert any(command.startswith(start) for command in COMMANDS), start


@pytest.mark.parametrize("command", COMMANDS)
def test_each_documented_command_runs(command, recorder, photos, tmp_path, monkeypatch):
    words = [word for word in shlex.split(command) if word != "..."]
    while re.match(r"\w+=", words[0]):
        words.pop(0)
    if words[:2] == ["pip", "install"]:
        # Installing is what set-up does; here only that the command names what exists.
        constraints = (REPOSITORY / words[words.index("-c") + 1]).read_text()
        extras = [extra for found in re.findall(r"\[(.*)\]", command) for extra in found.split(",")]
        assert set(extras) <= set(metadata.metadata("jit_accel").get_all("Provides-Extra"))
        assert extras or f"{words[words.index('--no-deps') + 1]}==" in constraints
    elif words[:3] == ["python", "-m", "jit_accel.convert"]:
        stand_in(monkeypatch)
        monkeypatch.chdir(tmp_path)
        source = Path(words[words.index("--input") + 1])
        if "--ema_width" in words:
            flags = ("--data_path", str(photos), "--output_dir", str(source), "--average_snapshots", "1")
            assert train_here(*flags) == 0
        else:
            make_source(source)
        assert convert(words[3:]) == 0
    elif words[:3] == ["python", "-m", "jit_accel.train"]:
        if "--push_to_hub" in words:
            stand_in(monkeypatch)
        try_here(completed(words[3:]), photos, tmp_path, monkeypatch)
    elif words[:2] == ["python", "benchmarks/loader.py"]:
        data = [str(photos) if before == "--data_path" else word for before, word in itertools.pairwise(words)]
        benchmark = runpy.run_path(str(REPOSITORY / "benchmarks" / "loader.py"))["main"]
        assert benchmark([*data[1:], "--seconds", "0.1", "--num_workers", "0", "--batch_size", "2"]) == 0
    elif words[:3] == ["python", "-m", "jit_accel.prepare"] and "--verify" in words:
        assert prepare(["--data_path", str(photos), "--output_dir", str(tmp_path / "made"), "--num_workers", "1"]) == 0
        assert prepare(["--verify", str(tmp_path / "made")]) == 0
    elif words[:3] == ["python", "-m", "jit_accel.prepare"]:
        small = ("--img_size", "16", "--num_workers", "1")
        places = ("--data_path", str(photos), "--output_dir", str(tmp_path / "prepared"))
        assert prepare([*words[3:], *small, *places]) == 0
    elif words[:3] == ["python", "-m", "jit_accel.sample"]:
        sample_a_little(words[3:], tmp_path)
    elif words[:3] == ["python", "-m", "jit_accel.evaluate"]:
        evaluate_a_little(words[3:], photos, tmp_path, monkeypatch)
    elif words[:3] == ["python", "-m", "jit_accel.compare"]:
        compare_nothing(words[3:], tmp_path, monkeypatch)
    elif words[:3] == ["python", "-m", "jit_accel.plan"]:
        assert plan(words[3:]) == 0
    elif words[:3] == ["python", "-m", "jit_accel.report"]:
        monkeypatch.chdir(tmp_path)
        for folder in report_arguments(words[3:]).folders:
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n')
        assert report(words[3:]) == 0
    elif words[0] in ("tensorboard", "trackio", "wandb"):
        program = Path(sys.executable).with_name(words[0])
        if not program.exists():
            pytest.skip(f"{words[0]} is not installed")
        part = [word for word in words[1:2] if not word.startswith("-")]
        told = subprocess.run([program, *part, "--help"], capture_output=True, text=True, check=True).stdout
        assert all(word in told for word in words if word.startswith("--"))
    elif words[0] == "accelerate" or words[0] == "bash":
        # An ellipsis stands for what the reader fills in.
        told = run_script(command.removesuffix(" ..."), recorder)
        for call in told:
            if call[0] == "accelerate" and "jit_accel.sample" in call:
                sample_a_little(validated_launch(call[2:]).training_script_args, tmp_path)
            elif call[0] == "accelerate" and "jit_accel.evaluate" in call:
                evaluate_a_little(validated_launch(call[2:]).training_script_args, photos, tmp_path, monkeypatch)
            elif call[0] == "accelerate":
                try_here(completed(split_launch(call)[1]), photos, tmp_path, monkeypatch)
            elif call[:3] == ["python", "-m", "jit_accel.train"]:
                try_here(completed(call[3:]), photos, tmp_path, monkeypatch)
        assert told
    else:
        pytest.fail(f"no rule for running {command!r}: add one to this test")


def without(words: list[str], *flags: str) -> list[str]:
    """These words but for some flags and their values, such as those that choose an average, which a pipeline lacks."""
    return [word for before, word in itertools.pairwise(["", *words]) if not {before, word} & {*flags}]


def compare_nothing(flags: list[str], tmp_path: Path, monkeypatch) -> None:
    """Run `jit_accel.compare` with these flags; each of its runs does nothing but check its own."""

    def check_flags(command: list[str], log: Path, stop) -> int:
        program, flags = command[2], command[3:]
        if program == "jit_accel.train":
            parse_args(flags)
            return 0
        output = next(Path(flag.partition("=")[2]) for flag in flags if flag.startswith("--output="))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps([{"metrics": {"fid": 1.0, "fd_efficientnet_lite0": 1.0}}]))
        return 0

    monkeypatch.setattr(comparison, "run_command", check_flags)
    flags[flags.index("--output_dir") + 1] = str(tmp_path / "compared")
    assert compare(flags) == 0


def sample_a_little(flags: list[str], tmp_path: Path) -> None:
    """Run `jit_accel.sample` with these flags, but few images of a tiny model."""
    network = load_golden("tiny").model()
    if "--condition_path" in flags:
        sizes = {name: size for name, size in network.config.items() if not name.startswith("_")}
        network = type(network)(**sizes | {"condition_channels": 3})
        flags[flags.index("--condition_path") + 1] = "builtin:fashion_mnist_test"
        flags = [*flags, "--num_images", "2"]
    JiTPipeline(network, JiTScheduler()).save_pretrained(tmp_path / "model")
    counts = {"--images_per_class": "1", "--num_images": "2"}
    words = [counts.get(before, word) for before, word in itertools.pairwise(["", *flags])]
    words = without(words, "--ema", "--ema_width")
    small = ("--num_inference_steps", "1", "--mixed_precision", "no")
    places = ("--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "samples"))
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    with patch_environment(ACCELERATE_USE_CPU="true"):
        assert sample([*words, *small, *places]) == 0


def make_source(path: Path) -> None:
    """What a documented conversion takes, with a small network: a checkpoint of the paper's code, or a pipeline."""
    checkpoint = path if path.suffix == ".pth" else path.with_suffix(".pth")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    weights = build_model("JiT-XS/16", img_size=64, num_classes=1000).state_dict()
    named = {f"net.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": named, "model_ema1": named, "model_ema2": named}, checkpoint)
    if path != checkpoint:
        assert convert(["--input", str(checkpoint), "--output", str(path), "--img_size", "64"]) == 0


def evaluate_a_little(flags: list[str], photos: Path, tmp_path: Path, monkeypatch) -> None:
    """Run `jit_accel.evaluate` with these flags, but on few images, and with features that cost nothing."""
    for name in list(LOADERS):
        monkeypatch.setitem(LOADERS, name, load_toy)
    monkeypatch.chdir(tmp_path)
    shown = {"condition_channels": 3} if "--pairs" in flags else {}
    network = build_model("JiT-XS/7", img_size=28, num_classes=10 if shown else 2, **shown)
    JiTPipeline(network, JiTScheduler()).save_pretrained("model")
    if shown:
        flags = [*flags, "--condition_from", "downscale:4"]
    places = {"--model": "model", "--reference": str(photos), "--images": str(photos), "--num_images": "2"}
    if "--held_out" in flags:
        places["--held_out"] = str(image_folder(tmp_path / "held_out", 4))
    words = [places.get(before, word) for before, word in itertools.pairwise(["", *flags])]
    words = ["1,2" if re.fullmatch(r"[\d.]+:[\d.]+:[\d.]+", word) else word for word in words]
    words = without(words, "--ema", "--ema_width", "--held_out_split")
    small = ["--img_size", "28", "--mixed_precision", "no"]
    if "--model" in words:
        small += ["--num_inference_steps", "1", "--num_images", "2"]
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    with patch_environment(ACCELERATE_USE_CPU="true"):
        assert evaluate([*words, *small]) == 0


def names_in(page: str) -> set[str]:
    """Flags, metrics, variables and files that a page has in code type, outside blocks."""
    text = re.sub(r"^```.*?^```", "", (REPOSITORY / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"[\w./-]*\w", code)}


def test_the_guides_to_watching_a_run_name_the_same_things_and_none_that_is_not():
    names = names_in("docs/monitoring.md")
    assert names == names_in("docs/monitoring.zh.md")
    not_ours = {"config", "relogin", "include-online", "output", "make_reference", "no-deps"}  # others
    flags = {name.removeprefix("--") for name in names if name.startswith("--")}
    assert flags - not_ours - {"no_html_report"} <= set(SETTINGS)
    assert {name.removeprefix("health/") for name in names if name.startswith("health/")} >= set(KINDS)
    thresholds = {field.name: field.default for field in fields(HealthConfig)}
    guide = (REPOSITORY / "docs/monitoring.md").read_text()
    assert all(f"`--{name} {value:g}`" in guide for name, value in thresholds.items())


def completed(flags: list[str]) -> list[str]:
    """With a data path, where the command leaves that to the reader."""
    has_data = "--data_path" in flags or any(flag.endswith("quickstart.yaml") for flag in flags)
    return flags if has_data else [*flags, "--data_path", "photos"]


def test_the_python_code_of_the_readme_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    recipe = REPOSITORY / "launch/recipes/quickstart.yaml"
    short = ["--max_steps", "1", "--warmup_steps", "0", "--batch_size", "2", "--num_inference_steps", "1"]
    short += ["--num_workers", "0", "--mixed_precision", "no", "--no_html_report"]
    assert train_exactly("--config", str(recipe), "--output_dir", "runs/quickstart", *short) == 0
    exec(compile(code, "README.md", "exec"), {})
    assert Image.open(tmp_path / "sample.png").size == (28, 28)


# --- for real


def run_really(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, "JIT_ACCEL_PYTHON": sys.executable, "ACCELERATE_USE_CPU": "true", **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.multiprocess
def test_quickstart_sh_ends_by_naming_its_files_and_costs_nothing_again(recorder, tmp_path, monkeypatch, capsys):
    short = ["--max_steps", "2", "--warmup_steps", "1", "--batch_size", "4", "--num_inference_steps", "1"]
    short += ["--num_workers", "0", "--no_html_report"]
    command = ["bash", "launch/quickstart.sh", *short, "--output_dir", str(tmp_path / "run")]
    output = run_really(*command)
    named = re.findall(r"^(?:Samples|Loss curve|Pipeline): +(.*)$", output, re.MULTILINE)
    assert [Path(path).exists() for path in named] == [True] * 3
    ages = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.suffix in (".png", ".json")}
    # The script once more, but what it starts runs here.
    (flags,) = (call[3:] for call in run_script(shlex.join(command), recorder) if "jit_accel.train" in call)
    monkeypatch.chdir(REPOSITORY)
    assert train_exactly(*flags) == 0
    again = capsys.readouterr().out
    assert re.findall(r"^(?:Samples|Loss curve|Pipeline): +(.*)$", again, re.MULTILINE) == named
    assert {path: path.stat().st_mtime_ns for path in ages} == ages


@pytest.mark.multiprocess
def test_cpu_2_processes_yaml_starts_two_processes():
    output = run_really(
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1"),
        *("--config_file", "accelerate_configs/cpu_2_processes.yaml", "-m", "jit_accel.train", "--dry_run"),
        *("--data_path", "builtin:fashion_mnist", "--model", "JiT-Ti/7", "--img_size", "28", "--num_workers", "0"),
    )
    assert "Device: 2 x cpu" in output
    assert output.count("Dry run: loss") == 1


@pytest.mark.multiprocess
def test_multi_node_sh_runs_on_one_node_of_one_process(photos, tmp_path):
    output = run_really(
        *("bash", "launch/multi_node.sh", "--dry_run", "--model", "JiT-Ti/64", "--no_compile", "--num_workers", "0"),
        *("--mixed_precision", "no", "--gradient_accumulation_steps", "1"),
        NUM_MACHINES="1",
        GPUS_PER_NODE="1",
        MACHINE_RANK="0",
        MAIN_PROCESS_PORT="0",
        DATA_PATH=str(photos),
        BATCH_SIZE="2",
        OUTPUT_DIR=str(tmp_path / "run"),
    )
    assert "Device: 1 x cpu" in output
    assert "Dry run: loss" in output
