"""Which modules a server leaves out is found by one adapter, and shown again without the model."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from learner.sync import canary
from learner.sync.canary import CanaryResult, KeptCanary, prove_modules, show_canary
from shared.errors import LockstepError
from tests.support.rounding_server import Pair


@pytest.fixture
def pair() -> Pair:
    return Pair()


class Shown(NamedTuple):
    """A pair whose server has been shown a canary, and is healthy."""

    pair: Pair
    before: list[torch.Tensor]
    result: CanaryResult
    kept: KeptCanary


@pytest.fixture(scope="module")
def shown() -> Shown:
    """Take the seconds of a canary once."""
    pair = Pair()
    before = [p.clone() for p in pair.model.parameters()]
    result, kept = show_canary(pair.proof, pair.publisher, takeover=False)
    assert result is not None
    assert kept is not None
    pair.server.history.clear()
    return Shown(pair, before, result, kept)


def test_every_module_of_a_healthy_server_is_proven(shown):
    assert shown.result.slope == pytest.approx(1.0, abs=0.1)
    assert shown.result.proven == shown.result.modules == 14
    parameters = shown.pair.model.parameters()
    assert all(torch.equal(p, old) for p, old in zip(parameters, shown.before, strict=True))


def test_no_module_of_a_healthy_server_is_suspected(pair, monkeypatch):
    """Each suspect would cost two passes."""
    monkeypatch.setattr(canary, "_share_of", None)
    assert prove_modules(pair.proof, lambda step: pair.publisher.push(step).version).proven == 14


@pytest.mark.parametrize("silent", ["layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"])
def test_one_silent_module_is_named(pair, silent):
    pair.server.silent = frozenset({f"model.{silent}"})
    with pytest.raises(LockstepError, match=rf"leaves out [^:]*{silent}"):
        prove_modules(pair.proof, lambda step: pair.publisher.push(step).version)


def canary_b(pair: Pair, module: str) -> float:
    """Return the rms of a module's B in the canary of a healthy server."""
    found = []

    def push(step):
        found.append(
            float(
                pair.proof.weights.b[pair.proof.weights.modules.index(module)].detach().float().square().mean().sqrt()
            )
        )
        return pair.publisher.push(step).version

    prove_modules(pair.proof, push)
    pair.publisher.delete_run()
    pair.server.history.clear()
    return found[0]


@pytest.mark.parametrize("apply", ["adapter", "columns"])
def test_a_module_that_rounding_takes_is_accused_only_where_it_cannot(apply):
    name = "model.layers.1.self_attn.v_proj"
    pair = Pair(apply=apply)
    pair.server.loses = {name: 1.5 * canary_b(pair, name)}
    if apply == "columns":
        with pytest.raises(LockstepError, match=rf"leaves out [^:]*{name}"):
            prove_modules(pair.proof, lambda step: pair.publisher.push(step).version)
    else:
        assert prove_modules(pair.proof, lambda step: pair.publisher.push(step).version).modules == 14


def test_a_silent_module_of_a_server_that_rounds_is_named():
    pair = Pair(apply="adapter")
    pair.server.silent = frozenset({"model.layers.1.self_attn.v_proj"})
    with pytest.raises(LockstepError, match=r"leaves out model.layers.1.self_attn.v_proj"):
        show_canary(pair.proof, pair.publisher, takeover=False)


def test_a_silent_layer_is_named():
    pair = Pair(layers=4)
    names = [name for name in pair.proof.weights.modules if ".layers.2." in name]
    pair.server.silent = frozenset(names)
    with pytest.raises(LockstepError, match=r"leaves out [^:]*layers\.2\.|by a factor of 0\."):
        prove_modules(pair.proof, lambda step: pair.publisher.push(step).version)


def test_it_is_no_louder_than_logits_can_move(pair, monkeypatch):
    """Where logits spread little, no adapter moves logprobs by what a noisy pair would have it move them."""
    monkeypatch.setattr(canary, "CANARY_SIGNAL", 1e3)
    for model in (pair.model, pair.server.policy):
        model.get_input_embeddings().weight.data.mul_(0.3)
    spread, largest = pair.proof.probe.logprobs().logit_std, []

    def push(step):
        largest.append(max(float(b.detach().abs().max()) for b in pair.proof.weights.b))
        return pair.publisher.push(step).version

    result = prove_modules(pair.proof, push)
    assert spread < 1.4, "else it could be as loud as it was asked to be"
    assert result.slope == pytest.approx(1.0, abs=0.1)
    assert largest[0] < 10.0


def test_a_failure_tells_what_has_moved(pair):
    pair.server.silent = frozenset(pair.proof.weights.modules)
    with pytest.raises(
        LockstepError, match=r"by a factor of 0\.0.*they move by 0 nats, the learner's by .* mismatch of"
    ):
        prove_modules(pair.proof, lambda step: pair.publisher.push(step).version)


def test_it_is_shown_again_without_the_model(shown, monkeypatch):
    pair, kept = shown.pair, shown.kept
    base = next(iter(pair.proof.bases.values()))
    monkeypatch.setattr(pair.proof.probe, "logprobs", None)
    state = pair.client.state()
    assert kept.show(pair.proof, pair.client, state, base) == pytest.approx(1.0, abs=0.1)
    assert not pair.server.served, "its run has been deleted"
    monkeypatch.setattr(pair.server, "silent", frozenset(pair.proof.weights.modules))
    with pytest.raises(LockstepError, match=r"canary .* by a factor of"):
        kept.show(pair.proof, pair.client, state, base)
    assert not pair.server.served


def test_it_waits_for_no_room(shown):
    pair = shown.pair
    base = next(iter(pair.proof.bases.values()))
    pair.publisher.push(0)
    full = pair.client.state().model_copy(update={"max_runs": 1})
    assert shown.kept.show(pair.proof, pair.client, full, base) is None
