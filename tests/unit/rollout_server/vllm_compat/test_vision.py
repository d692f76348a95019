"""Models of images without torchvision, in every process of vLLM."""

from __future__ import annotations

import json
import pickle

import pytest

from rollout_server.vllm_compat import vision


def test_what_is_done_without_torchvision_is_done_where_the_configuration_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[bool] = []
    monkeypatch.setattr(vision, "do_without_torchvision", lambda: done.append(True))
    sent = pickle.dumps({"lockstep_images": vision.InEveryProcess("text")})
    assert done == []
    arrived = pickle.loads(sent)  # noqa: S301 - from the line above
    assert done == [True]
    assert json.dumps(arrived) == '{"lockstep_images": "text"}'
    pickle.loads(pickle.dumps(arrived))  # noqa: S301 - on its way to a worker
    assert done == [True, True]
