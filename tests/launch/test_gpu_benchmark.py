"""benchmarks/gpu.sh, tried without a GPU: tests, each row of the table, profiles, and what there is no time for."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "gpu.sh"
COLUMNS = "card | model | step | precision | images a GPU | images/s | MFU | GiB"
TESTS = "tests/data/test_ready_batches.py -k arrives_mirrored"


def run(out: Path, *flags: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """Return what came of it, and the cells of the table."""
    environment = os.environ | {"JIT_ACCEL_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(SCRIPT), "--device", "cpu", "--output_dir", str(out), "--tests", TESTS, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    table = (out / "table.md").read_text()
    assert table in done.stdout, done.stdout + done.stderr
    head, _, *rows = table.splitlines()
    assert head == f"| {COLUMNS} |"
    return done, [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.multiprocess
def test_it_tests_measures_and_leaves_profiles(tmp_path):
    done, rows = run(tmp_path, "--budget_s", "3600")  # a machine may be busy
    said = "\n".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert done.returncode == 0, done.stdout + said
    assert "Tests: 1 passed, 1 skipped" in done.stdout
    assert [row[:5] for row in rows] == [
        ["cpu x 2", "JiT-Ti/16", "eager", "no", "2"],
        ["cpu", "JiT-Ti/16", "compiled", "no", "2"],
    ]
    assert all(float(row[5]) > 0 and row[6] == "–" and float(row[7]) > 0 for row in rows)
    profiles = sorted((tmp_path / "profiles").iterdir())
    assert [path.name for path in profiles] == ["JiT-Ti_16_compiled.json.gz", "JiT-Ti_16_eager_x2.json.gz"]
    for profile in profiles:
        trace = json.loads(gzip.decompress(profile.read_bytes()))
        names = {event["name"] for event in trace["traceEvents"]}
        assert {"aten::mm", "aten::_fused_adamw_"} <= names, sorted(names)


def test_what_there_is_no_time_for_is_said(tmp_path):
    done, rows = run(tmp_path, "--budget_s", "0")
    assert done.returncode == 1
    assert "Tests: not finished within" in done.stdout
    assert [row[5] for row in rows] == ["no time was left"] * 2
