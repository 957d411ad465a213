"""The precision where none is given: on a CPU what is faster there. No law here hangs on a real clock."""

import itertools
import json
import os
import random
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import Group, in_fresh_accelerate, state, train_here

from jit_accel.base.findings import cache_folder, write_findings
from jit_accel.config.presets import PRESETS
from jit_accel.evaluate import main as evaluate_main
from jit_accel.model import precision
from jit_accel.model.blocks import Attention
from jit_accel.model.precision import BUDGET_S, BlockTimes, BlockWork, compare, constant_block, run_block, times_of
from jit_accel.sample import main as sample_main

WORK = BlockWork(768, 12, 4.0, 288, 8, trains=True)
OPEN = ("--mixed_precision", "none", "--max_steps", "2")


class Machine:
    """Clocks, and a block that takes on them what `seconds` says of (precision, work); others take as much again."""

    def __init__(self, seconds, others=lambda: 0.0):
        self.seconds, self.others, self.tried = seconds, others, []
        self.now = self.began = 1e6 * random.random()
        self.own = 0.0

    def run(self, name: str, work: BlockWork) -> None:
        self.tried.append((name, work))
        seconds = self.seconds(name, work)
        self.own, self.now = self.own + seconds, self.now + seconds + self.others()

    def compare(self, work: BlockWork = WORK) -> BlockTimes:
        return compare(self.run, work, BUDGET_S, lambda: self.now, lambda: self.own)


def have_units(patch, units: str = "avx512_bf16", name: str = "A processor") -> None:
    patch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name, units: True}, raising=False)


@pytest.fixture
def units(monkeypatch, tmp_path):
    """A processor with units for bf16, and a cache of its own."""
    monkeypatch.setenv("JIT_ACCEL_CACHE", str(tmp_path / "cache"))
    have_units(monkeypatch)


@pytest.fixture
def takes(monkeypatch):
    """Let a block take the given seconds in float32 and in bf16; gives the list of what was compared."""

    def fake(no: float, bf16: float) -> list[BlockWork]:
        compared = []

        def compare(run, work, budget_s):
            assert budget_s == BUDGET_S
            compared.append(work)
            return BlockTimes(no, bf16)

        monkeypatch.setattr(precision, "compare", compare)
        return compared

    return fake


@pytest.mark.parametrize("seed", range(40))
def test_a_comparison_keeps_its_budget_and_tries_as_much_of_the_work_as_fits(seed):
    """Whatever a call costs, and a row of tokens; attention costs more for each row, the more there are of them."""
    draw = random.Random(seed)
    heads, head_dim = draw.choice([1, 3, 12, 16]), draw.choice([4, 64, 104])
    shape = (heads * head_dim, heads, 4.0, draw.choice([1, 31, 53, 288, 1088]), draw.choice([1, 3, 32, 257]))
    work = BlockWork(*shape, trains=draw.random() < 0.5)
    fixed, of_row = ({name: 10 ** draw.uniform(*powers) for name in ("no", "bf16")} for powers in ((-5, -2), (-7, -4)))
    squared = draw.choice([0.0, 1e-3])

    def seconds(name, some):
        rows = some.images * some.tokens * (some.hidden_size / 512) ** 2
        return fixed[name] + of_row[name] * rows * (1 + squared * some.tokens)

    machine = Machine(seconds)
    times = machine.compare(work)
    spent_s, tried = machine.now - machine.began, [some for _, some in machine.tried]
    assert spent_s <= BUDGET_S + 1e-9
    assert [name for name, _ in machine.tried] == ["no", "bf16"] * (len(tried) // 2)
    assert tried[::2] == tried[1::2]
    for some in tried:
        assert some.tokens <= work.tokens
        assert some.images <= work.images
        assert some.hidden_size // some.num_heads == head_dim
    for before, after in zip(tried, tried[2:]):  # wider only with some rows, for which casts matter less
        rows = before.images * before.tokens
        assert after.num_heads == before.num_heads or rows >= min(256, work.images * work.tokens)
    last = tried[-1]
    turn_s = seconds("no", last) + seconds("bf16", last)
    assert last == work or spent_s + 8 * turn_s > BUDGET_S
    assert spent_s + turn_s > BUDGET_S
    assert (times.no, times.bf16) == pytest.approx((seconds("no", last), seconds("bf16", last)))


def test_casts_that_cost_the_same_whatever_the_work_do_not_hide_what_is_faster():
    """In the first trial bf16 is slower here."""
    costs = {"no": (0.0, 1e-4), "bf16": (0.002, 5e-5)}

    def seconds(name, work):
        fixed, of_row = costs[name]
        width = work.hidden_size / 768
        return (fixed + of_row * work.images * work.tokens) * width**2

    assert seconds("bf16", WORK.first()) > seconds("no", WORK.first())
    assert Machine(seconds).compare().faster == "bf16"


@pytest.mark.parametrize("slow_s", [0.3, 0.9, 60.0])
def test_what_is_much_slower_is_tried_once(slow_s):
    machine = Machine(lambda name, work: {"no": 0.003, "bf16": slow_s}[name])
    assert machine.compare().faster == "no"
    assert machine.tried == [("no", WORK.first()), ("bf16", WORK.first())]


def test_a_disturbance_of_one_trial_decides_nothing():
    """The least times count, each of several turns, and the first run of a kernel takes longer."""
    counts, seen = Counter(), Counter()

    def seconds(name, work):
        counts[name] += 1
        seen[name, work] += 1
        is_longer = counts[name] in (4, 9) or (name, seen[name, work]) == ("bf16", 1)
        return {"no": 2e-5, "bf16": 1e-5}[name] * work.images * work.tokens + (0.02 if is_longer else 0)

    times = Machine(seconds).compare()
    assert times.no / times.bf16 == pytest.approx(2)
    assert min(counts.values()) > 9


def test_other_programs_take_of_the_budget_and_not_of_the_comparison():
    draw = random.Random(0)
    cost = {"no": 1e-5, "bf16": 1.1e-5}
    machine = Machine(lambda name, work: cost[name] * work.images * work.tokens, lambda: draw.uniform(0, 0.02))
    assert machine.compare().faster == "no"
    assert machine.now - machine.began < BUDGET_S + 0.1


def test_a_clock_that_goes_in_steps_compares_nothing(monkeypatch):
    """As on Windows, and in some containers."""
    monkeypatch.setattr(time, "thread_time", itertools.count().__next__)
    assert precision.clock_of_thread() is time.thread_time
    monkeypatch.setattr(time, "thread_time", lambda: 0.015625)
    assert precision.clock_of_thread() is time.perf_counter


def test_times_are_remembered_for_what_they_depend_on(units, takes, monkeypatch):
    compared = takes(1.0, 2.0)
    assert times_of(WORK) == times_of(WORK) == BlockTimes(1.0, 2.0)
    assert compared == [WORK]
    changes = ({"tokens": 144}, {"images": 9}, {"hidden_size": 256}, {"num_heads": 4}, {"trains": False})
    others = [replace(WORK, **change) for change in changes]
    for work in others:
        times_of(work)
    assert compared == [WORK, *others]
    have_units(monkeypatch, name="Another processor")
    times_of(WORK)
    have_units(monkeypatch, units="amx_bf16")
    times_of(WORK)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    times_of(WORK)
    monkeypatch.setattr(torch, "__version__", "9.9")
    times_of(WORK)
    assert compared == [WORK, *others, WORK, WORK, WORK, WORK]
    times_of(WORK)
    assert len(compared) == 10


@pytest.mark.parametrize("content", [b"", b"no times", b'{"no": 1.0, "bf16": 0.1}', None, b'{"float32": 1}', b"[1]"])
def test_a_damaged_memory_is_made_anew(units, takes, content):
    compared = takes(1.0, 2.0)
    times_of(WORK)
    (file,) = cache_folder().glob("precision-*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] if content is None else content)
    if content in (b'{"float32": 1}', b"[1]"):  # whole, and of a version that is not known
        write_findings(file, content)
    assert times_of(WORK) == BlockTimes(1.0, 2.0)
    assert len(compared) == 2
    assert file.read_bytes() == whole


@pytest.mark.parametrize("place", ["a file", "no home"])
def test_no_place_to_remember_is_no_error(units, takes, tmp_path, monkeypatch, place):
    compared = takes(2.0, 1.0)
    if place == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("JIT_ACCEL_CACHE", str(tmp_path / "file"))
    else:
        for name in ("JIT_ACCEL_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert times_of(WORK).faster == times_of(WORK).faster == "bf16"
    assert len(compared) == 2


def test_the_work_of_a_network_is_that_of_most_of_its_blocks():
    preset = PRESETS["JiT-B"]
    assert BlockWork.of(preset, 4, 64, 64, 8, trains=True) == WORK
    assert BlockWork.of(preset, 16, 256, 512, 2, trains=False) == BlockWork(768, 12, 4.0, 16 * 32 + 32, 2, trains=False)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("name", ["no", "bf16"])
def test_a_trial_passes_a_block_forward_and_backward_and_draws_nothing(name, trains):
    work = BlockWork(16, 2, 4.0, 5, 3, trains)
    before, ran = torch.get_rng_state(), []
    block = constant_block(work, torch.device("cpu"))
    block.register_forward_hook(lambda _, arguments, output: ran.append((arguments[0].shape, output.requires_grad)))
    block.attn.qkv.register_forward_hook(lambda _, arguments, output: ran.append(output.dtype))
    block.attn.qkv.weight.register_hook(lambda gradient: ran.append(gradient.isfinite().all().item()))
    run_block(block, name, work)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[name]
    assert ran == [dtype, ((3, 5, 16), trains), *([True] if trains else [])]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_real_comparison_ends(units, monkeypatch):
    monkeypatch.setattr(precision, "BUDGET_S", 0.0)  # one turn
    times = times_of(BlockWork(16, 2, 4.0, 5, 3, trains=True))
    assert min(times.no, times.bf16) > 0


@pytest.mark.parametrize("name", ["no", "bf16"])
def test_an_accelerator_settled_late_is_as_one_built_with_its_precision(units, takes, name):
    """So nothing else hangs on the precision in this version of Accelerate."""

    def seen(accelerator) -> dict:
        plain = (str, bool, int, type(None))
        of_both = vars(accelerator) | {f"state.{key}": value for key, value in accelerator.state._shared_state.items()}
        return {key: value for key, value in of_both.items() if isinstance(value, plain)}

    def trained(accelerator) -> torch.Tensor:
        torch.manual_seed(0)
        model = accelerator.prepare(torch.nn.Linear(8, 8))
        with accelerator.autocast():
            inside = torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype
        return model(torch.ones(1, 8)), inside

    takes(*{"no": (1.0, 2.0), "bf16": (2.0, 1.0)}[name])
    with in_fresh_accelerate():
        built = Accelerator(mixed_precision=name)
        expected, outcome = seen(built), trained(built)
    with in_fresh_accelerate():
        late = Accelerator(mixed_precision="no")
        precision.settle_accelerator(late, None, WORK)
        assert seen(late) == expected
        assert late.mixed_precision == name
        found = trained(late)
        assert torch.equal(found[0], outcome[0])
        assert found[1] == outcome[1] == {"no": torch.float32, "bf16": torch.bfloat16}[name]


@pytest.mark.parametrize(
    ("times", "environment", "flag", "used", "said"),
    [
        ((1.0, 1.9), {}, "none", "no", "precision no (float32 is 1.9 times as fast as bf16 here)"),
        ((2.5, 1.0), {}, "none", "bf16", "precision bf16 (bf16 is 2.5 times as fast as float32 here)"),
        ((2.5, 1.0), {}, "no", "no", "precision no\n"),
        ((1.0, 2.0), {}, "bf16", "bf16", "precision bf16\n"),
        ((2.5, 1.0), {"ACCELERATE_MIXED_PRECISION": "no"}, "none", "no", "precision no (bf16 is 2.5 times"),
        ((1.0, 2.0), {"ACCELERATE_MIXED_PRECISION": "bf16"}, "none", "bf16", "precision bf16 (float32 is 2.0 times"),
    ],
)
def test_a_run_takes_what_is_faster_unless_it_is_told_otherwise(
    images, tmp_path, capsys, units, takes, times, environment, flag, used, said
):
    compared = takes(*times)
    out = tmp_path / "run"
    where = ("--data_path", str(images), "--output_dir", str(out))
    assert train_here(*where, *OPEN, "--mixed_precision", flag, **environment) == 0
    printed = capsys.readouterr()
    assert said in printed.out
    assert json.loads((out / "run.json").read_text())["mixed_precision"] == used
    assert compared == ([BlockWork(8, 2, 4.0, 16 + 2, 4, trains=True)] if flag == "none" else [])
    is_slow = bool(environment) and times[0] > times[1]
    assert ("--mixed_precision bf16 is faster" in printed.err) == is_slow
    assert "only emulates bf16" not in printed.err


def test_without_units_bf16_is_not_even_tried(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False}, raising=False)
    monkeypatch.setattr(precision, "times_of", lambda work: pytest.fail("is tried"))
    where = ("--data_path", str(images), "--output_dir", str(tmp_path / "run"))
    assert train_here(*where, *OPEN) == 0
    printed = capsys.readouterr()
    assert "precision no\n" in printed.out
    assert "bf16" not in printed.err


def test_a_run_that_goes_on_keeps_its_precision_on_the_same_kind_of_processor(
    images, tmp_path, capsys, units, takes, monkeypatch
):
    """Whatever is measured now: so it has the bits of the run that was never stopped."""
    takes(2.0, 1.0)
    flags = ("--data_path", str(images), "--mixed_precision", "none", "--max_steps", "6", "--save_every_steps", "3")
    whole, out = tmp_path / "whole", tmp_path / "on"
    assert train_here(*flags, "--output_dir", str(whole)) == 0
    assert train_here(*flags, "--output_dir", str(tmp_path / "float32"), "--mixed_precision", "no") == 0
    monkeypatch.setenv("JIT_ACCEL_CACHE", str(tmp_path / "another"))
    takes(1.0, 2.0)
    step = Path("checkpoints", "step_00000003")
    shutil.copytree(whole / step, out / step)
    capsys.readouterr()
    on = (*flags, "--output_dir", str(out), "--resume", "auto")
    assert train_here(*on) == 0
    assert "precision bf16\n" in capsys.readouterr().out
    assert all(torch.equal(tensor, state(out)[name]) for name, tensor in state(whole).items())
    assert not all(torch.equal(tensor, state(out)[name]) for name, tensor in state(tmp_path / "float32").items())

    have_units(monkeypatch, name="Another processor")
    assert train_here(*on, "--max_steps", "8") == 0
    printed = capsys.readouterr().out
    assert "precision no (float32 is 2.0 times as fast as bf16 here)" in printed
    assert "mixed_precision bf16 → no" in printed


def _by_rank():
    """Let each process find something else faster, or the last one have no units at all."""
    rank, lacking = int(os.environ["RANK"]), os.environ.get("TEST_LACKING")
    units = {} if lacking == str(rank) else {"avx512_bf16": True}
    torch.cpu.get_capabilities = lambda: units
    precision.times_of = lambda work: BlockTimes(2.0, 1.0) if rank == 0 else pytest.fail("is compared here")


@pytest.mark.multiprocess
@pytest.mark.parametrize(("lacking", "used"), [("", "bf16"), ("1", "no"), ("0", "no")])
def test_all_processes_take_the_answer_of_the_main_one(images, tmp_path, lacking, used):
    flags = ["--data_path", str(images), *OPEN, "--output_dir", str(tmp_path / "run")]
    environment = {"TEST_SETUP": "test_precision:_by_rank", "TEST_LACKING": lacking}
    group = Group(flags, tmp_path / "log.txt", 2, environment | {"JIT_ACCEL_CACHE": str(tmp_path / "cache")})
    assert group.wait() == [0, 0], group.output()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["mixed_precision"] == used


def test_samples_are_made_in_what_is_faster_and_go_on_as_they_were_begun(images, tmp_path, capsys, units, takes):
    assert train_here("--data_path", str(images), "--output_dir", str(tmp_path / "run"), "--max_steps", "2") == 0
    out = tmp_path / "samples"
    flags = ["--model", str(tmp_path / "run"), "--output_dir", str(out), "--num_inference_steps", "2"]
    flags += ["--num_images", "4", "--batch_size", "3"]
    compared = takes(1.0, 3.0)
    with in_fresh_accelerate():
        assert sample_main(flags) == 0
    assert "precision no (float32 is 3.0 times as fast as bf16 here)" in capsys.readouterr().out
    assert compared == [BlockWork(8, 2, 4.0, 16 + 2, 3, trains=False)]
    takes(3.0, 1.0)
    with in_fresh_accelerate():
        assert sample_main([*flags, "--num_images", "8", "--resume", "--batch_size", "2"]) == 0
    assert "precision no →" in capsys.readouterr().out
    assert json.loads((out / "samples.json").read_text())["settings"]["mixed_precision"] == "no"


def test_a_model_is_measured_in_what_is_faster(images, tmp_path, capsys, units, takes, tiny, monkeypatch):
    run = tmp_path / "run"
    assert train_here("--data_path", str(images), "--output_dir", str(run), "--max_steps", "2") == 0
    compared, seen, forward = takes(3.0, 1.0), set(), Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda *parts: seen.add(parts[0].qkv(parts[1]).dtype) or forward(*parts))
    flags = ["--model", str(run), "--reference", str(images), "--features", "tiny", "--metrics", "fd"]
    flags += ["--num_images", "6", "--batch_size", "3", "--num_inference_steps", "2"]
    with in_fresh_accelerate():
        assert evaluate_main(flags) == 0
    assert "Precision: bf16 (bf16 is 3.0 times as fast as float32 here)" in capsys.readouterr().out
    assert {record["mixed_precision"] for record in json.loads((run / "evaluation.json").read_text())} == {"bf16"}
    assert seen == {torch.bfloat16}
    assert compared == [BlockWork(8, 2, 4.0, 16 + 2, 3, trains=False)]
