"""Errors of the hub: another try may not meet those of a connection."""

from __future__ import annotations

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from learner.tasks import TaskError, dataset, load_task
from learner.utils.hub import hub_error
from shared.errors import InvalidRequest
from tests.unit.learner.tasks.test_tasks import REWARD


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def caused(error: Exception, cause: Exception | None) -> Exception:
    error.__cause__ = cause
    return error


def answered(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("no", response=httpx.Response(status, request=httpx.Request("GET", "http://hub")))


PASSING = [
    ConnectionError("Couldn't reach 'org/name' on the Hub"),
    httpx.ConnectTimeout("slow"),
    caused(OSError("We couldn't connect"), caused(LocalEntryNotFoundError("not cached"), httpx.ConnectError("no"))),
    answered(503),
    answered(429),
]
STAYING = [
    FileNotFoundError("org/name"),
    ValueError("unknown split"),
    answered(401),
    caused(OSError("x"), answered(404)),
]


@pytest.mark.parametrize("error", PASSING)
def test_what_may_pass(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(hub_error("it failed", error)) == "it failed; another try may succeed"
    assert isinstance(hub_error("it failed", error), OSError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert isinstance(hub_error("it failed", error), InvalidRequest)


@pytest.mark.parametrize("error", STAYING)
def test_what_stays(error: Exception) -> None:
    assert isinstance(hub_error("it failed", error), InvalidRequest)


@pytest.mark.parametrize(("error", "kind"), [(PASSING[0], ConnectionError), (STAYING[1], TaskError)])
def test_a_task_on_the_hub(error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(dataset, "load_dataset", fail)
    with pytest.raises(kind, match="could not be loaded from the hub"):
        load_task("org/name", reward_specs=REWARD)
