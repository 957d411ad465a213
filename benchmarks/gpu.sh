#!/usr/bin/env bash
# What this machine's GPUs do, in at most 8 minutes once the environment is there: the tests that need one, then images/s,
# MFU and memory of JiT-B, L and H/16 at 256 px, eager and compiled, as a table.
#   bash benchmarks/gpu.sh                                makes a virtual environment where there is none
#   JIT_ACCEL_PYTHON=python bash benchmarks/gpu.sh        uses an environment that has everything
#   bash benchmarks/gpu.sh --device cpu                   the same at tiny sizes, to try it without a GPU
# More flags (--budget_s, --output_dir, ...): bash benchmarks/gpu.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/common.sh"
set_up

# As in the environment that a training has, whatever the folder that this is called from.
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
exec python "$REPOSITORY/benchmarks/gpu.py" "$@"
