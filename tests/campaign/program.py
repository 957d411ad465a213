"""Many campaigns: trainings of all kinds, each struck by faults until its end, and what was found."""

import argparse
import multiprocessing
import random
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from campaign.disturbed import Campaign
from campaign.judge import Broken
from campaign.kinds import KINDS, LAYOUTS, Kind, make_data


@dataclass
class Outcome:
    """What became of a campaign: how often which fault struck, and what is wrong, if anything."""

    number: int
    kind: Kind
    struck: Counter = field(default_factory=Counter)
    starts: int = 0
    problem: str = ""


def orders(seed: int) -> Iterator[tuple[Kind, bool]]:
    """Yield kinds of training without end, each equally often; every third goes on with other numbers of processes."""
    chance = random.Random(seed)
    while True:
        each = [(kind, is_elastic) for kind in KINDS for is_elastic in (False, False, True)]
        yield from chance.sample(each, len(each))


def run_one(number: int, kind: Kind, is_elastic: bool, seed: int, work: Path) -> Outcome:
    campaign = Campaign(kind, f"{seed}/{number}", work, is_elastic)
    problem = ""
    try:
        campaign.run()
    except Broken as broken:
        problem = "\n".join([str(broken), *campaign.story, f"The folder: {campaign.place}"])
    except Exception:
        problem = "\n".join([traceback.format_exc(), *campaign.story, f"The folder: {campaign.place}"])
    return Outcome(number, kind, campaign.struck, campaign.starts, problem)


def table(outcomes: list[Outcome]) -> str:
    """Return how often each fault struck each kind of division, as Markdown."""
    names = sorted({name for outcome in outcomes for name in outcome.struck})
    lines = ["| fault | " + " | ".join(layout.name for layout in LAYOUTS) + " | all |"]
    lines.append("| --- |" + " ---: |" * (len(LAYOUTS) + 1))
    for name in [*names, "all"]:
        counts = []
        for layout in LAYOUTS:
            struck = [outcome.struck for outcome in outcomes if outcome.kind.layout == layout]
            counts.append(sum(each.total() if name == "all" else each[name] for each in struck))
        lines.append(f"| {name} | " + " | ".join(map(str, [*counts, sum(counts)])) + " |")
    return "\n".join(lines)


def summary(outcomes: list[Outcome]) -> str:
    parts = {
        "trainings": [str(outcome.kind.layout.name) for outcome in outcomes],
        "optimizers": [outcome.kind.optimizer for outcome in outcomes],
        "data": [outcome.kind.data for outcome in outcomes],
    }
    lines = [f"{what}: {dict(sorted(Counter(values).items()))}" for what, values in parts.items()]
    lines.append(f"starts: {sum(outcome.starts for outcome in outcomes)}")
    return "\n".join([*lines, f"broken: {[outcome.number for outcome in outcomes if outcome.problem]}"])


def run_many(numbered: Iterator[tuple[int, tuple[Kind, bool]]], args: argparse.Namespace, work: Path) -> list[Outcome]:
    """Run campaigns, so many at once, until so many faults have struck, or the time is over."""
    outcomes, running, ends = [], set(), time.monotonic() + 60 * args.minutes
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        while True:
            is_enough = sum(o.struck.total() for o in outcomes) >= args.faults or time.monotonic() > ends
            while not is_enough and len(running) < args.jobs:
                if (order := next(numbered, None)) is None:
                    break
                number, (kind, is_elastic) = order
                running.add(pool.submit(run_one, number, kind, is_elastic, args.seed, work))
            if not running:
                return outcomes
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                outcomes.append(outcome := future.result())
                total = sum(o.struck.total() for o in outcomes)
                what = f"{outcome.number}: {outcome.kind.name}: {outcome.struck.total()} faults"
                print(f"{time.strftime('%H:%M:%S')} {what}; {total} so far", flush=True)
                if outcome.problem:
                    command = f"python tests/campaign --seed {args.seed} --only {outcome.number}"
                    print(f"BROKEN {what}\n{outcome.problem}\nAgain: {command}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/campaign", description=__doc__)
    parser.add_argument("--faults", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="campaigns at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=600, help="begin no campaign later (default: %(default)s)")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the campaigns to run (default: all)")
    parser.add_argument("--work", type=Path, help="a folder for data, undisturbed trainings and what was broken")
    args = parser.parse_args()
    work = (args.work or Path(tempfile.mkdtemp(prefix="campaign_"))).absolute()
    if not (work / "data").exists():
        make_data(work / "data")
    drawn = zip(count(), orders(args.seed))
    if args.only:
        first = [next(drawn) for _ in range(max(args.only) + 1)]
        drawn = iter([first[number] for number in args.only])
    outcomes = run_many(drawn, args, work)
    print(f"{table(outcomes)}\n\n{summary(outcomes)}")
    is_broken = any(outcome.problem for outcome in outcomes)
    if not is_broken and not args.work:
        shutil.rmtree(work)
    return int(is_broken)
