# shellcheck shell=bash
# Sourced by the other scripts, which then call one of:
#   set_up            make the virtual environment if it is not there yet, install into it, and use it
#   use_environment   use what is there, install nothing
# Both put the environment's commands (python, accelerate, ...) first in PATH.
#
#   JIT_ACCEL_PYTHON  an interpreter that has everything; nothing is installed
#   JIT_ACCEL_VENV    where the virtual environment is (default: .venv beside setup.cfg)

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${JIT_ACCEL_VENV:-$REPOSITORY/.venv}"
# As in setup.cfg: an older torch that is already there is not kept.
OLDEST_TORCH="2.7"

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

use_environment() {
  local python="${JIT_ACCEL_PYTHON:-}"
  if [ -n "$python" ]; then
    python="$(command -v "$python")" || die "JIT_ACCEL_PYTHON=$JIT_ACCEL_PYTHON: no such program."
    PATH="$(dirname "$python"):$PATH"
  elif [ -x "$VENV/bin/accelerate" ]; then
    PATH="$VENV/bin:$PATH"
  fi
  export PATH
  command -v accelerate >/dev/null ||
    die "accelerate is not installed: run 'bash launch/quickstart.sh' once, or 'pip install -e .' into the active" \
      "environment."
}

set_up() {
  if [ -z "${JIT_ACCEL_PYTHON:-}" ]; then
    if ! is_installed; then
      make_venv
      install
    fi
    cat "$VENV/.torch_choice"
  fi
  use_environment
}

# What the installation depends on; another answer than the one kept in the stamp means: install again.
fingerprint() {
  echo "$REPOSITORY $("$VENV/bin/python" -V 2>&1) $(cat "$REPOSITORY/setup.cfg" "$REPOSITORY/constraints.txt" | cksum)"
}

is_installed() {
  [ -f "$VENV/.stamp" ] && [ "$(cat "$VENV/.stamp")" = "$(fingerprint)" ]
}

make_venv() {
  if is_python "$VENV/bin/python"; then
    return # an earlier installation that was interrupted, or is out of date
  fi
  if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ]; then
    die "$VENV is there but is no virtual environment: move it away, or set JIT_ACCEL_VENV to another folder."
  fi
  local python flags=(--clear)
  python="$(find_python)" || exit 1
  # An already installed torch (a container's, a cluster's) is kept: it fits the machine's driver.
  if has_torch "$python"; then
    flags+=(--system-site-packages)
  fi
  echo "Making the virtual environment $VENV with $("$python" -V) ($python)"
  "$python" -m venv "${flags[@]}" "$VENV" || die "$python -m venv failed, see above."
}

install() {
  local torch constraints="$VENV/constraints.txt" quiet=()
  rm -f "$VENV/.stamp"
  cp "$REPOSITORY/constraints.txt" "$constraints"
  # A torch that this script installed earlier follows constraints.txt; any other stays as it is.
  torch="$(torch_version "$VENV/bin/python")"
  if has_torch "$VENV/bin/python" && ! grep -qsxF "${torch%%+*}" "$VENV/.torch_installed"; then
    sed "s/^torch==.*/torch==$torch/" "$REPOSITORY/constraints.txt" >"$constraints"
  else
    torch=""
    sed -n "s/^torch==//p" "$REPOSITORY/constraints.txt" >>"$VENV/.torch_installed"
  fi
  [ -t 1 ] || quiet=(--quiet)
  echo "Installing jit_accel and what it needs (a few minutes the first time) ..."
  "$VENV/bin/python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} \
    --constraint "$constraints" --editable "${REPOSITORY}[fast,wandb,test]" ||
    die "pip could not install everything, see above. It needs a network connection (or a local package index" \
      "in pip's own configuration) and some GB of free space. Run the script again to go on."
  # Without what it asks for: it needs no torchvision here, and one that does not fit torch breaks other packages.
  "$VENV/bin/python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} --no-deps \
    "$(grep '^torch-fidelity==' "$constraints")" || die "pip could not install torch-fidelity, see above."
  describe_torch "${torch:+kept, it was already installed}" >"$VENV/.torch_choice" ||
    die "torch is installed but cannot be imported, see above. Remove $VENV and run the script again."
  fingerprint >"$VENV/.stamp"
}

describe_torch() {
  "$VENV/bin/python" - "${1:-installed}" <<'PYTHON'
import sys, torch

cuda, hip = torch.version.cuda, torch.version.hip
build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
print(f"torch {torch.__version__} ({build} build, {sys.argv[1]})")
PYTHON
}

# The first Python >= 3.10 that already has torch, else the first.
find_python() {
  local name python first="" without_venv=""
  for name in python3.13 python3.12 python3.11 python3.10 python3 python; do
    python="$(base_of "$name")" || continue
    is_python "$python" || continue
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
      without_venv="${without_venv:-$python}"
      continue
    fi
    first="${first:-$python}"
    if has_torch "$python"; then
      echo "$python"
      return
    fi
  done
  if [ -n "$first" ]; then
    echo "$first"
  elif [ -n "$without_venv" ]; then
    die "$without_venv cannot make virtual environments. Install its venv package ('apt install python3-venv' on" \
      "Debian and Ubuntu) and run the script again."
  else
    die "no Python >= 3.10 found. Install one (such as 'apt install python3 python3-venv', 'brew install python'" \
      "or conda), or set JIT_ACCEL_PYTHON to one that has jit_accel installed."
  fi
}

# The interpreter behind an active virtual environment or a version manager's wrapper.
base_of() { "$1" -c 'import sys; print(getattr(sys, "_base_executable", "") or sys.executable)' 2>/dev/null; }

is_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# Version of the torch that this interpreter would import, or nothing.
torch_version() {
  "$1" - 2>/dev/null <<'PYTHON' || true
from importlib import metadata, util

print(metadata.version("torch") if util.find_spec("torch") else "")
PYTHON
}

has_torch() {
  local version
  version="$(torch_version "$1")"
  [ -n "$version" ] && "$1" - "$version" "$OLDEST_TORCH" <<'PYTHON'
import sys

have, need = ([int(part) for part in version.split(".")[:2]] for version in sys.argv[1:])
sys.exit(have < need)
PYTHON
}
