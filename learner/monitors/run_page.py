"""`run.html`: a run's charts, settings and samples in one file, without scripts or network access.

Prompts and completions come from a model and a data set; they are shown as text and nothing else.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from html import escape
from importlib import resources
from typing import Any

from learner.monitors.charts import Point, Series, bucketed, chart, number, power, trailing_mean
from learner.run_dir.files import finite

_STYLE = resources.files("learner.monitors").joinpath("run_page.css").read_text("utf-8")
#: Second line of defense behind escaping: the browser loads nothing and runs no script.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
#: Control characters, changes of the writing direction, lone surrogates.
_UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NONE = "\N{EN DASH}"


@dataclass
class RunData:
    """Content of the page.

    Attributes:
        state: training, finished or stopped.
        steps: one row per step, see `learner.step_metrics.StepReport`.
        logs: TRL's logs, by its names, with `step`.
        batches: sample completions, see `learner.monitors.samples`.
        servers: rows of url, up, step, tokens, error.
        settings: sections of names and values.
    """

    run_id: str
    model: str
    state: str = "training"
    steps: list[dict[str, Any]] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    batches: Sequence[Mapping[str, Any]] = ()
    servers: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def last(self, name: str) -> Any:
        """Return a value of the last step; None before the first."""
        return self.steps[-1].get(name) if self.steps else None

    def total(self, name: str) -> float:
        """Sum a value over all steps that have it."""
        return sum(finite(row.get(name)) or 0.0 for row in self.steps)


def render(run: RunData) -> str:
    """Render the page as HTML."""
    charts = "".join(_charts(run)) or '<p class="soft">The first step has not ended yet.</p>'
    body = f'{_head(run)}<div class="charts">{charts}</div>{_completions(run)}{_servers(run)}{_settings(run)}'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        f"<title>{_text(run.run_id)} · Lockstep</title><style>{_STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _head(run: RunData) -> str:
    steps, spent, evals = run.last("max_steps"), run.total("seconds"), _column(run.logs, "eval_reward")
    done, push = min(100.0, 100 * (run.last("step") or 0) / (steps or 1)), run.last("push_seconds")
    state = "stopped early" if run.state == "stopped" else run.state
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    tiles = [
        ("step", f"{run.last('step')} / {steps}" if steps else "0"),
        ("reward", _three(run.last("reward"))),
        ("evaluation", _three(evals[-1][1] if evals else None)),
        ("lag, batches", _short(run.last("lag"))),
        ("bubble", f"{100 * run.total('wait_seconds') / spent:.0f} %" if spent else _NONE),
        ("push", _NONE if push is None else f"{push:.2g} s" if push < 10 else f"{push:.0f} s"),
        ("tokens/s", _short(run.last("rollout_tokens_per_second"))),
        ("servers up", f"{sum(bool(server['up']) for server in run.servers)} of {len(run.servers)}"),
    ]
    return (
        f'<header><h1>{_text(run.run_id)} <span class="state {run.state}">{state}</span></h1>'
        f'<p class="soft">{_text(run.model)} · {timedelta(seconds=int(spent))} in {len(run.steps)} steps · written '
        f'{written}; reload to update</p><div class="bar"><span style="width:{done:.1f}%"></span></div></header>'
        f'<ul class="tiles">{"".join(f"<li><span>{a}</span><b>{_text(b)}</b></li>" for a, b in tiles)}</ul>'
    )


def _charts(run: RunData) -> list[str]:
    steps, logs = run.steps, run.logs
    reward = bucketed(_column(steps, "reward"))
    smooth = trailing_mean([y for _, y in reward], max(3, len(reward) // 10))
    functions = sorted({name for row in logs for name in row if name.startswith("rewards/") and name.endswith("/mean")})
    mismatch = [{"step": row["step"], **(row.get("drift") or {})} for row in steps]
    rewards = [
        Series("batch", reward, "dots"),
        Series("trailing mean", [(x, y) for (x, _), y in zip(reward, smooth, strict=True)]),
        Series("evaluation", _column(logs, "eval_reward"), "marks", 2),
    ]
    by_function = {name: name.split("/")[1] for name in functions[:4]} if len(functions) > 1 else {}
    spread = _lines(steps, reward_std="standard deviation")
    spread.append(Series("zero-variance groups", _column(logs, "frac_reward_zero_std"), color=2))
    differences = _lines(mismatch, delta="mean |difference|", kl="KL")
    differences.append(Series("proof of sync", _column(steps, "logprob_gap"), "marks", 3))
    lag, tokens = _lines(steps, lag="lag"), _lines(steps, completion_length="tokens")
    seconds = _lines(steps, seconds="step", wait_seconds="for completions", reward_wait_seconds="for rewards")
    push = _lines(steps, push_seconds="push", pause_seconds="pause")
    speed = _lines(steps, rollout_tokens_per_second="tokens/s")
    policy, gradient = _lines(logs, entropy="entropy", kl="KL"), _lines(logs, grad_norm="norm")
    against = "server against learner, over sampled tokens, in nats; largest difference at each proof of sync"
    return [
        chart("Reward", "mean of each batch, its trailing mean, and evaluations", rewards, unit_range=True),
        chart("Reward functions", "mean of each, before its weight", _lines(logs, **by_function), unit_range=True),
        chart("Reward variance", "standard deviation in a batch; share of groups without a learning signal", spread),
        chart("Training-inference mismatch", against, differences, show=power, log=True),
        chart("Lag", "staleness of samples in generation batches, mean of a batch", lag, unit_range=True),
        chart("Seconds per step", "total, and how long the trainer waited", seconds),
        chart("Push", "seconds from export to the last receipt, and without any decoding request", push),
        chart("Tokens per second", "all servers, while a batch was generated", speed, show=_short),
        chart("Completion length", "mean tokens", tokens, show=_short),
        chart("Policy", "entropy, and KL to the reference (with beta > 0), in nats, as logged by TRL", policy),
        chart("Gradient", "norm before clipping", gradient),
    ]


def _lines(rows: Sequence[Mapping[str, Any]], /, **labels: str) -> list[Series]:
    """Plot columns of `rows`, each with its label, as lines of different colors."""
    return [Series(label, _column(rows, name), color=i) for i, (name, label) in enumerate(labels.items(), 1)]


def _completions(run: RunData) -> str:
    if not run.batches:
        return ""
    parts = [
        '<h2 id="completions">Completions</h2><p class="soft">The first, the best and the worst completion of some '
        "generation batches, newest first. TRL's <code>--log_completions</code> logs all of them.</p>"
    ]
    for batch in reversed(run.batches):
        rewards = ", ".join(_three(sample["reward"]) for sample in batch["samples"])
        parts.append(
            f'<details class="batch"{" open" if len(parts) == 1 else ""}><summary>Step {int(batch["step"])}'
            f'<span class="soft">reward {rewards}</span></summary>{"".join(map(_sample, batch["samples"]))}</details>'
        )
    return "".join(parts)


def _sample(sample: Mapping[str, Any]) -> str:
    facts = [("reward", _three(sample["reward"]))]
    if len(sample["rewards"]) > 1:
        facts += [(name, _three(value)) for name, value in sample["rewards"].items()]
    facts.append(("advantage", _NONE if sample["advantage"] is None else f"{sample['advantage']:+.2f}"))
    if spans := sample.get("spans"):  # as `step 4`, or `step 4 to token 31, step 5 (carried KV)`
        parts = [f"step {step}{' (carried KV)' * (kv == 'carried')} to token {end}" for step, _, end, kv in spans]
        facts += [("weights of", ", ".join(parts).rpartition(" to token ")[0]), ("lag", str(sample["lag"]))]
    if sample.get("tokens"):
        cut = {"length": ", cut off", "repetition": ", repeating"}.get(sample["finish_reason"], "")
        facts.append(("tokens", f"{sample['tokens']}{cut}"))
    line = "".join(f"<span>{_text(name)} <b>{_text(value)}</b></span>" for name, value in facts)
    return (
        f'<article class="sample"><h3>{_text(sample["why"])} {line}</h3>'
        f'<pre class="prompt">{_text(sample["prompt"])}</pre>'
        f'<pre class="completion">{_text(sample["completion"])}</pre></article>'
    )


def _servers(run: RunData) -> str:
    rows = "".join(
        f'<li><b>{_text(server["url"])}</b> <span class="{"up" if server["up"] else "down"}">'
        f"{'serving' if server['up'] else 'away'}</span>"
        f"<span>step {_NONE if server['step'] is None else _text(server['step'])}</span>"
        f"<span>{server['tokens']:,} tokens</span>"
        + (f"<p>{_text(server['error'])}</p>" if server["error"] else "")
        + "</li>"
        for server in run.servers
    )
    return f'<h2>Rollout servers</h2><ul class="servers">{rows}</ul>' if rows else ""


def _settings(run: RunData) -> str:
    parts = []
    for title, values in run.settings.items():
        rows = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in values.items())
        parts.append(f'<details><summary>{_text(title)}</summary><dl class="settings">{rows}</dl></details>')
    return f"<h2>Settings</h2>{''.join(parts)}" if parts else ""


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    pairs = ((row["step"], finite(row.get(name))) for row in rows)
    return [(float(step), value) for step, value in pairs if value is not None]


def _text(value: Any) -> str:
    """Escape as HTML; write characters that control how others are shown, and lone surrogates, as their codes."""
    return escape(_UNSEEN.sub(lambda c: f"\\u{ord(c[0]):04x}", str(value)))


def _short(value: float | None) -> str:
    return _NONE if value is None else f"{value / 1000:.3g}k" if abs(value) >= 1000 else number(value)


def _three(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"
