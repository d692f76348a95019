"""README.md of an exported model or adapter: what it is, how it was made, how to load it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from learner.adapters.stored import StoredAdapter

#: In the card of everything that `learner export` has written.
MARK = "lockstep-rl"


def model_card(adapter: StoredAdapter, dtype: str | None) -> str:
    """The card as Markdown with the hub's YAML on top.

    Args:
        adapter: its `config` names the base model.
        dtype: of a merged model's weights; None: the adapter alone.
    """
    base = str(adapter.config["base_model_name_or_path"])
    head: dict[str, Any] = {
        "library_name": "transformers" if dtype else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "grpo", "trl", MARK],
    }
    if not Path(base).exists():  # the hub's page links to it
        head |= {"base_model": base, "base_model_relation": "finetune" if dtype else "adapter"}
    name = adapter.run.get("run_id") or f"{Path(base).name}-lora"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        _sentence(base, dtype),
        _table(_facts(adapter, base)),
        *_evals(adapter.run),
        "## Load it",
        _loading(base, dtype),
    ]
    return "\n\n".join(parts) + "\n"


def _sentence(base: str, dtype: str | None) -> str:
    if dtype is None:
        return f"A LoRA adapter for `{base}`, trained with GRPO."
    return f"`{base}` with a LoRA adapter from GRPO merged into its weights (in float32, then rounded to {dtype})."


def _facts(adapter: StoredAdapter, base: str) -> list[tuple[str, str]]:
    run, config = adapter.run, adapter.config
    revision = config.get("revision")
    ranks = Counter(module.rank for module in adapter.modules.values())
    kinds = sorted({module.rsplit(".", 1)[-1] for module in adapter.modules})
    facts = {
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
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _evals(run: dict[str, Any]) -> list[str]:
    if run.get("eval_before") is None or run.get("eval_after") is None:
        return []
    return [
        f"Mean reward of {run.get('eval_questions')} questions that training never saw: {run['eval_before']:.3f} "
        f"before training, {run['eval_after']:.3f} after it."
    ]


def _loading(base: str, dtype: str | None) -> str:
    if dtype is None:
        return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "THIS_DIRECTORY")
```

```bash
vllm serve {base} --enable-lora --max-lora-rank RANK --lora-modules policy=THIS_DIRECTORY
```"""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")
```

```bash
vllm serve THIS_DIRECTORY
```"""
