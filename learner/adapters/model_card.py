"""README.md of an exported model or adapter: its origin, and how to load it."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from learner.adapters.stored import PROCESSOR_FILES, StoredAdapter
from shared.module_names import LANGUAGE_MODELS, encoders
from shared.weights import SERVED_RANKS, served_rank

#: In every card that `learner export` has written.
MARK = "lockstep-rl"
_LOAD_ADAPTER = """```python
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"{arguments}), "THIS_DIRECTORY")
```

```bash
vllm serve {base}{flags} --enable-lora --max-lora-rank {rank} --lora-modules policy=THIS_DIRECTORY
```"""
_LOAD_MERGED = """```python
from transformers import {auto}, {auto_processor}

model = {auto}.from_pretrained("THIS_DIRECTORY", dtype="{dtype}"{arguments})
{processor} = {auto_processor}.from_pretrained("THIS_DIRECTORY"{arguments})
```

```bash
vllm serve THIS_DIRECTORY{flags}
```"""


def model_card(adapter: StoredAdapter, folder: Path, dtype: str | None) -> str:
    """Return the card as Markdown with the hub's YAML on top.

    Args:
        adapter: its `config` names the base model.
        folder: what has been exported.
        dtype: of a merged model's weights; None for the adapter alone.
    """
    base, run = str(adapter.config["base_model_name_or_path"]), adapter.run
    if dtype:
        sees = bool(encoders(json.loads((folder / "config.json").read_text())))
    else:  # an adapter fits the class whose modules have its names, and a base with encoders may be loaded without them
        sees = any(part in LANGUAGE_MODELS for name in adapter.modules for part in name.split("."))
    head: dict[str, Any] = {
        "library_name": "transformers" if dtype else "peft",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "tags": ["lora", "grpo", "trl", MARK],
    }
    if not Path(base).exists():  # the hub's page links to it
        head |= {"base_model": base, "base_model_relation": "finetune" if dtype else "adapter"}
    origin = f"`{base}` with a LoRA adapter from GRPO merged into its weights (in float32, then rounded to {dtype})."
    if dtype is None:
        origin = f"A LoRA adapter for `{base}`, trained with GRPO."
    title = run.get("run_id") or f"{Path(base).name}-lora"
    table = [f"| {name} | {value} |" for name, value in _facts(adapter, base).items() if value not in (None, "")]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {title}\n\n{origin}",
        "\n".join(["| | |", "| --- | --- |", *table]),
    ]
    if run.get("eval_before") is not None and run.get("eval_after") is not None:
        parts.append(
            f"Mean reward of {run.get('eval_questions')} held-out questions: {run['eval_before']:.3f} before training, "
            f"{run['eval_after']:.3f} after it."
        )
    rank = max(module.rank for module in adapter.modules.values())
    served = served_rank(rank) if rank <= SERVED_RANKS[-1] else rank
    auto = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    options = _loading_options(
        adapter, folder if dtype else Path(base), None if dtype else adapter.config.get("revision")
    )
    loading = _LOAD_ADAPTER.format(auto=auto, base=base, rank=served, **options)
    if dtype:
        processor = "processor" if any((folder / name).is_file() for name in PROCESSOR_FILES) else "tokenizer"
        loading = _LOAD_MERGED.format(
            auto=auto, dtype=dtype, processor=processor, auto_processor=f"Auto{processor.capitalize()}", **options
        )
    return "\n\n".join([*parts, "## Load it", loading]) + "\n"


def _loading_options(adapter: StoredAdapter, model: Path, revision: str | None) -> dict[str, str]:
    """Return the options that loading a model needs: `arguments` in Python, `flags` of vLLM."""
    has_code = bool(adapter.run.get("trust_remote_code"))
    with suppress(OSError, ValueError):  # it may be on the hub
        has_code |= "auto_map" in json.loads((model / "config.json").read_text())
    arguments = f', revision="{revision}"' if revision else ""
    flags = f" --revision {revision}" if revision else ""
    if has_code:
        arguments, flags = arguments + ", trust_remote_code=True", flags + " --trust-remote-code"
    return {"arguments": arguments, "flags": flags}


def _facts(adapter: StoredAdapter, base: str) -> dict[str, Any]:
    run, config = adapter.run, adapter.config
    revision = config.get("revision")
    ranks = Counter(module.rank for module in adapter.modules.values())
    kinds = sorted({module.rsplit(".", 1)[-1] for module in adapter.modules})
    return {
        "base model": f"`{base}`" + (f", revision {revision}" if revision else ""),
        "fingerprint of its weights": run.get("base_weights"),
        "task": run.get("task"),
        "optimizer steps": adapter.step,
        "completions": run.get("completions") if adapter.step == run.get("steps") else None,
        "LoRA rank": ", ".join(f"{rank}" if len(ranks) == 1 else f"{rank} ({n} modules)" for rank, n in ranks.items()),
        "LoRA alpha": f"{config.get('lora_alpha')}" + (", rsLoRA" if config.get("use_rslora") else ""),
        "alpha by module": config.get("alpha_pattern") or None,
        "adapted": f"{len(adapter.modules)} linear layers: {', '.join(kinds)}",
        "versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()),
    }
