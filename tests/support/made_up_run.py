"""A run with everything that the page can show, and with hostile text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from learner.monitors.run_page import RunView
from learner.utils.atomic import write_atomically

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "</pre></article><img src=x onerror=\"document.title='owned'\">",
    "]]><svg onload=alert(1)><style>body{display:none}</style>",
    "\u202egnirts desrever\u202c \x00\x1b[31m null and escape",
    "W" * 400,
    "\ud800 a lone surrogate",
    "&lt;b&gt; &amp;amp; \"quotes\" 'too'",
]


def made_up_run(steps: int = 120, **changes: Any) -> RunView:
    """Make a run of `steps` optimizer steps with evaluations, two servers and completions."""
    view = RunView("gsm8k-3f2a1c", "Qwen/Qwen2.5-1.5B-Instruct", servers=SERVERS, settings=SETTINGS)
    for step in range(1, steps + 1):
        row = row_of(step, steps)
        view.table.add_step(row)
        for logs in logs_of(row):
            view.table.add_log(logs)
    view.batches = [batch_of(step) for step in range(1, steps + 1, max(steps // 20, 1))]
    for name, value in changes.items():
        setattr(view, name, value)
    return view


class RunWriter:
    """Writes a run directory step by step, as a training does."""

    def __init__(self, folder: Path, steps: int = 120, run_id: str = "gsm8k-3f2a1c") -> None:
        self.folder, self.steps, self.step = folder, steps, 0
        self._batches: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "logs.jsonl"):
            write_atomically(folder / name, "")
        self.state = {"run_id": run_id, "model": "m", "state": "training", "servers": SERVERS, "settings": SETTINGS}
        self.write_state("training")

    def write_state(self, state: str) -> None:
        self.state["state"] = state
        write_atomically(self.folder / "run.json", json.dumps(self.state))

    def go_on(self, count: int = 1, **changes: Any) -> None:
        """Write `count` more steps."""
        for _ in range(count):
            self.step += 1
            row = {**row_of(self.step, self.steps), **changes}
            with (self.folder / "metrics.jsonl").open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            with (self.folder / "logs.jsonl").open("a") as stream:
                stream.writelines(json.dumps(logs) + "\n" for logs in logs_of(row))
            self._batches = [*self._batches, batch_of(self.step)][-40:]
        lines = "".join(json.dumps(batch) + "\n" for batch in self._batches)
        write_atomically(self.folder / "completions.jsonl", lines)


SERVERS: list[dict[str, Any]] = [
    {
        "url": "http://rollout-0.rollouts.lockstep.svc.cluster.local:8000",
        "up": True,
        "step": 120,
        "tokens": 1234567,
        "error": None,
    },
    {
        "url": "http://10.0.0.7:8000",
        "up": False,
        "step": None,
        "tokens": 0,
        "error": "http://10.0.0.7:8000 is not reachable: [Errno 111] Connection refused",
    },
]
SETTINGS = {
    "Lockstep": {"rollout_url": "dns+http://rollouts:8000", "task": "openai/gsm8k:main", "max_staleness": "1"},
    "TRL and transformers": {"learning_rate": "1e-05", "num_generations": "8", HOSTILE[0]: HOSTILE[4]},
}


def logs_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What TRL logs at a step: its own numbers, and every 20 steps an evaluation."""
    at, steps = row["step"], row["max_steps"]
    logs = {
        "step": at,
        "loss": 0.01 * math.sin(at),
        "learning_rate": 1e-5 * (1 - at / (steps + 1)),
        "entropy": 1.2 - 0.8 * at / steps,
        "kl": 0.001 * at,
        "grad_norm": 0.4 + 0.2 * math.cos(at),
        "frac_reward_zero_std": 0.3,
        "completions/clipped_ratio": 0.02,
        "rewards/math_answer/mean": row["reward"],
        "rewards/short_enough/mean": 0.8,
    }
    return [logs, {"step": at, "eval_reward": row["reward"] + 0.03}] if at % 20 == 0 else [logs]


def row_of(step: int, steps: int) -> dict[str, Any]:
    reward = 0.2 + 0.6 * (1 - math.exp(-3 * step / steps)) + 0.06 * math.sin(7 * step)
    return {
        "step": step,
        "max_steps": steps,
        "reward": reward,
        "reward_std": 0.4 - 0.1 * step / steps,
        "completion_length": 180 - 40 * step / steps + 10 * math.sin(step),
        "completion_tokens": 2000 * step,
        "lag": float(step % 3 > 0),
        "wait_seconds": 1.5 + math.sin(step),
        "idle_seconds": 0.2,
        "push_seconds": 0.2,
        "push_bytes": 132_000_000,
        "rollout_tokens_per_second": 16_000 + 2000 * math.sin(step),
        "train_tokens_per_second": 900.0,
        "logprob_gap": 3e-3 if step % 10 == 0 else None,
        "seconds": 9.0 + math.cos(step),
        "drift": {"delta": 2e-3, "kl": 4e-5, "clipped": 0.0, "effective_sample_size": 0.98},
        "reward_wait_seconds": 0.3,
        "servers_up": 2,
        "servers": 2,
        "pause_seconds": 0.03,
    }


def batch_of(step: int) -> dict[str, Any]:
    """A generation batch of three groups: a prompt of each step, one that always comes back, one without variance."""
    hostile = HOSTILE[step % len(HOSTILE)]
    thoughts = f"<think>\n{step}\n</think>\n" + "Because " * 60
    groups = [
        (
            "How many apples?",
            [_sample(thoughts, 0.5), _sample(f"Seven. {hostile}", 0.0, tokens=9, finish_reason="stop")],
        ),
        ("What is 3 + 4?", [_sample(f"3 + 4 = 7. {hostile}", 1.0), _sample(f"attempt {step}", 0.25)]),
        ("What is 12 - 5?", [_sample("مرحبا שלום 你好 🦊 banana", None, spans=None, lag=None)] * 2),
    ]
    return {
        "step": step,
        "kind": "training",
        "completions": 6,
        "groups": [
            {
                "key": f"key of {prompt}" if number else f"key at step {step}",
                "prompt": f"user: {hostile}\n\n{prompt}" if number == 0 else prompt,
                "columns": {"answer": "7", "source": hostile},
                "size": 2,
                "samples": samples,
            }
            for number, (prompt, samples) in enumerate(groups)
        ],
    }


def _sample(completion: str, reward: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "completion": completion,
        "reward": reward,
        "rewards": {"math_answer": reward, "short_enough": 0.8},
        "advantage": -0.71,
        "tokens": 212,
        "finish_reason": "length",
        "spans": [[4, 0, 131, "fresh"], [5, 131, 212, "carried"]],
        "lag": 1,
        **changes,
    }
