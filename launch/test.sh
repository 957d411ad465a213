#!/usr/bin/env bash
# Check everything: style, the direction of imports, and all tests. Some twelve minutes on 2 cores.
#   bash launch/test.sh                         all of it
#   bash launch/test.sh -x tests/train/test_optimizers.py  arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
set_up

trap 'echo "launch/test.sh: FAILED in: $BASH_COMMAND" >&2' ERR
unset PYTHONDONTWRITEBYTECODE # each process would compile the package anew
# One thread a process: two test processes with two threads each would wait for each other on two cores.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

ruff check .
ruff format --check .
lint-imports
# A third of the files to each of three (some tests wait), so that what a file's tests share is made once; then they take
# from each other.
python -m pytest -n 3 --dist worksteal "$@"
