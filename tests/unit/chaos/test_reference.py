"""The recomputation that logprobs of servers are compared with, and how far they may be from it."""

from __future__ import annotations

from pathlib import Path

import torch

from learner.adapters.exporter import AdapterExporter
from shared.weights import WeightVersion
from tests.chaos.reference import TOLERANCE, Reference
from tests.integration.support import policy as P
from tests.support.tiny_model import make_tiny_model

IDS = [5, 17, 99, 260, 41, 33]


def test_it_computes_as_the_policy_and_allows_for_few_bits(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", seed=0)
    policy = P.make_policy(model)
    P.randomize(policy, seed=1)
    export = AdapterExporter(policy, dtype="float32").export(WeightVersion(run_id="run", fence=1, step=2))
    blob = tmp_path / "blob"
    blob.write_bytes(b"".join(bytes(piece) for piece in export.pieces()))
    exact = Reference(model, lambda: {(1, 2): blob})
    own = exact.logprobs((1, 2), IDS)
    assert own is not None
    assert torch.allclose(own, P.reference(policy, IDS), atol=1e-5)
    assert exact.logprobs((1, 3), IDS) is None
    assert (exact.exact, exact.tolerance) == (True, TOLERANCE)
    rounded = Reference(model, lambda: {(1, 2): blob}, "bfloat16")
    rounded.logprobs((1, 2), IDS)
    assert not rounded.exact
    assert 0.02 < rounded.tolerance < 1.0
