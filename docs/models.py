"""Writes docs/models.md: tries every architecture with a tiny random model on vLLM's CPU backend. Takes minutes.

python -m docs.models [ROW[:WAY] ...]    # those anew, the others as they were found before; without names, all
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from tests.integration.support import server
from tests.integration.support.forked import ForkedProcess
from tests.integration.support.try_model import ENVIRONMENT, IMAGES, Found, read
from tests.support.architectures import ARCHITECTURES

FOLDER = Path(__file__).parent
PAGE, RESULTS = FOLDER / "models.md", FOLDER / "models.json"
WAYS = ("adapter", "columns", "merge")
_KINDS = {"dense": "text", "hybrid": "text, hybrid layers", "multimodal": "text of a multimodal checkpoint"}
_KINDS["mixture"] = "text, mixture of experts"
_LIMIT_S = 600.0


def main(rows: list[str]) -> None:
    """Try rows and write both files."""
    results = json.loads(RESULTS.read_text())["found"] if RESULTS.is_file() else {}
    for row, _, way in (name.partition(":") for name in rows or ARCHITECTURES):
        for each in [way] if way else [*WAYS, *([IMAGES] if ARCHITECTURES[row].sees else [])]:
            found = try_row(row, each)
            results.setdefault(row, {})[each] = asdict(found)
            print(row, each, found.refused or f"{found.gap:.1e}", flush=True)
    document = {"versions": {name: version(name) for name in ("transformers", "peft", "torch")}, "found": results}
    document["versions"]["vllm"] = _vllm_version()
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    PAGE.write_text(page(document))


def try_row(row: str, way: str) -> Found:
    """Try a row in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        log, environment = Path(folder, "log"), {**os.environ, **server.ENVIRONMENT, **ENVIRONMENT}
        process = ForkedProcess("tests.integration.support.try_model", [row, way, folder], log, environment)
        process.wait(_LIMIT_S)
        if Path(folder, "found.json").is_file():
            return read(Path(folder))
        return Found(refused=f"the engine died: {log.read_text(errors='replace').splitlines()[-1]}")


def page(document: dict) -> str:
    """Return the page, from what was found."""
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    rows = [
        f"| {row} | `{ARCHITECTURES[row].name}` | {_KINDS[ARCHITECTURES[row].kind]} | {_targets(found)} | "
        + " | ".join(_word(row, found[way]) if way in found else "not tried" for way in WAYS)
        + f" | {_seen(row, found)} | not tried | not tried |"
        for row, found in document["found"].items()
        if row in ARCHITECTURES
    ]
    columns = ["model", "architecture", "what is trained", "LoRA on", *(f"`--apply {way}`" for way in WAYS)]
    columns += ["images", "tensor parallelism", "QLoRA"]
    refused = [
        f"- {row}, {'images' if way == IMAGES else f'`--apply {way}`'}: {found[way]['refused']}"
        for row, found in document["found"].items()
        for way in (*WAYS, IMAGES)
        if way in found and found[way]["refused"]
    ]
    return "\n".join(
        [
            "<!-- Written by `python -m docs.models`; do not edit. -->",
            "",
            "# Models",
            "",
            "Each architecture was tried with a tiny random model in float32, on vLLM's CPU backend: an adapter on all "
            "linear layers that can be served is pushed, tokens are sampled with it and without, and their served "
            "logprobs are compared with a Hugging Face forward of base and adapter. In brackets: the largest "
            "difference, in nats; *yes*: below 1e-4. Where vLLM's CPU backend computes in bfloat16 only (gated delta "
            "nets), below a seventh of what the adapter moves. *Images*: the same with `--apply adapter` and a picture "
            "in each prompt, where another picture gives other logprobs; transformers computes in float64 there. It "
            "says nothing about GPUs, tensor parallelism or quantization (not tried here). Versions: " + versions + ".",
            "",
            "| " + " | ".join(columns) + " |",
            "|" + " --- |" * len(columns),
            *rows,
            "",
            *(["Where it does not work:", "", *refused, ""] if refused else []),
            "Text of multimodal checkpoints: the server is started with `--language-model-only`. With images and "
            "without, LoRA targets (`all-linear` too) mean the language model. The exported adapter names modules as "
            "transformers' class of the whole checkpoint does (`model.language_model.layers...`), so PEFT loads it on "
            "that (`AutoModelForImageTextToText`), as the export's README says.",
            "",
            "Mixtures of experts: adapters on all linear layers outside MLPs, which is what `all-linear` means there "
            "(also in a multimodal checkpoint), and by their names on shared experts where PEFT takes these for no "
            "others (Qwen2-MoE). Experts and routers are refused by name, and have no slots.",
            "",
        ]
    )


def _targets(found: dict) -> str:
    targets: list[str] = next((found[way]["targets"] for way in WAYS if way in found and found[way]["targets"]), [])
    return ", ".join(f"`{name}`" for name in targets) or "-"


def _seen(row: str, found: dict) -> str:
    if not ARCHITECTURES[row].sees:
        return "-"
    return _word(row, found[IMAGES]) if IMAGES in found else "not tried"


def _word(row: str, found: dict) -> str:
    if found["refused"]:
        return "no"
    gap = max(found["gap"], found["base_gap"])
    return f"yes ({gap:.0e})" if Found(**found).agrees(row) else f"differs by {gap:.1g}"


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


if __name__ == "__main__":
    main(sys.argv[1:])
