#!/usr/bin/env bash
# Makes .venv/ with all packages for the demo and the tests on a CPU (`make setup`). Reuses an environment that is up to
# date.
#
#   PYTHON=python3.11                 Python of the environment
#   PIP_FIND_LINKS, PIP_INDEX_URL ... pip's own settings apply
#   LOCKSTEP_TORCH_INDEX=URL          index for torch's CPU build if the configured indexes lack it
set -euo pipefail
cd "$(dirname "$0")/.."

list=deploy/constraints-cpu.txt
stamp=.venv/.lockstep-setup
python=${PYTHON:-python3}
torch_index=${LOCKSTEP_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# Includes the path: scripts in an environment contain the absolute path of their interpreter.
fingerprint() { { pwd; cat "$list" pyproject.toml; } | cksum; }

wanted=$(fingerprint)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && .venv/bin/python -c '' 2> /dev/null; then
  exit 0
fi

command -v "$python" > /dev/null || fail "no $python here; Python 3.11, 3.12 or 3.13 is needed (choose with PYTHON=...)"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
  || fail "$("$python" --version) is not supported; Python 3.11, 3.12 or 3.13 is needed (choose with PYTHON=python3.11)"
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] \
  || fail "the pinned CPU environment is for Linux on x86_64; elsewhere, pip install -e '.[learner]' may do, without a server"

if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
  say "making .venv with $("$python" --version)"
  rm -rf .venv
  "$python" -m venv .venv || fail "no environment could be made (on Debian and Ubuntu: apt install python3-venv)"
fi
pip() { PYTHONUNBUFFERED=1 .venv/bin/python -m pip --disable-pip-version-check "$@"; }
pinned() { grep -E "^$1==" "$list"; }
# Condense pip's output: one updating line on a terminal, a line for every 50 packages elsewhere.
progress() {
  awk -v all="$packages" -v tty="$([ -t 1 ] && echo 1)" '
    /^(Collecting|Processing|Requirement already satisfied)/ { n++; name = $1 == "Requirement" ? $4 : $2 }
    /^Installing collected/ { name = "writing them to .venv" }
    /^(Collecting|Processing|Installing collected)/ {
      if (tty) printf "\rsetup: %d of %d  %-50.50s", n, all, name
      else if (n % 50 == 0 || /^Installing/) printf "setup: %d of %d packages\n", n, all
      fflush()
    }
    END { if (tty && n) printf "\n" }'
}
rm -f "$stamp"

# Every step installs exactly the packages of the list (--no-deps), so nothing unpinned is pulled in. Installed packages
# are kept.
pinned torch > .venv/torch.txt
torch=$(cut -d ' ' -f 1 .venv/torch.txt)
say "$torch"
if ! pip install --quiet --no-deps --no-compile --retries 1 --requirement .venv/torch.txt 2> .venv/torch.log; then
  say "not on the configured indexes; trying $torch_index"
  pip install --quiet --no-deps --no-compile --index-url "$torch_index" --requirement .venv/torch.txt || {
    cat .venv/torch.log >&2
    fail "no $torch: neither on the configured indexes (above) nor at $torch_index"
  }
fi
rm -f .venv/torch.log .venv/torch.txt

packages=$(grep -c '==' "$list")
say "$packages packages of $list (about 2 GB; some minutes the first time)"
# Build source packages with the pinned setuptools instead of a version that an isolated build would download.
pinned setuptools > .venv/setuptools.txt
pip install --quiet --no-deps --require-hashes --requirement .venv/setuptools.txt
grep -v '^torch==' "$list" > .venv/others.txt
pip install --no-deps --require-hashes --no-build-isolation --no-compile --requirement .venv/others.txt | progress
rm -f .venv/setuptools.txt .venv/others.txt
pip install --quiet --no-deps --no-build-isolation --editable .

# On all cores; pip would use one. A server imports vLLM in three processes; without bytecode each compiles it.
say "compiling to bytecode"
.venv/bin/python -m compileall -q -j 0 .venv/lib > /dev/null 2>&1 || true  # some packages carry files for other Pythons

say "checking that it imports"
.venv/bin/python -c 'import torch, vllm, trl, learner, rollout_server, shared' 2> .venv/import.log \
  || { cat .venv/import.log >&2; fail "the environment is installed but does not import (above)"; }
rm -f .venv/import.log
printf '%s\n' "$wanted" > "$stamp"
say "done; activate with: source .venv/bin/activate"
