"""Settings are compared by runs with the same seeds; a comparison that was stopped goes on and says the same.

Trainings and evaluations are stand-ins, by `--launch`; those that a law is about are real, in this process.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import TINY, in_fresh_accelerate, train_here

from jit_accel.compare import main, step_time
from jit_accel.compare import run as running
from jit_accel.compare.settings import CompareConfig, read_arms, read_measure
from jit_accel.compare.t_test import t_quantile
from jit_accel.evaluate import main as evaluate
from jit_accel.monitor.log import read_metrics
from jit_accel.train.trainer import Trainer

# Stands for `python`: notes its starts, and has the values that the tests know of each run.
PROGRAM = """
import json, os, sys, time
from pathlib import Path
flags = dict(word[2:].split("=", 1) for word in sys.argv[3:] if "=" in word)
is_training = sys.argv[2] == "jit_accel.train"
folder = Path(flags["output_dir"] if is_training else flags["model"])
name, seed = (folder.parent.name, int(flags["seed"])) if is_training else (folder.parent.name, int(folder.name[4:]))
with open(os.environ["STARTS"], "a") as file:
    file.write(f"{sys.argv[2][10:]} {name} {seed} {flags.get('max_steps')}\\n")
fate = os.environ.get("FATE", "")
if is_training and fate == f"hang {name} {seed}":
    time.sleep(600)
if is_training and fate == f"fail {name} {seed}":
    print("the loss is nan")
    sys.exit(7)
slowness = {"slow": 2.0, "quick": 0.5}.get(name, 1.0)
if is_training:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "perf/step_time": slowness * (0.1 if step > 1 else 9.0)} for step in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"num_images": 1000, "global_batch_size": 30}))
else:
    value = 100.0 + 10 * seed + {"better": -5 - seed, "worse": 5 + seed * seed, "alike": seed - 1}.get(name, 0)
    Path(flags["output"]).write_text(json.dumps([{"metrics": {"fid": value, "kid": value / 1000}}]))
"""
COMMON = ("--", "--data_path", "photos", "--max_steps", "40")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Flags for stand-ins, and the function that returns what has been started."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))

    def starts() -> list[str]:
        file = tmp_path / "starts"
        return file.read_text().splitlines() if file.exists() else []

    return ("--launch", f"{sys.executable} {tmp_path}/program.py", "--output_dir", str(tmp_path / "cmp")), starts


def table(tmp_path) -> tuple[str, dict]:
    folder = tmp_path / "cmp"
    return (folder / "compare.md").read_text(), json.loads((folder / "compare.json").read_text())


def test_the_table_has_means_paired_differences_and_corrected_p_values(stand_in, tmp_path, capsys):
    flags, starts = stand_in
    assert main(["base", "better:", "worse:", "alike:", "--seeds", "3", *flags, *COMMON]) == 0
    text, found = table(tmp_path)
    base, better, worse, alike = found["settings"]
    assert base["mean"] == 110
    assert base["difference"] is None
    assert better["difference"]["by_seed"] == {"0": -5, "1": -6, "2": -7}
    assert better["difference"]["mean"] == -6
    reach = t_quantile(2) / 3**0.5
    assert better["difference"]["low"] == pytest.approx(-6 - reach)
    assert better["difference"]["p_holm"] == pytest.approx(3 * better["difference"]["p"])
    assert alike["difference"]["p"] == 1
    assert worse["difference"]["p_holm"] == pytest.approx(2 * worse["difference"]["p"])
    assert worse["step_time_ratio"] == 1
    assert "better: better than base (-6 on average" in text
    assert "alike: not told apart from base by 3 seeds" in text
    assert (tmp_path / "cmp" / "compare.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert re.search(r"better +3 +104 ", printed)
    # Seed by seed, so that an early end is fair.
    trained = [line.split()[1:3] for line in starts() if line.startswith("train")]
    assert trained == [[name, str(seed)] for seed in range(3) for name in ("base", "better", "worse", "alike")]


def test_finished_runs_are_not_repeated_and_seeds_and_settings_may_be_added(stand_in, tmp_path):
    flags, starts = stand_in
    assert main(["base", "better:", "--seeds", "1", *flags, *COMMON]) == 0
    before = starts()
    assert len(before) == 4
    assert main(["base", "better:", "--seeds", "1", *flags, *COMMON]) == 0
    assert starts() == before
    assert main(["base", "better:", "worse:", "--seeds", "2", *flags, *COMMON]) == 0
    assert len(starts()) == 12
    assert [len(arm["values"]) for arm in table(tmp_path)[1]["settings"]] == [2, 2, 2]
    assert main(["base", "better:", "--seeds", "2", *flags, *COMMON]) == 0  # the third is remembered
    assert main(["base", "worse:", "--seeds", "2", *flags, *COMMON]) == 0
    assert len(starts()) == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_comparison_that_is_stopped_goes_on_and_gives_the_same_table(stand_in, tmp_path, number):
    flags, starts = stand_in
    command = ["base", "better: --learning_rate 1e-3", "--seeds", "3", *flags, *COMMON]
    environment = os.environ | {"FATE": "hang better 1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-m", "jit_accel.compare", *command], env=environment) as process:
        while "train better 1 40" not in starts():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    assert [len(arm["values"]) for arm in table(tmp_path)[1]["settings"]] == [2, 1]
    before = starts()
    assert main(command) == 0
    resumed = table(tmp_path)
    assert [line for line in starts()[len(before) :] if line.startswith("train")] == [
        "train better 1 40",
        "train base 2 40",
        "train better 2 40",
    ]
    other = tmp_path / "other"
    other.mkdir()
    assert main([str(other / "cmp") if word == flags[3] else word for word in command]) == 0
    assert table(other) == resumed


def test_what_fails_is_named_and_the_others_go_on(stand_in, tmp_path, monkeypatch, capfd):
    flags, starts = stand_in
    command = ["base", "worse:", "better:", "--seeds", "2", *flags, *COMMON]
    monkeypatch.setenv("FATE", "fail worse 0")
    assert main(command) == 1
    told = capfd.readouterr().err
    assert "    the loss is nan" in told
    assert "error: worse, seed 0: jit_accel.train ended with 7; " in told
    assert [len(arm["values"]) for arm in table(tmp_path)[1]["settings"]] == [2, 0, 2]
    monkeypatch.delenv("FATE")
    assert main(command) == 0
    assert [len(arm["values"]) for arm in table(tmp_path)[1]["settings"]] == [2, 2, 2]
    monkeypatch.setenv("FATE", "fail base 2")
    assert main([*command[:3], "--seeds", "4", *command[5:]]) == 1
    assert "worse 2" not in " ".join(starts())


def test_at_equal_time_the_length_follows_from_the_time_of_a_step(stand_in, tmp_path):
    flags, starts = stand_in
    command = ["base", "slow:", "quick:", "--seeds", "1", "--equal", "time", *flags, *COMMON]
    assert main(command) == 0
    lengths = {line.split()[1]: line.split()[3] for line in starts() if line.startswith("train")}
    assert lengths == {"base": "40", "slow": "20", "quick": "80"}
    text, found = table(tmp_path)
    assert "slow: 20 steps in the base's time, by steps of 2 times its own." in text
    assert found["settings"][1]["step_time_ratio"] == pytest.approx(2)
    before = starts()
    assert main(command) == 0
    assert starts() == before  # nothing is measured again
    epochs = [*COMMON[:3], "--epochs", "3"]
    at = ["--output_dir", str(tmp_path / "epochs")]
    assert main(["base", "slow:", "--seeds", "1", "--equal", "time", *flags[:2], *at, *epochs]) == 0
    assert starts()[-2] == "train slow 0 50"  # half of 3 epochs of 1,000 images in batches of 30


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        (["base"], [], "1 settings to compare: give two or more before the first flag"),
        (["--seeds", "2", "base", "x:"], [], "0 settings to compare: give two or more before the first flag"),
        (["base", "x:"], ["--launch", "no-such-launcher"], "'no-such-launcher' is no program here"),
        (["base", "base:"], [], "two settings are called base"),
        (["base", "a b: --lr 1"], [], "'a b' is no name"),
        (["base", "x: sgd"], [], "sgd is neither a flag nor a YAML file"),
        (["base", "x: --optimiser muon"], [], "x: --optimiser: no such flag. Did you mean '--optimizer'?"),
        (["base", "x: --batch_size 0"], [], "x: --batch_size 0: must be at least 1"),
        (["base", "x: --seed 3"], [], "x: --seed 3: is given to each run by jit_accel.compare: use --seeds."),
        (["base", "x: --max_steps 3"], [], "x: --max_steps 3: is 40 behind --, for all"),
        (["base", "x: missing.yaml"], [], "x: --config missing.yaml: cannot be read"),
        (["base", "x:"], ["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["base", "x:"], ["--evaluate", "--num_image 3"], "--evaluate: --num_image: no such flag. Did you mean"),
        (["base", "x:"], ["--evaluate", "--guidance_scale 1,2"], "--evaluate: --guidance_scale 1.0 2.0: must be one"),
        (["base", "x:"], ["--evaluate", "--model m"], "--evaluate: --model m: is given by jit_accel.compare"),
        (["base", "x:"], ["--evaluate", "'"], "--evaluate ': cannot be read"),
        (["base", "x:"], ["--metric", "fud"], "--metric fud: unknown; choose from fd, sfd"),
        (["base", "x:"], ["--metric", "psnr"], "--metric psnr: unknown; choose from fd, sfd"),
        (["base", "x:"], ["--metric", "kid", "--evaluate", "--metrics fid"], "--metric kid: unknown; choose from fid"),
        (["base", "x: --data_path other"], [], "x: --data_path other: is photos behind --"),
    ],
)
def test_bad_input_is_named_before_anything_runs(settings, more, message, stand_in, tmp_path, capsys):
    flags, starts = stand_in
    assert main([*settings, *flags, *more, *COMMON]) == 2
    assert message in capsys.readouterr().err
    assert starts() == []
    assert not (tmp_path / "cmp").exists()


def test_lengths_and_references_that_differ_are_refused(stand_in, tmp_path, capsys):
    flags, _ = stand_in
    data = ("--", "--data_path", "photos")
    assert main(["base: --max_steps 4", "x: --max_steps 5", *flags, *data]) == 2
    assert "x trains for another length than base" in capsys.readouterr().err
    assert main(["base", "x: --batch_size 64", *flags, *data]) == 2
    assert "so that epochs have other numbers of steps: give --max_steps" in capsys.readouterr().err
    assert main(["base: --max_steps 4", "x: --max_steps 5", "--equal", "time", *flags, *data]) == 2
    assert "x: --max_steps 5: follows from --equal time" in capsys.readouterr().err
    assert main(["base: --data_path a", "x: --data_path b", *flags]) == 2
    assert "--reference: is needed, since x has another data_path than base" in capsys.readouterr().err


def test_another_comparison_in_the_folder_is_refused(stand_in, tmp_path, capsys):
    flags, starts = stand_in
    assert main(["base", "x: --learning_rate 1e-3", "--seeds", "1", *flags, *COMMON]) == 0
    before = starts()
    for settings, more, message in (
        (["base", "x: --learning_rate 2e-3"], (), "x: --learning_rate was 0.001 and is 0.002 now"),
        (["x: --learning_rate 1e-3", "base:"], (), "the base was base and is x now"),
        (
            ["base", "x: --learning_rate 1e-3"],
            ("--evaluate", "--num_images 9"),
            "--evaluate: --num_images was None and is 9 now",
        ),
    ):
        assert main([*settings, "--seeds", "1", *flags, *more, *COMMON]) == 2
        told = capsys.readouterr().err
        assert "holds another comparison: " in told
        assert message in told
    assert starts() == before
    workers = ["base", "x: --learning_rate 1e-3 --num_workers 3", "--seeds", "1"]
    assert main([*workers, *flags, *COMMON]) == 0  # which changes no result
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").touch()
    assert main(["base", "x:", *flags[:2], "--output_dir", str(tmp_path / "full"), *COMMON]) == 2
    assert "holds something else: give a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "metric", "is_higher", "wanted", "asked"),
    [
        ("", None, False, "fid", "fd"),
        ("--features efficientnet_lite0", None, False, "fd_efficientnet_lite0", "fd"),
        ("", "recall", True, "recall", "recall"),
        ("--metrics fid,kid", "kid", False, "kid", "fid,kid"),
        ("--pairs photos", None, True, "psnr", None),
        ("--pairs photos", "mae", False, "mae", "mae"),
        ("--pairs photos --features efficientnet_lite0", "fd", False, "fd_efficientnet_lite0", "fd"),
    ],
)
def test_the_metric_and_its_direction_follow_from_the_evaluation(flags, metric, is_higher, wanted, asked):
    settings = CompareConfig("cmp", evaluate=flags, metric=metric)
    arms = read_arms(["base", "other:"], list(COMMON[1:]), "steps")
    found = read_measure(settings, arms)
    assert (found.metric, found.is_better_higher) == (wanted, is_higher)
    given = found.words()
    assert given.get("metrics") == asked
    assert ("reference" in given) == ("--pairs" not in flags)


def test_files_and_flags_make_settings(stand_in, tmp_path, monkeypatch, capsys):
    flags, _ = stand_in
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("seed: 7\nmax_steps: 900\nlearning_rate: 1e-3\nbatch_size: 8\n")
    Path("muon.yml").write_text("optimizer: muon\n")
    command = ["base.yaml", "muon: muon.yml --learning_rate 0.02", "--seeds", "1", *flags, *COMMON]
    assert main(command) == 0
    assert re.search(
        r"muon: +optimizer muon \(not adamw\), learning_rate 0.02 \(not 0.001\)\n", capsys.readouterr().out
    )
    recorded = json.loads((tmp_path / "cmp" / "experiment.json").read_text())["settings"]
    assert {name: settings["batch_size"] for name, settings in recorded.items()} == {"base": 8, "muon": 8}
    assert {settings["max_steps"] for settings in recorded.values()} == {40}


@pytest.fixture
def in_process(monkeypatch, tiny, images, tmp_path):
    """Real trainings and evaluations, in this process, and the flags for small ones."""

    def run(command, log, stop):
        *_, program = command[: command.index("-m") + 2]
        flags = command[command.index("-m") + 2 :]
        if program == "jit_accel.train":
            return train_here(*flags)
        with in_fresh_accelerate():
            return evaluate([*flags, "--mixed_precision", "no"])

    monkeypatch.setattr(running, "run_command", run)
    measure = "--features tiny --num_images 8 --batch_size 8 --num_inference_steps 1"
    return ["--evaluate", measure, "--output_dir", str(tmp_path / "cmp"), "--", *TINY, "--data_path", str(images)]


def test_two_equal_settings_have_no_difference_at_all(in_process, tmp_path):
    assert main(["base", "same:", "--seeds", "3", *in_process]) == 0
    text, found = table(tmp_path)
    base, same = found["settings"]
    assert same["values"] == base["values"]
    assert len(set(base["values"].values())) == 3
    assert same["difference"] == {
        **dict.fromkeys(("mean", "low", "high"), 0.0),
        **dict.fromkeys(("p", "p_holm"), 1.0),
        "by_seed": dict.fromkeys("012", 0.0),
    }
    assert "same: no difference from base, in 3 seeds." in text


def test_the_schedule_of_a_setting_ends_with_its_own_last_step(in_process, tmp_path, monkeypatch):
    times = {"base": 0.2, "slow": 0.3}
    monkeypatch.setattr(step_time, "median_step_s", lambda *folders: times[folders[0].parent.name])
    flags = [word for word in in_process if word != "--no_html_report"]
    assert main(["base", "slow: --optimizer muon", "--seeds", "1", "--equal", "time", "--time_steps", "5", *flags]) == 0
    rows = read_metrics(tmp_path / "cmp/runs/slow/seed0")
    assert rows[-1]["step"] == 4  # of the base's 6
    assert rows[-1]["train/learning_rate"] < rows[-2]["train/learning_rate"]
    assert json.loads((tmp_path / "cmp/runs/slow/seed0/run.json").read_text())["total_steps"] == 4
    assert not (tmp_path / "cmp/timing").exists()


def test_runs_of_a_seed_begin_with_the_same_weights_and_see_the_same_images_and_noise(
    in_process, tmp_path, monkeypatch
):
    seen: list[list[str]] = []
    loss = Trainer.loss

    def noted(self, batch):
        if self.step == 0:
            weights = b"".join(tensor.numpy().tobytes() for tensor in self.network.state_dict().values())
            seen.append([hashlib.sha1(weights).hexdigest()])
        seen[-1].append(hashlib.sha1(batch.images.numpy().tobytes()).hexdigest())
        return loss(self, batch)

    monkeypatch.setattr(Trainer, "loss", noted)
    assert main(["base", "muon: --optimizer muon", "--seeds", "2", *in_process]) == 0
    base0, muon0, base1, muon1 = seen
    assert len(base0) == 7
    assert base0 == muon0
    assert base1 == muon1
    assert not set(base0) & set(base1)
    losses = [
        read_metrics(tmp_path / "cmp/runs" / name / f"seed{seed}")[0]["train/loss"]
        for seed in (0, 1)
        for name in ("base", "muon")
    ]
    assert losses[0] == losses[1] != losses[2] == losses[3]
