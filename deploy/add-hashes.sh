#!/usr/bin/env bash
# add-hashes.sh LIST PYTHON...: adds to each package of LIST the hashes of its files for these versions of Python (`make
# lock`), so that pip installs nothing else. Needs uv as $UV.
#
# torch's CPU build gets hashes only from its own index: files of $PIP_FIND_LINKS may be of another build.
set -euo pipefail

list=$1
shift
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

links=(--find-links "${LOCKSTEP_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}/torch/")
sed 's/ --hash.*//' "$list" > "$scratch/list.txt"
if [ -n "${PIP_FIND_LINKS:-}" ]; then
  links=()
  sed -i '/^torch==.*+/d' "$scratch/list.txt"
fi
for version in "$@"; do
  "$UV" pip compile "$scratch/list.txt" --no-deps --python-version "$version" --python-platform x86_64-manylinux_2_31 \
    ${links[@]+"${links[@]}"} --format pylock.toml --quiet --output-file "$scratch/pylock.py${version/./}.toml" > /dev/null
done

python3 - "$list" "$scratch"/pylock.*.toml <<'PYTHON'
import sys
import tomllib
from pathlib import Path

path, *locks = map(Path, sys.argv[1:])
hashes = {}
for lock in locks:
    for package in tomllib.loads(lock.read_text())["packages"]:
        files = package.get("wheels", []) + ([package["sdist"]] if "sdist" in package else [])
        found = hashes.setdefault(f"{package['name']}=={package['version']}", set())
        found |= {file["hashes"]["sha256"] for file in files if file["url"].startswith("https://")}
lines = []
for line in path.read_text().splitlines():
    package = line.partition(" ")[0]
    lines.append(" ".join([package, *(f"--hash=sha256:{digest}" for digest in sorted(hashes.get(package, ())))]))
path.write_text("".join(line + "\n" for line in lines))
PYTHON
