"""`run.html`: all there is to see of a run, in one file that needs neither a server nor the network nor a script.

Prompts and completions are what a model and a data set say, and are never taken for anything but text.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from learner.monitors.charts import Point, Series, bucketed, chart, trailing_mean
from learner.monitors.page_style import STYLE
from learner.run_dir.files import finite

#: The page may show what is in it and nothing else, whatever its text says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
#: Control characters, changes of the writing direction, halves of surrogate pairs.
_UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NONE = "\N{EN DASH}"
_STATES = {"training": "training", "finished": "finished", "stopped": "stopped early"}


@dataclass
class RunData:
    """What the page shows.

    Attributes:
        steps: one row for each step, see `learner.step_metrics.StepReport`.
        logs: what TRL logged, by its names, with `step`.
        batches: of sample completions, see `learner.monitors.samples`.
        servers: rows of url, up, step, tokens, error.
        settings: sections of names and values.
        state: training, finished or stopped.
    """

    run_id: str
    model: str
    state: str = "training"
    steps: Sequence[Mapping[str, Any]] = ()
    logs: Sequence[Mapping[str, Any]] = ()
    batches: Sequence[Mapping[str, Any]] = ()
    servers: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def render(run: RunData) -> str:
    """The page."""
    charts = "".join(_charts(run)) or '<p class="soft">The first step has not ended yet.</p>'
    body = (
        _head(run)
        + _tiles(run)
        + f'<div class="charts">{charts}</div>'
        + _completions(run.batches)
        + _servers(run.servers)
        + _settings(run.settings)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        f"<title>{_text(run.run_id)} · Lockstep</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _head(run: RunData) -> str:
    step, steps = _progress(run)
    done = min(100.0, 100 * step / steps) if steps else 0.0
    spent = sum(finite(row.get("seconds")) or 0.0 for row in run.steps)
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return (
        f'<header><h1>{_text(run.run_id)} <span class="state {run.state}">{_STATES[run.state]}</span></h1>'
        f'<p class="soft">{_text(run.model)} · {_clock(spent)} in {len(run.steps)} steps · written {written}; '
        "reload for news</p>"
        f'<div class="bar"><span style="width:{done:.1f}%"></span></div></header>'
    )


def _tiles(run: RunData) -> str:
    step, steps = _progress(run)
    last: Mapping[str, Any] = run.steps[-1] if run.steps else {}
    waited = sum(finite(row.get("wait_seconds")) or 0.0 for row in run.steps)
    spent = sum(finite(row.get("seconds")) or 0.0 for row in run.steps)
    evals = _column(run.logs, "eval_reward")
    up = sum(bool(server.get("up")) for server in run.servers)
    tiles = [
        ("step", f"{step} / {steps}" if steps else "0"),
        ("reward", _three(last.get("reward"))),
        ("evaluation", _three(evals[-1][1] if evals else None)),
        ("lag, batches", _short(last.get("lag"))),
        ("bubble", f"{100 * waited / spent:.0f} %" if spent else _NONE),
        ("push", _seconds(last.get("push_seconds"))),
        ("tokens/s", _short(last.get("rollout_tokens_per_second"))),
        ("servers up", f"{up} of {len(run.servers)}"),
    ]
    return '<ul class="tiles">' + "".join(f"<li><span>{a}</span><b>{_text(b)}</b></li>" for a, b in tiles) + "</ul>"


def _charts(run: RunData) -> list[str]:
    steps, logs = run.steps, run.logs
    reward = bucketed(_column(steps, "reward"))
    smooth = trailing_mean([y for _, y in reward], max(3, len(reward) // 10))
    functions = sorted({name for row in logs for name in row if name.startswith("rewards/") and name.endswith("/mean")})
    drifts = [{"step": row["step"], **(row.get("drift") or {})} for row in steps]
    return [
        chart(
            "Reward",
            "mean of each batch, a trailing mean of it, and evaluations",
            [
                Series("batch", reward, "dots"),
                Series("trailing mean", [(x, y) for (x, _), y in zip(reward, smooth, strict=True)]),
                Series("evaluation", _column(logs, "eval_reward"), "marks", 2),
            ],
            show=_number,
            whole=(0.0, 1.0),
        ),
        chart(
            "Reward functions",
            "mean of each, before its weight",
            [Series(name.split("/")[1], _column(logs, name), color=1 + i) for i, name in enumerate(functions[:4])]
            if len(functions) > 1
            else [],
            show=_number,
            whole=(0.0, 1.0),
        ),
        chart(
            "Spread of rewards",
            "standard deviation in a batch; share of groups that teach nothing",
            [
                Series("deviation", _column(steps, "reward_std")),
                Series("groups without variance", _column(logs, "frac_reward_zero_std"), color=2),
            ],
            show=_number,
        ),
        chart(
            "Server against learner",
            "over sampled tokens, in nats; gap: largest at a proof of sync",
            [
                Series("mean |difference|", _column(drifts, "delta")),
                Series("KL", _column(drifts, "kl"), color=2),
                Series("gap", _column(steps, "logprob_gap"), "marks", 3),
            ],
            show=_power,
            log=True,
        ),
        chart(
            "Lag",
            "generation batches that samples are behind, mean of a batch",
            [Series("lag", _column(steps, "lag"))],
            show=_number,
            whole=(0.0, 1.0),
        ),
        chart(
            "Seconds per step",
            "and for how long of it the trainer waited",
            [
                Series("step", _column(steps, "seconds")),
                Series("for completions", _column(steps, "wait_seconds"), color=2),
                Series("for rewards", _column(steps, "reward_wait_seconds"), color=3),
            ],
            show=_number,
        ),
        chart(
            "Push",
            "seconds from export to the last receipt, and those in which no request was decoding",
            [
                Series("push", _column(steps, "push_seconds")),
                Series("pause", _column(steps, "pause_seconds"), color=2),
            ],
            show=_number,
        ),
        chart(
            "Tokens per second",
            "of the servers, while a batch was generated",
            [Series("tokens/s", _column(steps, "rollout_tokens_per_second"))],
            show=_short,
        ),
        chart("Completion length", "mean tokens", [Series("tokens", _column(steps, "completion_length"))], show=_short),
        chart(
            "Policy",
            "entropy, and KL to the reference (with beta > 0), in nats, as TRL logs them",
            [
                Series("entropy", _column(logs, "entropy")),
                Series("KL", _column(logs, "kl"), color=2),
            ],
            show=_number,
        ),
        chart("Gradient", "norm before it is clipped", [Series("norm", _column(logs, "grad_norm"))], show=_number),
    ]


def _completions(batches: Sequence[Mapping[str, Any]]) -> str:
    if not batches:
        return ""
    shown = "".join(_batch(batch, open_=i == 0) for i, batch in enumerate(reversed(batches)))
    return (
        '<h2 id="completions">Completions</h2><p class="soft">The first, the best and the worst of some generation '
        f"batches, newest first. All of them: TRL's <code>--log_completions</code>.</p>{shown}"
    )


def _batch(batch: Mapping[str, Any], *, open_: bool) -> str:
    samples = batch["samples"]
    rewards = ", ".join(_three(sample["reward"]) for sample in samples)
    return (
        f'<details class="batch"{" open" if open_ else ""}><summary>Step {int(batch["step"])}'
        f'<span class="soft">reward {_text(rewards)}</span></summary>{"".join(map(_sample, samples))}</details>'
    )


def _sample(sample: Mapping[str, Any]) -> str:
    facts = [("reward", _three(sample["reward"]))]
    if len(sample["rewards"]) > 1:
        facts += [(name, _three(value)) for name, value in sample["rewards"].items()]
    facts.append(("advantage", _NONE if sample["advantage"] is None else f"{sample['advantage']:+.2f}"))
    if sample.get("spans"):
        facts += [("weights of", _spans(sample["spans"])), ("lag", str(sample["lag"]))]
    if sample.get("tokens"):
        cut = {"length": ", cut off", "repetition": ", repeating"}.get(sample["finish_reason"], "")
        facts.append(("tokens", f"{sample['tokens']}{cut}"))
    line = "".join(f"<span>{_text(name)} <b>{_text(value)}</b></span>" for name, value in facts)
    return (
        f'<article class="sample"><h3>{_text(sample["why"])} {line}</h3>'
        f'<pre class="prompt">{_text(sample["prompt"])}</pre>'
        f'<pre class="completion">{_text(sample["completion"])}</pre></article>'
    )


def _spans(spans: Sequence[Sequence[Any]]) -> str:
    """`step 4`, or `step 4 to token 31, step 5 (carried KV)`."""
    parts = [f"step {step}{' (carried KV)' if kv == 'carried' else ''}" for step, _, _, kv in spans]
    ends = [f" to token {end}" for _, _, end, _ in spans[:-1]] + [""]
    return ", ".join(part + end for part, end in zip(parts, ends, strict=True))


def _servers(servers: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<li><b>{_text(server["url"])}</b> <span class="{"up" if server["up"] else "down"}">'
        f"{'serves' if server['up'] else 'away'}</span>"
        f"<span>step {_NONE if server['step'] is None else _text(server['step'])}</span>"
        f"<span>{server['tokens']:,} tokens</span>"
        + (f"<p>{_text(server['error'])}</p>" if server["error"] else "")
        + "</li>"
        for server in servers
    )
    return f'<h2>Rollout servers</h2><ul class="servers">{rows}</ul>' if servers else ""


def _settings(sections: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for title, values in sections.items():
        rows = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in values.items())
        parts.append(f'<details><summary>{_text(title)}</summary><dl class="settings">{rows}</dl></details>')
    return f"<h2>Settings</h2>{''.join(parts)}" if parts else ""


def _progress(run: RunData) -> tuple[int, int]:
    last = run.steps[-1] if run.steps else {}
    return int(last.get("step") or 0), int(last.get("max_steps") or 0)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    pairs = ((row["step"], finite(row.get(name))) for row in rows)
    return [(float(step), value) for step, value in pairs if value is not None]


def _text(value: Any) -> str:
    """As HTML: escaped; characters that control how others are shown, and half characters, by their numbers."""
    return escape(_UNSEEN.sub(lambda c: f"\\u{ord(c[0]):04x}", str(value)))


def _number(value: float) -> str:
    """Three digits or so: 0.123, 12.3, 1,234."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return _power(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _short(value: float | None) -> str:
    return _NONE if value is None else f"{value / 1000:.3g}k" if abs(value) >= 1000 else _number(value)


def _power(value: float) -> str:
    if 0.01 <= abs(value) < 1000:
        return f"{value:.2g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+")


def _three(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
