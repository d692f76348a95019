"""README.md of an exported model or adapter: its origin, and how to load it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from learner.adapters.stored import StoredAdapter
from shared.weights import SERVED_RANKS, served_rank

#: In every card that `learner export` has written.
MARK = "lockstep-rl"
_LOAD_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "THIS_DIRECTORY")
```

```bash
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules policy=THIS_DIRECTORY
```"""
_LOAD_MERGED = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")
```

```bash
vllm serve THIS_DIRECTORY
```"""


def model_card(adapter: StoredAdapter, dtype: str | None) -> str:
    """Return the card as Markdown with the hub's YAML on top.

    Args:
        adapter: its `config` names the base model.
        dtype: of a merged model's weights; None for the adapter alone.
    """
    base, run = str(adapter.config["base_model_name_or_path"]), adapter.run
    head: dict[str, Any] = {
        "library_name": "transformers" if dtype else "peft",
        "pipeline_tag": "text-generation",
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
    loading = _LOAD_MERGED.format(dtype=dtype) if dtype else _LOAD_ADAPTER.format(base=base, rank=served)
    return "\n\n".join([*parts, "## Load it", loading]) + "\n"


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
