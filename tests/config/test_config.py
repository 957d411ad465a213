import importlib
import itertools
import re
import subprocess
import sys

import pytest
import yaml

from jit_accel.base.errors import UserError
from jit_accel.config.command_line import parse_args
from jit_accel.config.completion import complete, plan_run, rate_in_words
from jit_accel.config.facts import Facts, Start
from jit_accel.config.groups import DataConfig
from jit_accel.config.identity import run_folder
from jit_accel.config.settings import SETTINGS, Config, write_config
from jit_accel.monitor.health import KINDS


def parse(*flags):
    return parse_args(["--data_path", "x", *flags])


def completed(config, **facts):
    """The completed settings, the plan and the warnings for 5,000 images of ten classes."""
    accumulation = config.optim.gradient_accumulation_steps or 1
    return complete(config, Facts(**{"num_images": 5000, "num_classes": 10, "accumulation": accumulation} | facts))


def resolved(config, **facts):
    return completed(config, **facts)[:2]


def test_guidance_follows_the_data_unless_it_is_given():
    guidance = [resolved(parse(*flags), is_labelled=labelled)[0].sample.guidance_scale
                for flags in ((), ("--guidance_scale", "3")) for labelled in (True, False)]  # fmt: skip
    assert guidance == [2.0, 1.0, 3.0, 3.0]


def test_defaults_are_the_papers_objective():
    config = parse()
    objective = config.objective
    assert (objective.prediction, objective.loss_space) == ("x", "v")
    assert (objective.P_mean, objective.P_std, objective.t_eps) == (-0.8, 0.8, 0.05)
    assert objective.label_drop_prob == 0.1


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    # 1e-4 without a dot is text to YAML; it must be a number here all the same.
    file.write_text(
        "data_path: x\nbatch_size: 7\nlearning_rate: 1e-4\nema_decays: [auto, 0.99]\nhorizontal_flip: false\n"
    )
    config = parse_args(["--config", str(file), "--batch_size", "9"])
    assert config.optim.batch_size == 9
    assert config.optim.learning_rate == 1e-4
    assert config.optim.ema_decays == ("auto", "0.99")
    assert config.data.horizontal_flip is False
    assert resolved(config)[0].model.model == "JiT-B/16"


def test_recorded_configuration_reads_back_as_itself(tmp_path):
    config, _ = resolved(parse("--model", "JiT-S/8", "--use_wandb", "--streaming", "false", "--max_steps", "50"))
    write_config(config.recorded(), tmp_path / "config.yaml")
    assert parse_args(["--config", str(tmp_path / "config.yaml")]) == config
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())) == set(SETTINGS)


def test_each_setting_has_one_name():
    config = Config(DataConfig("x"))
    assert len(config.flat()) == len(SETTINGS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--modle", "JiT-B/4"], r"--modle: no such flag. Did you mean '--model'"),
        (["--model", "JiT-Q/4"], r"model JiT-Q: unknown; choose from JiT-Ti, JiT-S, JiT-B"),
        (["--model", "JiT-B"], r"model JiT-B: .*add the patch size"),
        (["--model", "JiT-B/16", "--img_size", "250"], r"img_size 250: must be a multiple .* 16 .*use 240 or 256"),
        (["--in_channels", "0"], r"in_channels 0: must be at least 1"),
        (["--epochs", "2", "--max_steps", "3"], r"epochs 2.0: says the same as --max_steps 3: give only one"),
        (["--warmup_epochs", "2", "--warmup_steps", "3"], r"give only one"),
        (["--epochs", "2", "--warmup_epochs", "3"], r"warmup_epochs 3.0: must not be longer .*shorten"),
        (["--learning_rate", "0"], r"learning_rate 0: must be positive"),
        (["--learning_rate", "nan"], r"learning_rate nan: must be positive"),
        (["--push_to_hub"], r"push_to_hub: needs .*add --hub_model_id owner/name"),
        (["--hub_model_id", "a/b"], r"hub_model_id a/b: .*add --push_to_hub"),
        (["--push_to_hub", "--hub_model_id", "flowers"], r"hub_model_id flowers: must be owner/name"),
        (["--push_to_hub", "--hub_model_id", "a/b--c"], r"no -- or \.\."),
        (["--push_to_hub", "--hub_model_id=a/.b"], r"must be owner/name"),
        (["--wandb_tags", "a", ""], r"wandb_tags a : W&B wants 1 to 64 characters a tag: shorten ''"),
        (["--wandb_tags", "x" * 65], r"1 to 64 characters"),
        (["--wandb_watch", "all"], r"wandb_watch all: says what is sent to W&B, but nothing is: add --use_wandb"),
        (["--wandb_log_model"], r"wandb_log_model: says what is sent to W&B"),
        (["--use_wandb", "--wandb_aliases", "best"], r"wandb_aliases best: .* add --wandb_log_model"),
        (["--use_wandb", "--wandb_log_model", "--wandb_aliases", "a/b"], r"neither / nor : in it"),
        (["--wandb_project", "team/faces"], r"wandb_project team/faces: must have .* --wandb_entity"),
        (["--health_max_wait", "5"], r"health_max_wait 5: must be a share"),
        (["--learning_rate", "1e-4", "--min_learning_rate", "1"], r"must not be above --learning_rate"),
        (["--label_drop_prob", "1.5"], r"label_drop_prob 1.5: must be a probability"),
        (["--ema_decays", "auto", "1.0"], r"ema_decays auto 1.0: each must be auto or a number in \[0, 1\)"),
        (["--ema_decays", "often"], r"ema_decays often"),
        (["--batch_size", "0"], r"batch_size 0: must be at least 1"),
        (["--t_eps", "0"], r"t_eps 0: must"),
        (["--config", "missing.yaml"], r"^config missing.yaml: cannot be read"),
    ],
)
def test_wrong_settings_are_named_with_their_remedy(flags, message):
    with pytest.raises(UserError, match=message):
        parse(*flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: JiT-B/4\n", r"modle is no setting. Did you mean 'model'"),
        ("use_wandb: maybe\n", r"use_wandb: maybe must be true or false"),
        ("- a\n- b\n", r"must hold `setting: value` lines"),
        ("a: [\n", r"not valid YAML"),
        ("model: {size: B}\n", r"model must be a plain value"),
    ],
)
def test_wrong_files_are_named_with_their_remedy(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse("--config", str(tmp_path / "run.yaml"))


def test_every_way_of_writing_a_switch_in_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("data_path: x\nstreaming: true\nuse_wandb: yes\n")
    config = parse_args(["--config", str(tmp_path / "run.yaml")])
    assert (config.data.streaming, config.tracking.use_wandb) == ("true", True)


@pytest.mark.parametrize("flags", [["--batch_size", "many"], ["--prediction", "z"], ["--mixed_precision", "fp8"]])
def test_values_of_a_wrong_type_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_help_needs_no_torch_and_shows_every_setting():
    code = (
        "import sys, jit_accel.train\n"
        "try: jit_accel.train.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'datasets', 'diffusers', 'accelerate', 'wandb'} & set(sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert [name for name in SETTINGS if f"--{name}" not in shown] == []


PROGRAMS = ("train", "sample", "evaluate", "prepare", "convert", "report", "plan")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_says_in_words_what_an_open_setting_comes_to(program, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"jit_accel.{program}").main(["--help"])
    assert stop.value.code == 0
    _, *flags = re.split(r"\n\W{2}--(?=[a-z])", capsys.readouterr().out)
    assert flags
    for flag in flags:
        words = " ".join(flag.replace("│", " ").split())
        assert re.search(r"\(default: |[Rr]equired", words), words
        assert not re.search(r"default: (None)?\)", words), words


def test_size_defaults_to_sixteen_patches_and_noise_to_the_papers_scale():
    for model, size, noise in (
        ("JiT-B/4", 64, 1.0),
        ("JiT-B/16", 256, 1.0),
        ("JiT-B/32", 512, 2.0),
        ("JiT-B/64", 1024, 4.0),
    ):
        config, _ = resolved(parse("--model", model))
        assert (config.data.img_size, config.objective.noise_scale) == (size, noise)


IMAGENET = {"num_images": 1_281_167, "num_classes": 1000}


def test_the_rate_of_a_long_run_is_the_papers_whatever_the_batch():
    config, plan = resolved(parse("--batch_size", "128", "--gradient_accumulation_steps", "2"), processes=4, **IMAGENET)
    assert plan.global_batch_size == 1024
    assert config.optim.learning_rate == pytest.approx(2e-4)
    config, plan = resolved(parse("--batch_size", "32"), **IMAGENET)
    assert config.optim.learning_rate == pytest.approx(6.25e-6)


SHORT = ("--batch_size", "32", "--epochs", "100")  # the guide's example, of 5,000 images here


@pytest.mark.parametrize(
    ("flags", "facts", "rate"),
    [
        (SHORT, {}, 3e-4),
        ((*SHORT, "--optimizer", "muon"), {}, 1e-3),
        (("--batch_size", "512", "--epochs", "100"), {"processes": 4}, 4e-4),  # the rule's, which is higher
        (("--epochs", "10"), IMAGENET, 3e-4),
        ((*SHORT, "--init_from", "runs/a"), {"saved": {"model": "JiT-B/4", "img_size": 64}}, 1e-4),
        ((*SHORT, "--init_from", "runs/a", "--lora_rank", "4"), {"saved": {"model": "JiT-B/4", "img_size": 64}}, 1e-4),
        (SHORT, {"saved": {"learning_rate": 6.25e-6}}, 6.25e-6),  # a run that goes on keeps its rate
        ((*SHORT, "--learning_rate", "2e-5"), {"saved": {"learning_rate": 6.25e-6}}, 2e-5),
    ],
)
def test_the_rate_of_a_short_run_is_one_that_works(flags, facts, rate):
    config, _ = resolved(parse(*flags), **facts)
    assert config.optim.learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("flags", "facts", "words"),
    [
        (SHORT, {}, "0.0003 (the default below 50,000,000 images; the paper's rule would give 6.25e-06)"),
        ((), IMAGENET, "6.25e-06 (the paper's rule, 5e-5 x global batch / 256)"),
        ((*SHORT, "--learning_rate", "1e-3"), {}, "0.001"),
    ],
)
def test_what_rate_was_chosen_is_said_with_the_reason(flags, facts, words):
    given = parse(*flags)
    config, plan = resolved(given, **facts)
    assert rate_in_words(given, config, plan, is_resumed=False) == words
    if not given.optim.learning_rate:
        assert rate_in_words(given, config, plan, is_resumed=True).endswith("(as before)")


def test_no_warning_recommends_a_rate_that_is_not_above_the_one_that_is_set():
    for optimizer, rate, steps in itertools.product(("adamw", "muon"), (1e-5, 2.9e-4, 3e-4, 1e-3, 0.02), (1, 60, 900)):
        flags = ("--optimizer", optimizer, "--learning_rate", str(rate), "--max_steps", str(steps))
        *_, warnings = completed(parse(*flags))
        named = [float(number) for text in warnings for number in re.findall(r"--learning_rate ([\d.e-]+\d)", text)]
        assert all(number > rate for number in named), (flags, warnings)
        assert not any("--epochs" in text for text in warnings)
        is_slow = rate * steps < 0.3
        assert is_slow == any("hardly move the weights" in text for text in warnings)
        assert not is_slow or rate >= 3e-4 or named
    assert not any(re.search(r"\de-\d|\d\.\d", kind.remedy) for kind in KINDS.values())  # nor do the signs of trouble


def test_a_warm_up_in_another_unit_that_does_not_fit_is_cut_and_said():
    config, plan, warnings = completed(parse("--max_steps", "20", "--warmup_epochs", "5"))
    assert (plan.warmup_steps, config.optim.warmup_steps, config.optim.warmup_epochs) == (2, 2, None)
    assert any("takes 781 steps, and the run only 20: it is 2 steps now (--warmup_steps" in text for text in warnings)


def test_epochs_become_optimizer_steps():
    plan = plan_run(parse("--epochs", "3", "--batch_size", "32").optim, Facts(num_images=1000, processes=2))
    assert plan.total_steps == 47  # 3000 images in batches of 64
    assert plan.epoch_of(47) == pytest.approx(3.008)
    assert plan.warmup_steps == 5  # a tenth of the run, since five epochs would be more


def test_warmup_in_epochs():
    plan = plan_run(parse("--epochs", "100", "--warmup_epochs", "5").optim, Facts(num_images=3200))
    assert plan.warmup_steps == 500


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=r"batch_size 32 x 2 processes x 4 accumulation steps = 256: .*\(255 images\)"):
        plan_run(parse().optim, Facts(num_images=255, processes=2, accumulation=4))


def test_fewer_classes_than_the_data_has_are_refused():
    with pytest.raises(UserError, match=r"num_classes 5: the data has 10 classes"):
        resolved(parse("--num_classes", "5"))
    assert resolved(parse("--num_classes", "20"))[0].model.num_classes == 20
    with pytest.raises(UserError, match=r"num_classes: .*give their number"):
        resolved(parse(), num_classes=None)


def test_the_papers_averages_come_only_with_runs_that_are_long_enough():
    short, _ = resolved(parse("--max_steps", "600"))
    long, _ = resolved(parse("--max_steps", "250000"))
    assert short.optim.ema_decays == ("auto",)
    assert long.optim.ema_decays == ("auto", "0.9996", "0.9998", "0.9999")


def test_a_run_too_short_for_its_settings_says_so():
    *_, warnings = completed(parse("--max_steps", "600", "--ema_decays", "0.9999", "--warmup_steps", "500"))
    found = " ".join(warnings)
    assert "--ema_decays 0.9999 averages over 10,000 steps, but the run has only 600" in found
    assert "the warm-up takes 500 of the run's 600 steps" in found
    assert "hardly move the weights" in found
    *_, warnings = completed(parse("--max_steps", "5000", "--learning_rate", "3e-4"))
    assert warnings == []


def test_dropout_defaults_to_the_sizes_own():
    assert resolved(parse("--model", "JiT-H/16"))[0].model.proj_dropout == 0.2
    assert resolved(parse("--model", "JiT-B/16"))[0].model.proj_dropout == 0.0
    assert resolved(parse("--model", "JiT-H/16", "--proj_dropout", "0"))[0].model.proj_dropout == 0.0


def test_output_folder_is_named_alike_on_every_process():
    assert run_folder(parse("--wandb_name", "my run/1")) == "runs/my-run-1"
    assert run_folder(parse("--model", "JiT-B/4", "--seed", "3")) == "runs/x-JiT-B-4-64px-seed3"


def test_a_name_from_the_environment_names_the_folder_where_wandb_is_used(monkeypatch):
    monkeypatch.setenv("WANDB_NAME", "exp-b")
    config, _ = resolved(parse("--use_wandb"))
    assert (config.run.output_dir, config.tracking.wandb_name) == ("runs/exp-b", "exp-b")
    assert resolved(parse("--use_wandb", "--wandb_name", "mine"))[0].run.output_dir == "runs/mine"
    assert resolved(parse())[0].run.output_dir == "runs/x-JiT-B-16-256px-seed0"


def test_each_trial_of_a_sweep_has_a_folder_of_its_own(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    assert run_folder(parse()) == run_folder(parse("--wandb_name", "same")) == "runs/sweep-s1/r1"
    assert run_folder(parse("--output_dir", "runs/mine")) == "runs/mine/r1"
    assert run_folder(parse("--output_dir", "runs/of-r1")) == "runs/of-r1"
    assert run_folder(parse("--output_dir", "runs/or10/of-r10")) == "runs/or10/of-r10/r1"  # those of other trials
    monkeypatch.setenv("WANDB_RUN_ID", "odd id")
    for folder in (("runs/mine", "runs/mine/odd-id"), ("runs/mine/odd-id/", "runs/mine/odd-id/")):
        assert run_folder(parse("--output_dir", folder[0])) == folder[1]
    assert run_folder(resolved(parse("--output_dir", "runs/mine"))[0]) == "runs/mine/odd-id"


def test_settings_from_python_are_those_of_the_command_line():
    given = Config.of(
        data_path="x", model="JiT-B/4", img_size=64, epochs=3, ema_decays=["auto", "0.99"], mixed_precision="bf16"
    )
    flags = ("--model", "JiT-B/4", "--img_size", "64", "--epochs", "3", "--ema_decays", "auto", "0.99")
    assert given == parse(*flags, "--mixed_precision", "bf16")
    assert Config.of(data_path="x", use_wandb=True) == parse("--use_wandb")
    assert isinstance(given.optim.epochs, float)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_path": "x", "modle": "JiT-B/4"}, r"modle: no such setting; .* Did you mean 'model'"),
        ({"model": "JiT-B/4"}, r"^data_path: not given"),
        ({"data_path": "x", "batch_size": "32"}, r"^batch_size '32': must be of the type int\."),
        ({"data_path": "x", "batch_size": True}, r"^batch_size True: must be of the type int"),
        ({"data_path": "x", "loss_space": "z"}, r"^loss_space 'z': must be of the type Literal"),
        ({"data_path": "x", "adam_betas": (0.9,)}, r"^adam_betas \(0.9,\): must be of the type tuple"),
        ({"data_path": "x", "model": "JiT-B/16", "img_size": 250}, r"^img_size 250: must be a multiple"),
    ],
)
def test_wrong_settings_from_python_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Config.of(**settings)


def test_a_recorded_configuration_of_another_version_is_read():
    recorded = {"data_path": "x", "ema_decays": ["auto", "0.9"], "a_setting_of_later": 3}
    assert Config.of_record(recorded) == parse("--ema_decays", "auto", "0.9")


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_recipe_states_only_what_differs_from_its_base(tmp_path):
    write(tmp_path / "bases" / "paper.yaml", "data_path: x\nbatch_size: 7\nepochs: 9\nseed: 1\n")
    write(tmp_path / "small.yaml", "base: bases/paper.yaml\nbatch_size: 8\nepochs: null\nmax_steps: 5\n")
    file = write(tmp_path / "tiny.yaml", "base: small.yaml\nseed: 2\n")
    expected = parse("--batch_size", "8", "--max_steps", "5", "--seed", "2")
    assert parse_args(["--config", file]) == expected
    assert parse_args(["--config", file, "--seed", "3"]).run.seed == 3


def test_bases_that_cannot_be_are_refused(tmp_path):
    loop = write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: c.yaml\n")
    write(tmp_path / "c.yaml", "base: a.yaml\n")
    with pytest.raises(UserError, match=r"^config .*c.yaml: its base a.yaml has it as a base"):
        parse("--config", loop)
    with pytest.raises(UserError, match=r"^config .*gone.yaml: cannot be read"):
        parse("--config", write(tmp_path / "d.yaml", "base: gone.yaml\n"))
    for text in ('base: "a\\0b"', f"base: {300 * 'x'}", "base: ~no-such-user/a.yaml"):
        with pytest.raises(UserError, match=r"^config "):
            parse("--config", write(tmp_path / "f.yaml", text))
    write(tmp_path / "wrong.yaml", "batchsize: 3\n")
    with pytest.raises(UserError, match=r"^config .*wrong.yaml: batchsize is no setting. Did you mean 'batch_size'"):
        parse("--config", write(tmp_path / "e.yaml", "base: wrong.yaml\n"))


def weights(**facts):
    sizes = {"depth": 12, "hidden_size": 768, "num_heads": 12, "mlp_ratio": 4.0}
    network = {**sizes, "patch_size": 4, "img_size": 64, "num_classes": 5}
    defaults = {"noise_scale": 1.5, "prediction": "x", "guidance_scale": 2.7}
    return Start(**{"path": "runs/a", "network": network} | defaults | facts)


def test_what_is_left_open_follows_from_the_weights_to_start_from():
    config, _ = resolved(parse("--init_from", "runs/a"), start=weights())
    settings = config.flat()
    expected = {"model": "JiT-B/4", "img_size": 64, "noise_scale": 1.5, "guidance_scale": 2.7, "num_classes": 10}
    assert {name: settings[name] for name in expected} == expected
    given = ("--img_size", "128", "--guidance_scale", "3", "--lora_rank", "4")
    config, _ = resolved(parse("--init_from", "runs/a", *given), start=weights(), num_classes=3)
    assert (config.data.img_size, config.objective.noise_scale, config.sample.guidance_scale) == (128, 1.0, 3.0)
    assert (config.model.num_classes, config.tune.lora_alpha) == (5, 4.0)
    assert resolved(parse("--init_from", "a"), start=weights(), is_labelled=False)[0].sample.guidance_scale == 1.0


def test_a_resumed_run_keeps_its_averages_and_what_it_had_from_its_source():
    saved = {"ema_decays": ["auto"], "model": "JiT-S/8", "img_size": 32, "noise_scale": 2.0, "guidance_scale": 2.2}
    config, _ = resolved(parse("--init_from", "gone", "--max_steps", "250000"), saved=saved)
    assert {name: config.flat()[name] for name in saved} == saved
    config, _ = resolved(parse("--max_steps", "250000"), saved=saved)
    assert (config.model.model, config.data.img_size, config.optim.ema_decays) == ("JiT-B/16", 256, ("auto",))
    assert resolved(parse("--ema_decays", "0.5"), saved=saved)[0].optim.ema_decays == ("0.5",)


def test_a_stream_keeps_the_lanes_that_its_run_began_with():
    assert resolved(parse(), lanes=6)[0].data.lanes == 6
    assert resolved(parse("--lanes", "3"), lanes=6)[0].data.lanes == 3
    for before in (4, None):  # None in the settings of checkpoints that have the number in their state alone
        saved = {"ema_decays": ["auto"], "lanes": before}
        assert resolved(parse(), lanes=6, saved=saved)[0].data.lanes == before


def test_workers_leave_a_core_to_the_training():
    facts = [{"cores": 1}, {"cores": 4}, {"cores": 64}, {"cores": 64, "is_encoded": False}]
    assert [resolved(parse(), **fact)[0].data.num_workers for fact in facts] == [0, 3, 8, 0]
    assert resolved(parse("--num_workers", "2"), cores=64)[0].data.num_workers == 2


def test_muon_needs_a_wide_type():
    with pytest.raises(UserError, match=r"^optimizer muon: .*fp16"):
        resolved(parse("--optimizer", "muon"), precision="fp16")


def test_a_slow_use_of_the_device_is_said():
    def warnings(**facts):
        return " ".join(completed(parse("--max_steps", "5000", "--learning_rate", "3e-4"), **facts)[2])

    assert "--mixed_precision bf16 is faster" in warnings(is_good_at_bf16=True)
    assert "only emulates bf16" in warnings(precision="bf16")
    assert "uses 1 of 4 cores: set OMP_NUM_THREADS=4" in warnings(cores=4, threads=1)
    assert warnings(cores=4, threads=4) == warnings(cores=4) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", 1e308), ("warmup_epochs", 1e308), ("max_steps", 10**18), ("learning_rate", 1e308)),
        *(("guidance_scale", 10**400), ("seed", 10**5000), ("adam_betas", (10**400, 0.9)), ("holdout", 10**400)),
        *(("num_classes", 10**9), ("num_workers", 2**63), ("lanes", 10**18), ("val_images", -(10**5000))),
        *(("model", "JiT-B/" + 5000 * "9"), ("model", "JiT-B/9999")),
    ],
    ids=lambda part: part[:20] if isinstance(part, str) else type(part).__name__,  # Python writes no such numbers
)
def test_numbers_of_which_no_machine_has_so_many_are_refused(name, value):
    with pytest.raises(UserError) as refused:
        Config.of(**{"data_path": "photos", name: value})
    assert refused.value.about == name
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("data_path", ""), ("data_path", "a\0b"), ("output_dir", 256 * "x"), ("init_from", 2000 * "x/y/")),
        *(("resume", "~no-such-user/home"), ("eval_reference", "\ud800"), ("wandb_tags", ("a\0",))),
    ],
)
def test_places_that_no_system_can_have_are_refused(name, value):
    with pytest.raises(UserError) as refused:
        Config.of(**{"data_path": "photos", name: value})
    assert refused.value.about == name


def test_a_link_that_leads_back_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name in ("data_path", "output_dir", "init_from"):
        with pytest.raises(UserError, match="leads back to itself"):
            Config.of(**{"data_path": "photos", name: str(tmp_path / "loop" / "x")})


@pytest.mark.parametrize("place", ["\udcff", "https://host/" + 300 * "x", "{" + 100 * "abc," + "d}", 255 * "x"])
def test_odd_places_that_may_be_there_are_taken(place):
    assert Config.of(data_path=place).data.data_path == place


@pytest.mark.parametrize("value", ["!!int x", "!!float x", "!!bool x", "!!timestamp x", 5000 * "[", 5000 * "{b: "])
def test_recipes_that_yaml_cannot_read_are_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"^config .*: not valid YAML: "):
        parse("--config", write(tmp_path / "a.yaml", f"batch_size: {value}\n"))


@pytest.mark.parametrize("file", ["a\0b", 300 * "x", "~no-such-user/a.yaml"])
def test_recipes_whose_names_no_file_can_have_are_refused(file):
    with pytest.raises(UserError, match=r"^config "):
        parse("--config", file)
