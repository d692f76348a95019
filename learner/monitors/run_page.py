"""The page of runs: one HTML file with its script, its style and, when it is written to disk, its data.

Prompts and completions come from a model and a data set; they reach the script as JSON, which shows them as text.
"""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import resources
from typing import Any

from learner.monitors.run_table import StepTable

_FILES = resources.files("learner.monitors").joinpath("page")
_STYLE = "".join(_FILES.joinpath(name).read_text("utf-8") for name in ("uplot/uPlot.min.css", "page.css"))
_SCRIPTS = [_FILES.joinpath(name).read_text("utf-8") for name in ("uplot/uPlot.iife.min.js", "page.js")]
#: What would end the element that holds the data, what old parsers take for the end of a line, and lone surrogates.
_NOT_IN_HTML = re.compile("[<>&\u2028\u2029\ud800-\udfff]")

_STEP = "step"
#: The charts, by columns of `learner.monitors.run_table`: (column, label, look). A look is line; dots, for noisy
#: values; mean, the trailing mean of the column; or marks, a line that emphasizes each of a few points. `functions`
#: stands for one line for each reward function, if there are several.
CHARTS: list[dict[str, Any]] = [
    {
        "title": "Reward",
        "note": "mean of each batch, its trailing mean, and evaluations",
        "series": [
            ("reward", "trailing mean", "mean"),
            ("reward", "batch", "dots"),
            ("eval_reward", "evaluation", "marks"),
        ],
        "unit": True,
    },
    {"title": "Reward functions", "note": "mean of each, before its weight", "series": "functions", "unit": True},
    {
        "title": "Reward variance",
        "note": "standard deviation in a batch; share of groups without a learning signal",
        "series": [
            ("reward_std", "standard deviation", "line"),
            ("frac_reward_zero_std", "zero-variance groups", "line"),
        ],
    },
    {"title": "Loss", "note": "as logged by TRL", "series": [("loss", "loss", "line")]},
    {"title": "Learning rate", "note": "of the optimizer", "series": [("learning_rate", "learning rate", "line")]},
    {"title": "Gradient", "note": "norm before clipping", "series": [("grad_norm", "norm", "line")]},
    {
        "title": "Policy",
        "note": "entropy, and KL to the reference (with beta > 0), in nats, as logged by TRL",
        "series": [("entropy", "entropy", "line"), ("kl", "KL", "line")],
    },
    {
        "title": "Training-inference mismatch",
        "note": "server against learner, over sampled tokens, in nats; largest difference at each proof of sync",
        "series": [
            ("drift_delta", "mean |difference|", "line"),
            ("drift_kl", "KL", "line"),
            ("logprob_gap", "proof of sync", "marks"),
        ],
        "log": True,
    },
    {
        "title": "Lag",
        "note": "staleness of samples in generation batches, mean of a batch",
        "series": [("lag", "lag", "line")],
        "unit": True,
    },
    {
        "title": "Completion length",
        "note": "mean tokens",
        "series": [("completion_length", "tokens", "line")],
    },
    {
        "title": "Cut-off completions",
        "note": "share that reached max_completion_length",
        "series": [("completions/clipped_ratio", "share", "line")],
        "unit": True,
    },
    {
        "title": "Tokens per second",
        "note": "completions, while servers generate and of whole steps; with prompts, while rank 0 trains only",
        "series": [
            ("rollout_tokens_per_second", "servers", "line"),
            ("trained_tokens_per_second", "whole steps", "line"),
            ("train_tokens_per_second", "training, with prompts", "line"),
        ],
    },
    {
        "title": "Who waits for whom",
        "note": "share of a step: the learner waits for completions, rewards, a push; servers read nothing ahead",
        "series": [
            ("wait_share", "for completions", "line"),
            ("reward_share", "for rewards", "line"),
            ("push_share", "for the push", "line"),
            ("idle_share", "servers idle", "line"),
        ],
        "unit": True,
    },
    {
        "title": "Seconds per step",
        "note": "total, and how long the trainer waited",
        "series": [
            ("seconds", _STEP, "line"),
            ("wait_seconds", "for completions", "line"),
            ("reward_wait_seconds", "for rewards", "line"),
        ],
    },
    {
        "title": "Push",
        "note": "seconds from export to the last receipt, and without any decoding request",
        "series": [("push_seconds", "push", "line"), ("pause_seconds", "pause", "line")],
    },
]


@dataclass
class RunView:
    """What the page shows of one run.

    Attributes:
        state: training, finished, stopped, failed, or "" if that is not known.
        error: why it failed.
        updated: when its newest data was written, in seconds since 1970.
        batches: sample completions, see `learner.monitors.samples`.
        servers: rows of url, up, step, tokens, error.
        settings: sections of names and values.
    """

    run_id: str
    model: str = ""
    state: str = "training"
    error: str | None = None
    table: StepTable = field(default_factory=StepTable)
    batches: Sequence[Mapping[str, Any]] = ()
    servers: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    updated: float = field(default_factory=time.time)

    def head(self) -> dict[str, Any]:
        """Return everything but rows and completions."""
        table = self.table
        return {
            "run_id": self.run_id,
            "model": self.model,
            "state": self.state,
            "error": self.error,
            "servers": list(self.servers),
            "settings": self.settings,
            "updated": round(self.updated, 1),
            "steps": table.steps,
            "last": dict(table.last),
            "totals": dict(table.totals),
        }


def render(runs: Mapping[str, RunView], *, live: bool = False) -> str:
    """Render the page as HTML, with the data of `runs`; a `live` page asks its server for data."""
    messages = [
        {"run": name, "head": run.head(), "table": run.table.changes()[1], "batches": batch_changes(run.batches)[1]}
        for name, run in runs.items()
    ]
    data = html_json({"live": live, "charts": CHARTS, "messages": messages})
    title = next((run.run_id for run in runs.values()), "")
    scripts = "".join(f"<script>{script}</script>" for script in _SCRIPTS)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(live=live)}">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        f"<title>{_html(title)}{' · ' * bool(title)}Lockstep</title><style>{_STYLE}</style></head><body>"
        '<main id="page"><noscript><p>This page draws its data with a script, which is switched off here.</p>'
        f'</noscript></main><script type="application/json" id="data">{data}</script>{scripts}</body></html>\n'
    )


def policy(*, live: bool) -> str:
    """Return the content security policy: our own style and scripts, and for a live page data of its own server.

    It is a second line of defense behind text that stays text: nothing else runs, loads or is sent.
    """
    scripts = " ".join(map(_pinned, _SCRIPTS))
    connect = "connect-src 'self'; " if live else ""
    return (
        f"default-src 'none'; script-src {scripts}; style-src {_pinned(_STYLE)}; img-src data:; {connect}"
        "base-uri 'none'; form-action 'none'"
    )


def batch_changes(
    batches: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] | None = None
) -> tuple[Sequence[Mapping[str, Any]], dict[str, Any] | None]:
    """Return the batches, and their difference to those `before`: which are `kept`, which are new; None if none."""
    if batches is before:
        return batches, None
    known = {(batch["kind"], batch["step"]): batch for batch in before or ()}
    new = [batch for batch in batches if known.get((batch["kind"], batch["step"])) != batch]
    if before is not None and not new and len(known) == len(batches):
        return batches, None
    return batches, {"kept": [[batch["kind"], batch["step"]] for batch in batches], "new": new}


def html_json(value: Any) -> str:
    """Return JSON that can stand in an element of HTML, or in one line."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:  # no browser reads NaN, which somebody else's files may hold
        text = json.dumps(_without_nan(value), ensure_ascii=False, separators=(",", ":"))
    return _NOT_IN_HTML.sub(lambda c: f"\\u{ord(c[0]):04x}", text)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pinned(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"


def _html(text: str) -> str:
    return re.sub("[^\\w .,:/-]", lambda c: f"&#{ord(c[0])};" if ord(c[0]) > 31 else " ", text, flags=re.ASCII)
