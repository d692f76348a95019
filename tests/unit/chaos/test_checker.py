"""The checker of the chaos suite finds every kind of violation."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from tests.chaos import invariants
from tests.chaos.faults import FAULTS, plan
from tests.chaos.invariants import Checker
from tests.chaos.reference import TOLERANCE

VERSION = {"run_id": "run", "fence": 1, "step": 4}
LOGPROB = -0.5


class _Reference:
    """A model that gives every token the same probability."""

    exact, tolerance = True, TOLERANCE

    def logprobs(self, version: tuple[int, int], sequence: list[int]) -> torch.Tensor:
        return torch.full((len(sequence) - 1,), LOGPROB)

    def checksum(self, version: tuple[int, int]) -> str:
        return "c1"


def _honest() -> dict[str, Any]:
    run = {"run_id": "run", "version": VERSION, "checksum": "c1"}
    completion = {
        "token_ids": [1, 2, 3],
        "logprobs": [LOGPROB] * 3,
        "spans": [{"version": VERSION, "start": 0, "end": 3}],
    }
    return {
        "/v1/state": {"epoch": "e", "runs": [run]},
        "/v1/generate": {"epoch": "e", "groups": [{"prompt_token_ids": [7, 8], "completions": [completion]}]},
        "/v1/score": {"epoch": "e", "version": VERSION, "logprobs": [[LOGPROB] * 11]},
    }


class Told:
    """A server with given responses."""

    def __init__(self) -> None:
        self.answers = _honest()
        told = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                body = json.dumps(told.answers[self.path]).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = _answer

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def told() -> Iterator[Told]:
    told = Told()
    yield told
    told.server.shutdown()


def _checker(told: Told, history: Path, *receipts: tuple[int, int, str]) -> Checker:
    seen = [{"epoch": "e", "fence": fence, "step": step, "checksum": checksum} for fence, step, checksum in receipts]
    url = f"http://127.0.0.1:{told.server.server_address[1]}"
    return Checker([url], "run", _Reference(), lambda: seen, history, 1, lambda: "a test")  # type: ignore[arg-type]


def test_nothing_to_say_of_an_honest_server(told: Told, tmp_path: Path) -> None:
    checker = _checker(told, tmp_path / "history", (1, 4, "c1"))
    checker.look(0)
    checker.look(0)
    assert not checker.violations
    assert {"I1", "I2", "I3", "I4"} <= set(checker.checks)


def _spans(answers: dict[str, Any]) -> list[dict[str, Any]]:
    return answers["/v1/generate"]["groups"][0]["completions"][0]["spans"]


def _older(answers: dict[str, Any]) -> None:
    answers["/v1/score"]["version"] = {**VERSION, "step": 3}


def _moved(answers: dict[str, Any]) -> None:
    answers["/v1/score"]["logprobs"] = [[LOGPROB + 0.01] * 11]


def _wrong_logprob(answers: dict[str, Any]) -> None:
    answers["/v1/generate"]["groups"][0]["completions"][0]["logprobs"][1] = LOGPROB + 0.01


LIES: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "a gap": ("I1", lambda answers: _spans(answers)[0].update(start=1)),
    "not covered": ("I1", lambda answers: _spans(answers)[0].update(end=2)),
    "no version": ("I1", lambda answers: _spans(answers)[0].update(version=None)),
    "an older span": ("I2", lambda answers: _spans(answers)[0].update(version={**VERSION, "step": 3})),
    "an older score": ("I2", _older),
    "a forgotten run": ("I2", lambda answers: answers["/v1/state"].update(runs=[])),
    "other bytes": ("I3", lambda answers: answers["/v1/state"]["runs"][0].update(checksum="c2")),
    "moved scores": ("I3", _moved),
    "a wrong logprob": ("I4", _wrong_logprob),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_seen(told: Told, tmp_path: Path, lie: str) -> None:
    checker = _checker(told, tmp_path / "history", (1, 4, "c1"))
    checker.look(0)
    invariant, change = LIES[lie]
    change(told.answers)
    checker.look(0)
    assert invariant in {violation.invariant for violation in checker.violations}


@pytest.mark.parametrize(("tolerance", "violations"), [(TOLERANCE, {"I4"}), (0.02, set())])
def test_what_a_servers_rounding_explains_is_no_violation(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tolerance: float, violations: set[str]
) -> None:
    monkeypatch.setattr(_Reference, "tolerance", tolerance)
    checker = _checker(told, tmp_path / "history", (1, 4, "c1"))
    _wrong_logprob(told.answers)
    checker.look(0)
    assert {violation.invariant for violation in checker.violations} == violations
    assert checker.largest_share == pytest.approx(checker.largest_gap / tolerance)


@pytest.mark.parametrize(("field", "value", "invariant"), [("lag", 1.5, "I6"), ("logprob_gap", 0.1, "I4")])
def test_the_learners_history_is_read(told: Told, tmp_path: Path, field: str, value: float, invariant: str) -> None:
    history = tmp_path / "history"
    good = {"step": 1, "lag": 1.0, "logprob_gap": 1e-6}
    history.write_text(json.dumps(good) + "\n" + json.dumps({**good, "step": 2, field: value}) + "\n" + '{"step": 3')
    checker = _checker(told, history)
    checker.start()
    checker.stop()
    assert [violation.invariant for violation in checker.violations] == [invariant]
    assert [step["step"] for _, step in checker.steps] == [1, 2]


def test_a_server_that_is_left_behind_is_seen(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = _checker(told, tmp_path / "history")
    newest = {"epoch": "another server's", "fence": 1, "step": 60, "checksum": "c9"}
    checker.receipts = lambda: [newest]
    checker.look(0)
    assert not checker.violations
    monkeypatch.setattr(invariants, "CATCH_UP_S", 0.0)
    checker.look(0)
    assert [violation.invariant for violation in checker.violations] == ["catching up"]


def test_a_server_that_comes_later_is_checked_too(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "_EVERY_S", 0.0)
    url, history = _checker(told, tmp_path / "history").urls[0], tmp_path / "history"
    seen = [{"epoch": "e", "fence": 1, "step": 4, "checksum": "c1"}]
    checker = Checker([], "run", _Reference(), lambda: seen, history, 1, lambda: "a test")  # type: ignore[arg-type]
    checker.start()
    told.answers["/v1/state"]["runs"][0]["checksum"] = "c2"
    checker.watch(url)
    while not checker.violations:
        time.sleep(0.01)
    checker.stop()
    assert checker.violations[0].invariant == "I3"


def test_a_seed_is_a_schedule() -> None:
    def names(seed: int) -> list[str]:
        return [fault.name for fault in plan(Random(seed), 200, quick=False, missing=set())]

    assert names(1) == names(1) != names(2)
    assert len(names(1)) == 200
    assert set(names(1)) == {fault.name for fault in FAULTS}


def test_what_the_machine_lacks_is_left_out() -> None:
    chosen = plan(Random(1), 100, quick=False, missing={fault.needs for fault in FAULTS} - {""})
    assert len(chosen) == 100
    assert {fault.needs for fault in chosen} == {""}
