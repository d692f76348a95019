#!/usr/bin/env bash
# Makes .venv/ with all that the demo and the tests need on a CPU (`make setup`). A second call reuses what is there.
#
#   PYTHON=python3.11                 which Python makes the environment
#   PIP_FIND_LINKS, PIP_INDEX_URL ... pip's own settings hold throughout
#   LOCKSTEP_TORCH_INDEX=URL          where to look for torch's CPU build if those do not have it
set -euo pipefail
cd "$(dirname "$0")/.."

list=deploy/constraints-cpu.txt
stamp=.venv/.lockstep-setup
python=${PYTHON:-python3}
torch_index=${LOCKSTEP_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# What the environment is made from. Its place counts too: scripts in an environment name their interpreter in full.
fingerprint() { { pwd; cat "$list" pyproject.toml; } | cksum; }

wanted=$(fingerprint)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && .venv/bin/python -c '' 2> /dev/null; then
  exit 0
fi

command -v "$python" > /dev/null || fail "no $python here; Python 3.11, 3.12 or 3.13 is needed (choose with PYTHON=...)"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
  || fail "$("$python" --version) does not do; Python 3.11, 3.12 or 3.13 is needed (choose with PYTHON=python3.11)"
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] \
  || fail "the pinned CPU environment is for Linux on x86_64; elsewhere see the README on installing by hand"

if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
  say "making .venv with $("$python" --version)"
  rm -rf .venv
  "$python" -m venv .venv || fail "no environment could be made (on Debian and Ubuntu: apt install python3-venv)"
fi
pip() { PYTHONUNBUFFERED=1 .venv/bin/python -m pip --disable-pip-version-check "$@"; }
pinned() { grep -E "^$1==" "$list"; }
# From pip's many lines one that moves on a terminal, and one for every 50 packages elsewhere.
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

# Every step takes exactly what the list names (--no-deps), so that nothing unpinned is drawn in. Packages that are
# there already are left alone.
torch=$(pinned torch)
say "$torch"
if ! pip install --quiet --no-deps --no-compile --retries 1 "$torch" 2> .venv/torch.log; then
  say "not on the configured indexes; trying $torch_index"
  pip install --quiet --no-deps --no-compile --index-url "$torch_index" "$torch" || {
    cat .venv/torch.log >&2
    fail "no $torch: neither on the configured indexes (above) nor at $torch_index"
  }
fi
rm -f .venv/torch.log

packages=$(grep -c '==' "$list")
say "$packages packages of $list (about 2 GB; some minutes the first time)"
# Those that come as source are built by the pinned setuptools, not by whatever an isolated build would download.
pip install --quiet --no-deps "$(pinned setuptools)"
pip install --no-deps --no-build-isolation --no-compile --requirement "$list" | progress
pip install --quiet --no-deps --no-build-isolation --editable .

# On all cores, where pip would use one. A server imports vLLM in three processes; without bytecode each compiles it.
say "compiling to bytecode"
.venv/bin/python -m compileall -q -j 0 .venv/lib > /dev/null 2>&1 || true  # some packages carry files for other Pythons

say "checking that it imports"
.venv/bin/python -c 'import torch, vllm, trl, learner, rollout_server, shared' 2> .venv/import.log \
  || { cat .venv/import.log >&2; fail "the environment is installed but does not import (above)"; }
rm -f .venv/import.log
printf '%s\n' "$wanted" > "$stamp"
say "done; activate with: source .venv/bin/activate"
