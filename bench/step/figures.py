"""Arithmetic of `bench.step`: from the steps of a training to its row, from rows to what they show together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.common.report import Row, spread

TRL, ASYNCHRONOUS = "TRL server mode", "TRL asynchronous"
TURNS = "lockstep, S = 0, one GPU by turns"
#: Targets on two GPUs: S = 1 against the larger of generation and training alone, TRL against S = 1.
MOST_OF_LARGER, LEAST_OF_TRL = 1.1, 1.6


def ours(max_staleness: int) -> str:
    """Return the row of a bound."""
    return f"lockstep, S = {max_staleness}"


def asynchronous(max_staleness: int) -> str:
    """Return the row of TRL's asynchronous trainer with a bound of its own."""
    return f"{ASYNCHRONOUS}, S = {max_staleness}"


@dataclass(frozen=True)
class Step:
    """One optimizer step, in seconds from the end of the previous one.

    Attributes:
        wait: while the trainer waited for completions.
        sync: while it brought its weights to the server.
        idle: while the server had nothing to generate; None: not known.
        tokens: of the completions that were trained on.
    """

    seconds: float
    wait: float
    sync: float
    idle: float | None
    tokens: int

    @property
    def train(self) -> float:
        """Seconds of the trainer's own work."""
        return self.seconds - self.wait - self.sync


def figures(steps: Sequence[Step]) -> dict[str, Any]:
    """Return the row of a training: medians, ranges and means of seconds; rates and bubbles over all steps together.

    The server's tokens per second are those while it has something to generate, the learner's those while it neither
    waits nor brings weights to the server. A bubble is the share of the time without anything to do. Nothing is said of
    a server whose idle time is not known.
    """
    seconds = sum(step.seconds for step in steps)
    tokens = sum(step.tokens for step in steps)
    wait = sum(step.wait for step in steps)
    parts = {"step": "seconds", "wait": "wait", "sync": "sync", "train": "train"}
    made: dict[str, Any] = {
        "n": len(steps),
        **{f"{part}_s": spread([getattr(step, name) for step in steps]) for part, name in parts.items()},
        "tokens_per_step": tokens / len(steps),
        "tokens_per_s": tokens / seconds,
        "learner_tokens_per_s": tokens / max(sum(step.train for step in steps), 1e-9),
        "learner_bubble": wait / seconds,
    }
    idle = [step.idle for step in steps if step.idle is not None]
    if len(idle) == len(steps):
        made["idle_s"] = spread(idle)
        made["server_tokens_per_s"] = tokens / max(seconds - sum(idle), 1e-9)
        made["server_bubble"] = sum(idle) / seconds
    return made


def together(rows: Sequence[Row]) -> dict[str, float]:
    """Return what rows show together: S = 1 beside the larger of generation and training alone, TRL's beside S = 1, 2.

    At S = 0 server and learner take turns on the same requests, so that each of them is measured alone there.
    """
    by_name = {row["row"]: row for row in rows if "step_s" in row}
    shown: dict[str, float] = {}
    ahead, alone, trl, further = (by_name.get(name) for name in (ours(1), ours(0), TRL, ours(2)))
    peer = by_name.get(asynchronous(2))
    if alone:
        shown["generation_alone_s"] = alone["wait_s"]["median"]
        shown["training_alone_s"] = alone["train_s"]["median"]
    if alone and ahead:
        larger = max(shown["generation_alone_s"], shown["training_alone_s"])
        shown["of_larger"] = ahead["step_s"]["median"] / larger
        shown["of_s0"] = ahead["step_s"]["median"] / alone["step_s"]["median"]
    if ahead and trl:
        shown["trl_of_s1"] = trl["step_s"]["median"] / ahead["step_s"]["median"]
    if further and trl:
        shown["trl_of_s2"] = trl["step_s"]["median"] / further["step_s"]["median"]
    if further and peer:
        shown["asynchronous_of_s2"] = peer["step_s"]["median"] / further["step_s"]["median"]
    return shown


def reached(shown: dict[str, float]) -> bool | None:
    """Return whether the two targets are met; None where they were not both measured."""
    if "of_larger" not in shown or "trl_of_s1" not in shown:
        return None
    return shown["of_larger"] <= MOST_OF_LARGER and shown["trl_of_s1"] >= LEAST_OF_TRL


def stop_ids(vocab: int, mean_tokens: int) -> list[int]:
    """Return token ids that end a completion: about one sampled token in `mean_tokens` is one of them.

    Random weights give every token about the same probability, so lengths are geometric with this mean. The ids are
    spread over the vocabulary, above those with a meaning.
    """
    return list(range(3, vocab, mean_tokens))
