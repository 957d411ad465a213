"""A setting means the same behind its flag, joined to it, and in a file, however its words are written."""

import contextlib
import gc
import importlib
import sys
from pathlib import Path

import pytest
import yaml

from jit_accel.base.errors import UserError
from jit_accel.config.command_line import importing_torch, parse_args, parse_flags, read_recipe
from jit_accel.config.settings import SETTINGS
from jit_accel.convert.settings import ConvertConfig
from jit_accel.evaluate.settings import EvaluateConfig
from jit_accel.prepare.settings import PrepareConfig
from jit_accel.sample.settings import SampleConfig


def parse(*flags):
    return parse_args(["--data_path", "x", *flags]).flat()


# A value of each kind of setting, as words and as what they mean.
VALUES = [
    *((f"use_wandb {word}", True) for word in ("true", "True", "yes", "on", "1")),
    *((f"horizontal_flip {word}", False) for word in ("false", "FALSE", "no", "off", "0")),
    ("no_horizontal_flip true", ("horizontal_flip", False)),
    ("no_use_wandb false", ("use_wandb", True)),
    ("adam_betas 0.9,0.99", [0.9, 0.99]),
    ("adam_betas 0.9, 0.99", [0.9, 0.99]),
    ("adam_betas 0.9 0.99", [0.9, 0.99]),
    ("adam_betas (0.9, 0.99)", [0.9, 0.99]),
    ("adam_betas [0.9, 0.99]", [0.9, 0.99]),
    ("ema_decays 0.9996,0.9999", ["0.9996", "0.9999"]),
    ("ema_decays auto 0.99990", ["auto", "0.99990"]),
    ("ema_decays ['auto', '0.9996']", ["auto", "0.9996"]),
    ("ema_decays 0.5", ["0.5"]),
    ("ema_decays None", None),
    ("ema_decays ", None),
    ("wandb_tags ", []),
    ("wandb_tags a,b", ["a", "b"]),
    ("wandb_tags two words, small", ["two words", "small"]),
    ("wandb_tags ['two words', 'a, b']", ["two words", "a, b"]),
    ("wandb_tags (old), new", ["(old)", "new"]),
    ("wandb_tags (old)", ["(old)"]),
    ("wandb_tags no", ["no"]),
    ("wandb_tags -x", ["-x"]),
    ("lora_targets attn.qkv,mlp.w3 --lora_rank=4 --init_from=y", ["attn.qkv", "mlp.w3"]),
    ("report_to tensorboard,mlflow", ["tensorboard", "mlflow"]),
    ("batch_size 64.0", 64),
    ("max_steps 1e5", 100_000),
    ("max_steps 30_000", 30_000),
    ("seed 007", 7),
    ("learning_rate 1e-4", 1e-4),
    ("learning_rate none", None),
    ("num_workers null", None),
    ("P_mean -1e-1", -0.1),
    ("mixed_precision no", "no"),
    ("mixed_precision off", "no"),
    ("mixed_precision False", "no"),
    ("mixed_precision none", None),
    ("streaming True", "true"),
    ("streaming off", "false"),
    ("resume true", "auto"),
    ("resume no", "none"),
    ("resume None", "none"),
    ("holdout off", 0.0),
    ("holdout None", 0.0),
    ("wandb_watch False", None),
    ("report_to none", []),
    ("wandb_tags None", []),
    ("wandb_tags none", ["none"]),
    ("wandb_project None", "jit-diffusion"),
    ("batch_size None", 32),
    ("adam_betas None", [0.9, 0.95]),
    ("seed 0x10", 16),
    ("resume runs/a", "runs/a"),
    ("wandb_name no", "no"),
    ("wandb_name 1e-4", "1e-4"),
    ("wandb_name a, b", "a, b"),
    ("wandb_name None", None),
    ("wandb_notes -a --b", "-a --b"),
]


@pytest.mark.parametrize(("text", "meant"), VALUES)
def test_the_words_of_a_setting_mean_the_same_joined_to_its_flag_and_behind_it(text, meant):
    flag, *more = text.split(" --")
    if "--b" in text:
        flag, more = text, []
    name, _, words = flag.partition(" ")
    name_meant, value = meant if isinstance(meant, tuple) else (name, meant)
    more = [f"--{each}" for each in more]
    assert parse(f"--{name.replace('_', '-')}={words}", *more)[name_meant] == value
    assert parse(f"--{name}", words, *more)[name_meant] == value


def test_every_setting_takes_its_value_joined_to_its_flag():
    defaults = parse()
    words = {n: ",".join(map(str, value)) if isinstance(value, list) else str(value) for n, value in defaults.items()}
    assert parse(*(f"--{name}={text}" for name, text in words.items())) == defaults


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_wandb=maybe"], r"^use_wandb maybe: must be true or false"),
        (["--no_use_wandb=maybe"], r"use_wandb maybe: must be true or false"),
        (["--use_wandb", "true", "false"], r"^use_wandb true false: must be true or false"),
        (["--no_batch_size"], r"^--no_batch_size: no such flag"),
        (["--use-wand=true"], r"^--use-wand=true: no such flag. Did you mean '--use_wandb'"),
        (["--config"], r"^config: no file behind it"),
        (["--config="], r"^config: no file behind it"),
        (["--", "stray"], r"^stray: stands behind no flag"),
    ],
)
def test_words_that_mean_nothing_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse(*flags)


@pytest.mark.parametrize(
    "flags",
    [
        *(["--batch_size=3.5"], ["--adam_betas=0.9"], ["--max_steps=1e-4"], ["--mixed_precision=on"], ["--seed"]),
        ["--learning_rate=fast"],
    ],
)
def test_words_of_another_type_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert flags[0].split("=")[0] in printed
    assert "(default: None)" not in printed


@pytest.mark.parametrize(
    ("settings", "flags", "meant"),
    [
        (SampleConfig, "--grid=true --compile=no --classes=cat,dog", {"grid": True, "compile": False}),
        (SampleConfig, "--guidance_interval=0.1,0.9 --num_images=10.0", {"guidance_interval": (0.1, 0.9)}),
        (SampleConfig, "--guidance_interval 0.1 0.9", {"guidance_interval": (0.1, 0.9)}),
        (SampleConfig, "--mixed_precision=off --seed=none", {}),
        (EvaluateConfig, "--write_best=false --metrics=fid,kid", {"write_best": False, "metrics": ("fid", "kid")}),
        (EvaluateConfig, "--ema all --unguided false", {"ema": ("all",), "unguided": False}),
        (PrepareConfig, "--img_size=64 --quality=None --format=webp", {"img_size": 64, "quality": None}),
        (ConvertConfig, "--input=a --overwrite=yes --push_to_hub=off", {"overwrite": True}),
    ],
)
def test_the_other_programs_read_their_flags_alike(settings, flags, meant):
    if "seed=none" in flags:
        with pytest.raises(SystemExit):
            parse_flags(settings, flags.split(), "test")
        return
    found = vars(parse_flags(settings, flags.split(), "test"))
    assert meant.items() <= found.items()
    assert found.get("classes", ()) in ((), ("cat,dog",))  # names may have commas: they are cut where they are known


# --- files


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("wandb_name: no", "no"),
        ("wandb_name: off", "off"),
        ("wandb_name: 1e-4", "1e-4"),
        ("wandb_name: 010", "010"),
        ("wandb_name: 12:30", "12:30"),
        ("wandb_name: 2026-01-02", "2026-01-02"),
        ("wandb_name: 1.10", "1.10"),
        ("wandb_name: 0x1F", "0x1F"),
        ("wandb_name: !!int 5", "5"),
        ("wandb_name: null", None),
        ("wandb_name: ~", None),
        ("wandb_name:", None),
        ("wandb_tags: [on, 2026-01-02, 1.10, ja]", ["on", "2026-01-02", "1.10", "ja"]),
        ("wandb_tags: no", ["no"]),
        ("wandb_tags: a, b", ["a", "b"]),
        ("wandb_tags: []", []),
        ("mixed_precision: no", "no"),
        ("mixed_precision: off", "no"),
        ("mixed_precision: false", "no"),
        ("mixed_precision: 'no'", "no"),
        ("streaming: no", "false"),
        ("streaming: off", "false"),
        ("streaming: yes", "true"),
        ("resume: no", "none"),
        ("report_to: no", []),
        ("report_to: none", []),
        ("max_steps: off", None),
        ("lora_rank: no", None),
        ("learning_rate: off", None),
        ("max_grad_norm: off", 0.0),
        ("sample_every_steps: no", 0),
        ("holdout: off", 0.0),
        ("use_wandb: on", True),
        ("use_wandb: 'off'", False),
        ("horizontal_flip: No", False),
        ("learning_rate: 1e-4", 1e-4),
        ("learning_rate: 1e-4 # a comment", 1e-4),
        ("learning_rate: '3e-4'", 3e-4),
        ("learning_rate: null", None),
        ("max_steps: 1e5", 100_000),
        ("max_steps: 30_000", 30_000),
        ("batch_size: 64.0", 64),
        ("seed: 010", 10),
        ("P_mean: -8e-1", -0.8),
        ("adam_betas: [0.9, 95e-2]", [0.9, 0.95]),
        ("adam_betas: (0.9, 0.95)", [0.9, 0.95]),
        ("ema_decays: [auto, 0.9990]", ["auto", "0.9990"]),
        ("ema_decays: auto, 0.9996", ["auto", "0.9996"]),
        ("ema_decays: auto", ["auto"]),
        ("label_column: off", "off"),
        ("data_path: 2024", "2024"),
    ],
)
def test_a_file_says_what_it_seems_to_say(recipe, line, meant):
    file = recipe(line if line.startswith("data_path") else f"data_path: x\n{line}\n")
    assert parse_args(["--config", file]).flat()[line.partition(":")[0]] == meant


def test_a_file_and_the_flags_with_its_words_give_the_same(recipe):
    lines = {"epochs": "1e2", "use_wandb": "no", "wandb_tags": "[on, b c]", "streaming": "off", "holdout": "2e-2"}
    file = recipe("data_path: x\n" + "".join(f"{name}: {words}\n" for name, words in lines.items()))
    assert parse_args(["--config", file]).flat() == parse(*(f"--{name}={words}" for name, words in lines.items()))


@pytest.mark.parametrize("line", ["model: [[a]]", "batch_size: {a: 1}", "use_wandb: [true, false]", "use_wandb: null"])
def test_values_that_are_none_name_the_file(recipe, line):
    with pytest.raises(UserError, match=r"^config .*run.yaml: "):
        parse_args(["--config", recipe(f"data_path: x\n{line}\n")])


# --- what wins


def test_a_flag_wins_over_what_says_the_same_in_a_file(recipe):
    file = recipe("data_path: x\nmax_steps: 30000\nwarmup_steps: 1000\nbase: paper.yaml\n")
    recipe("epochs: 600\nwarmup_epochs: 5\nseed: 3\n", "paper.yaml")
    settings = parse_args(["--config", file]).flat()
    assert [settings[name] for name in ("epochs", "max_steps", "warmup_epochs", "warmup_steps")] == [
        *(None, 30000, None, 1000)
    ]
    settings = parse_args(["--config", file, "--epochs=3", "--warmup_epochs", "1"]).flat()
    assert [settings[name] for name in ("epochs", "max_steps", "warmup_epochs", "warmup_steps", "seed")] == [
        *(3.0, None, 1.0, None, 3)
    ]
    with pytest.raises(UserError, match="give only one"):  # of two flags neither is meant less
        parse_args(["--config", file, "--epochs=3", "--max_steps=5"])
    taken_back = recipe("base: run.yaml\nseed: ~\nwandb_tags: null\n", "taken_back.yaml")
    assert parse_args(["--config", taken_back]).flat() == parse_args(["--config", file]).flat() | {"seed": 0}
    open_again = recipe("base: run.yaml\nmax_steps: null\nepochs: null\n", "open.yaml")
    assert (parse_args(["--config", open_again]).optim.max_steps, parse_args(["--config", open_again]).run.seed) == (
        None,
        3,
    )


def test_a_warm_up_of_a_file_gives_way_to_a_shorter_run_on_the_command_line(recipe):
    file = recipe("data_path: x\nmax_steps: 1100\nwarmup_steps: 55\n")
    assert parse_args(["--config", file, "--max_steps", "20"]).optim.warmup_steps is None
    assert parse_args(["--config", file, "--max_steps", "2000"]).optim.warmup_steps == 55
    with pytest.raises(UserError, match="must not be longer than the run"):
        parse_args(["--config", file, "--max_steps", "20", "--warmup_steps", "21"])


def test_what_stands_behind_two_dashes_wins(recipe):
    file = recipe("batch_size: 7\nmodel: JiT-S/8\nmax_steps: 9\n")
    script = ["--data_path=x", "--model=JiT-B/4", "--img_size=64", "--epochs=100", "--batch_size=32", "--use_wandb=on"]
    assert parse_args([*script, "--"]) == parse_args(script)
    settings = parse_args([*script, "--", "--max_steps", "6", "--no_use_wandb"]).flat()
    assert (settings["epochs"], settings["max_steps"], settings["use_wandb"]) == (None, 6, False)
    settings = parse_args([*script, "--", "--config", file, "--batch_size=8"]).flat()
    expected = {"model": "JiT-S/8", "img_size": 64, "max_steps": 9, "epochs": None, "batch_size": 8}
    assert {name: settings[name] for name in expected} == expected
    other = recipe("batch_size: 5\n", "other.yaml")  # a second file takes the place of the first
    settings = parse_args(["--config", file, "--data_path=x", "--", "--config", other]).flat()
    assert (settings["batch_size"], settings["model"], settings["max_steps"]) == (5, None, None)


def test_a_recipe_is_read_as_the_text_that_it_is(recipe):
    text = "model: JiT-B/4\nwandb_tags: [a, no]\nlearning_rate: 1e-4\nepochs: null\n"
    found = read_recipe(Path(recipe(text)))
    assert found == {
        "model": ["JiT-B/4"],
        "wandb_tags": ["a", "no"],
        "learning_rate": ["1e-4"],
        "epochs": ["None"],
    }
    assert set(yaml.safe_load(text)) <= set(SETTINGS)


def test_the_first_import_of_torch_is_not_searched_for_garbage_and_a_later_one_changes_nothing(monkeypatch):
    before = gc.get_freeze_count()
    with importing_torch():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with pytest.raises(ImportError), importing_torch():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
    gc.disable()
    try:
        with importing_torch():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("train", "--data_path x"),
        ("sample", "--model x --output_dir y"),
        ("evaluate", "--model x --reference y"),
        ("prepare", "--data_path x --output_dir y"),
        ("convert", "--input x --output y"),
        ("plan", "--gpu H100"),
    ],
)
def test_every_program_imports_torch_without_a_search_for_garbage(program, flags, monkeypatch, capsys):
    @contextlib.contextmanager
    def noticed():
        raise UserError("seen")
        yield

    monkeypatch.setattr(f"jit_accel.{program}.importing_torch", noticed)
    assert importlib.import_module(f"jit_accel.{program}").main(flags.split()) == 2
    assert "error: seen" in capsys.readouterr().err
