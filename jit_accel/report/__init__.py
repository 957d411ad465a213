"""Show runs on a page: `python -m jit_accel.report runs/mine`, or several folders to compare."""

import argparse
from pathlib import Path

from jit_accel.base.errors import check_places
from jit_accel.base.folder_lock import held_by_parent
from jit_accel.config.command_line import exit_code_of
from jit_accel.monitor.log import REPORT_FILE

COMPARISON_FILE = "comparison.html"


def main(argv: list[str] | None = None) -> int:
    """Write the page of the folders on the command line. Returns the exit code: 0 done, 2 wrong folders or output."""
    args = parse_args(argv)

    def run() -> int:
        check_places({"output": args.output and str(args.output)})
        # Only now, so that --help and wrong flags answer at once.
        from jit_accel.report.page import build_page, write_page
        from jit_accel.report.runs import read_runs

        with held_by_parent(args.folders[0]):  # a training whose machine sleeps may lose its folder meanwhile
            runs = read_runs(args.folders)
            path = args.output or (runs[0].folder / REPORT_FILE if len(runs) == 1 else Path(COMPARISON_FILE))
            write_page(build_page(runs), path)
        print(f"Report: {path}")
        return 0

    return exit_code_of(run)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises `SystemExit`: `--help` (0), an unknown or missing argument (2)."""
    parser = argparse.ArgumentParser(
        prog="python -m jit_accel.report",
        description="Show a run, or compare several, on one HTML page that needs no network: loss curves, samples, "
        "settings, and what looked wrong.",
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="output folder of a run")
    where = f"where to write the page (default: DIR/{REPORT_FILE}; of several folders, {COMPARISON_FILE} here)"
    parser.add_argument("--output", metavar="FILE", type=Path, help=where)
    return parser.parse_args(argv)
