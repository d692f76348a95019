"""A run with everything that the page can show, and with hostile text."""

from __future__ import annotations

import math
from typing import Any

from learner.monitors.run_page import RunData

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "</pre></article><img src=x onerror=\"document.title='owned'\">",
    "]]><svg onload=alert(1)><style>body{display:none}</style>",
    "\u202egnirts desrever\u202c \x00\x1b[31m null and escape",
    "W" * 400,
    "\ud800 a lone surrogate",
    "&lt;b&gt; &amp;amp; \"quotes\" 'too'",
]


def made_up_run(steps: int = 120, **changes: Any) -> RunData:
    """Make a run of `steps` optimizer steps with evaluations, two servers and completions."""
    rows = [_row(step, steps) for step in range(1, steps + 1)]
    logs: list[dict[str, Any]] = []
    for row in rows:
        at = row["step"]
        logs.append(
            {
                "step": at,
                "loss": 0.01 * math.sin(at),
                "entropy": 1.2 - 0.8 * at / steps,
                "kl": 0.001 * at,
                "grad_norm": 0.4 + 0.2 * math.cos(at),
                "frac_reward_zero_std": 0.3,
                "rewards/math_answer/mean": row["reward"],
                "rewards/short_enough/mean": 0.8,
            }
        )
        if at % 20 == 0:
            logs.append({"step": at, "eval_reward": row["reward"] + 0.03})
    data = RunData(
        run_id="gsm8k-3f2a1c",
        model="Qwen/Qwen2.5-1.5B-Instruct",
        state="training",
        steps=rows,
        logs=logs,
        batches=[_batch(step) for step in range(1, steps + 1, max(steps // 20, 1))],
        servers=[
            {
                "url": "http://rollout-0.rollouts.lockstep.svc.cluster.local:8000",
                "up": True,
                "step": steps,
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
        ],
        settings={
            "Lockstep": {"rollout_url": "dns+http://rollouts:8000", "task": "openai/gsm8k:main", "max_staleness": "1"},
            "TRL and transformers": {"learning_rate": "1e-05", "num_generations": "8", HOSTILE[0]: HOSTILE[4]},
        },
    )
    for name, value in changes.items():
        setattr(data, name, value)
    return data


def _row(step: int, steps: int) -> dict[str, Any]:
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
        "logprob_gap": 3e-3 if step % 10 == 0 else None,
        "seconds": 9.0 + math.cos(step),
        "drift": {"delta": 2e-3, "kl": 4e-5, "clipped": 0.0, "effective_sample_size": 0.98},
        "reward_wait_seconds": 0.3,
        "servers_up": 2,
        "servers": 2,
        "pause_seconds": 0.03,
    }


def _batch(step: int) -> dict[str, Any]:
    hostile = HOSTILE[step % len(HOSTILE)]
    return {
        "step": step,
        "samples": [
            _sample(
                "first", f"user: {hostile}\n\nHow many apples?", f"<think>\n{step}\n</think>\n" + "Because " * 60, 0.5
            ),
            _sample("best", "What is 3 + 4?", f"3 + 4 = 7. {hostile}", 1.0),
            _sample("worst", "What is 12 - 5?", "مرحبا שלום 你好 🦊 banana", None, spans=None, lag=None),
        ],
    }


def _sample(why: str, prompt: str, completion: str, reward: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "why": why,
        "prompt": prompt,
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
