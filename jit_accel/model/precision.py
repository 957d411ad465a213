"""The precision of a network that nobody has named: on a CPU what is faster there, by turns on one of its blocks."""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import pyarrow as pa
import torch
from accelerate.utils import gather_object
from torch import nn

from jit_accel import __version__
from jit_accel.base.devices import DTYPES, capabilities, chosen_precision, has_bf16, kind_of
from jit_accel.base.findings import findings_file, read_findings, write_findings
from jit_accel.base.processes import on_main
from jit_accel.config.presets import block_tokens
from jit_accel.model.blocks import JiTBlock
from jit_accel.model.functional import rope_table

BUDGET_S = 0.5  # of all trials together
# The first trial is small, since it may be of what is a hundred times slower. Then come rows, since casting weights to
# bf16 costs the same for few of them as for many; then width, then all rows.
FIRST_WIDTH, FIRST_TOKENS, SOME_ROWS = 256, 16, 256
# A turn on twice the heads, tokens or images takes at most four times as long, and two of them should fit.
LARGER_TURNS = 8


@dataclass(frozen=True)
class BlockWork:
    """The work of a block in a step: `images` of so many `tokens` forward, and backward where it `trains`."""

    hidden_size: int
    num_heads: int
    mlp_ratio: float
    tokens: int
    images: int
    trains: bool

    @classmethod
    def of(cls, sizes, patch_size: int, height: int, width: int, images: int, *, trains: bool) -> "BlockWork":
        """Return the work of most blocks of a network of these `sizes` (a preset, or its config)."""
        tokens = block_tokens(sizes, (height // patch_size) * (width // patch_size)) + sizes.in_context_len
        return cls(sizes.hidden_size, sizes.num_heads, sizes.mlp_ratio, max(1, tokens), images, trains)

    def first(self) -> "BlockWork":
        """Return the least of it, and the narrowest, that is tried."""
        heads = max(1, min(self.num_heads, FIRST_WIDTH * self.num_heads // self.hidden_size))
        return replace(self._of_heads(heads), images=1, tokens=min(self.tokens, FIRST_TOKENS))

    def doubled(self, most: "BlockWork") -> "BlockWork":
        """Return twice the heads, tokens or images, up to those of `most`."""
        rows, most_rows = self.images * self.tokens, most.images * most.tokens
        if self.num_heads < most.num_heads and rows >= min(SOME_ROWS, most_rows):
            return self._of_heads(min(2 * self.num_heads, most.num_heads))
        if self.tokens < most.tokens:
            return replace(self, tokens=min(2 * self.tokens, most.tokens))
        return replace(self, images=min(2 * self.images, most.images))

    @property
    def block(self) -> "BlockWork":
        """The same for all work of a block."""
        return replace(self, tokens=1, images=1)

    def _of_heads(self, heads: int) -> "BlockWork":
        return replace(self, num_heads=heads, hidden_size=heads * (self.hidden_size // self.num_heads))


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of the same work of a block in float32, and in bf16 (autocast)."""

    no: float
    bf16: float

    @property
    def faster(self) -> str:
        return "bf16" if self.bf16 < self.no else "no"

    def in_words(self) -> str:
        """Return which precision is faster, and how many times."""
        ordered = sorted([(self.no, "float32"), (self.bf16, "bf16")])
        (least, faster), (most, slower) = ordered
        return f"{faster} is {most / least:.1f} times as fast as {slower} here"


def settle(accelerator, given: str | None, work: BlockWork, kept: str | None = None) -> tuple[str, BlockTimes | None]:
    """Return one precision for all processes, and the times that speak for it or against it, where they were looked up.

    On a CPU the main process compares, while the others wait, where all have units for bf16. What is `given` counts,
    then accelerate's configuration, then what was `kept` of an earlier start, then the times. Raises `UserError` as
    `chosen_precision`.
    """
    if given is not None or accelerator.device.type != "cpu":
        return chosen_precision(given), None
    can_compare = all(gather_object([has_bf16(accelerator.device)]))

    def choose() -> tuple[str, BlockTimes | None]:
        asked = chosen_precision()
        if not can_compare:
            return asked or "no", None
        if asked is None and kept in ("no", *DTYPES):
            return kept, None
        times = times_of(work)
        return asked or times.faster, times

    return on_main(accelerator, choose)


def settle_accelerator(accelerator, given: str | None, work: BlockWork, kept: str | None = None) -> BlockTimes | None:
    """Let an accelerator of a CPU, which has prepared nothing yet, compute as `settle` says; return the times.

    Where a precision is `given`, or on a GPU, it was built with the right one.
    """
    if given is not None or accelerator.device.type != "cpu":
        return None
    precision, times = settle(accelerator, None, work, kept)
    # Accelerate wants it before there are processes that could agree on it, and offers no other way to change it.
    accelerator.state._mixed_precision, accelerator.native_amp = precision, precision == "bf16"
    return times


def times_of(work: BlockWork) -> BlockTimes:
    """Return the times of this CPU, as they were found before, or compared now and remembered."""
    cpu, file = torch.device("cpu"), None
    of_machine = (kind_of(cpu), json.dumps(capabilities(), sort_keys=True, default=str), str(torch.get_num_threads()))
    with contextlib.suppress(RuntimeError):  # no home folder
        file = findings_file("precision", *of_machine, torch.__version__, __version__, str(work))
    if file and (known := _parsed(read_findings(file))):
        return known
    block_of = lru_cache(maxsize=1)(partial(constant_block, device=cpu))
    times = compare(lambda name, some: run_block(block_of(some.block), name, some), work, BUDGET_S)
    if file:
        write_findings(file, json.dumps(vars(times)).encode())
    return times


def _parsed(data: pa.Buffer | None) -> BlockTimes | None:
    try:
        return None if data is None else BlockTimes(**json.loads(bytes(data)))
    except (ValueError, TypeError):  # of another version
        return None


def compare(
    run: Callable[[str, BlockWork], None],
    work: BlockWork,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
    own_clock: Callable[[], float] | None = None,
) -> BlockTimes:
    """Run a block in both precisions by turns, on more and more of the `work`; return the least times of the most.

    Nothing is begun that would end after `budget_s`, if it takes as long as before. What other programs take of a
    processor that is not idle counts as time, but not for the comparison (`own_clock`).
    """
    own_clock = own_clock or clock_of_thread()
    end, tried, times = clock() + budget_s, work.first(), {}
    while True:
        began = clock()
        for precision in ("no", "bf16"):
            began_here = own_clock()
            run(precision, tried)
            seconds = own_clock() - began_here
            times[precision] = min(seconds, times.get(precision, seconds))
        turn_s, left = clock() - began, end - clock()
        if tried != work and left >= LARGER_TURNS * turn_s:
            tried, times = tried.doubled(work), {}
        elif left < turn_s:
            return BlockTimes(**times)


def clock_of_thread() -> Callable[[], float]:
    """Return the clock of this thread's own work; the wall clock, where that goes in steps of 10 ms or more."""
    return time.thread_time if time.thread_time() < time.thread_time() else time.perf_counter


def constant_block(sizes, device: torch.device) -> JiTBlock:
    """Return a block of these sizes to try; its weights are constant, so that nothing is drawn at random."""
    with torch.device("meta"):
        block = JiTBlock(sizes.hidden_size, sizes.num_heads, sizes.mlp_ratio, 0.0, 0.0)
    block.to_empty(device=device)
    for parameter in block.parameters():
        nn.init.constant_(parameter, 0.01)
    return block


def run_block(block: JiTBlock, precision: str, work: BlockWork) -> None:
    """Pass the work through a block on the CPU once."""
    rope = rope_table(work.hidden_size // work.num_heads, (1, work.tokens), (1, work.tokens), 0, torch.device("cpu"))
    x = torch.ones(work.images, work.tokens, work.hidden_size, requires_grad=work.trains)
    dtype = DTYPES.get(precision)
    with torch.set_grad_enabled(work.trains), torch.autocast("cpu", dtype, enabled=dtype is not None):
        total = block(x, x[:, 0], rope).sum()
    if work.trains:
        total.backward()
        block.zero_grad()
