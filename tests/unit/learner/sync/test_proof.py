"""What mismatch, movement and canary each detect."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from learner.run_dir.lease import Lease
from learner.servers.pool import ServerPool
from learner.sync.canary import prove_modules, show_canary
from learner.sync.proof import SyncProof
from learner.sync.publisher import Publisher
from learner.sync.tolerance import SAFETY, Measurement, derived_tolerance, merge_noise, slope
from shared.errors import LockstepError, NotReady
from shared.weights import WeightVersion

SEQUENCES = [[5, 9, 14, 20, 33, 8], [40, 41, 3, 7]]


@pytest.fixture
def model(model_dir):
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), config).train()


@pytest.fixture
def proof(model, client):
    return SyncProof(ServerPool.of(client), model, SEQUENCES)


@pytest.fixture
def publisher(model, client):
    return Publisher(ServerPool.of(client), model, Lease("r", "s", 0))


def move(model, size):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def measurement(own, served):
    return Measurement(WeightVersion(run_id="r", step=1), np.array(own), np.array(served), 1.0)


def test_own_side_ignores_dropout_and_leaves_the_mode(proof, model):
    first, again = proof.probe.logprobs().values, proof.probe.logprobs().values
    assert model.training
    assert np.array_equal(first, again)
    assert len(first) == 8


def test_agrees_with_an_honest_server(proof, publisher, model):
    proof.check_base()
    for step in range(3):
        publisher.push(step)
        assert proof.check(publisher.version(step)).max_mismatch < 1e-4
        move(model, 0.02)
    assert abs(proof.slope - 1) < 0.01


def test_a_learner_that_computes_nan_is_told_so(proof, publisher, model):
    publisher.push(0)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "down_proj.lora_B" in name).fill_(torch.nan)
    with pytest.raises(LockstepError, match=r"the learner itself has no finite logprob for 8 of 8 probe tokens at r@0"):
        proof.check(publisher.version(0))


def test_mismatch_names_version_and_both_values(proof, publisher, model):
    publisher.push(0)
    move(model, 0.5)
    with pytest.raises(
        LockstepError,
        match=r"r@0\.0 the logprob of the server at \S+, epoch e1 of token \d+ of .* is -\d.*mismatch",
    ):
        proof.check(publisher.version(0))


def test_movement_finds_a_no_op_far_below_the_tolerance(model, client, publisher, server):
    proof = SyncProof(ServerPool.of(client), model, SEQUENCES, tolerance=0.5)
    publisher.push(0)
    proof.check(publisher.version(0))
    move(model, 1e-4)
    server.ignore_pushes = True
    publisher.push(1)
    with pytest.raises(LockstepError, match=r"from r@0\.0 to r@0\.1 .* factor of -?0\.00"):
        proof.check(publisher.version(1))


def test_stuck_server_is_found_against_the_last_proof(proof, publisher, model, server):
    publisher.push(0)
    proof.check(publisher.version(0))
    move(model, 0.1)
    publisher.push(1)
    proof.check(publisher.version(1))
    server.ignore_pushes = True
    proof.fixed_tolerance = 10.0
    move(model, 1e-3)
    publisher.push(2)
    with pytest.raises(LockstepError, match=r"from r@0\.1 to r@0\.2"):
        proof.check(publisher.version(2))


def test_canary_finds_a_server_that_ignores_adapters(proof, model, publisher, server):
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert abs(prove_modules(proof, lambda step: publisher.push(step).version).slope - 1) < 0.01
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "put back to the bit"
    server.scale = 0.0
    proof.fixed_tolerance = 10.0
    with pytest.raises(LockstepError, match="factor of 0"):
        prove_modules(proof, lambda step: publisher.push(1 + step).version)


def test_slope_is_silent_below_the_noise():
    rng = np.random.default_rng(0)
    own = rng.normal(size=200)
    reference = measurement(own, own + rng.normal(size=200) * 0.02)
    small, large = rng.normal(size=200) * 0.02, rng.normal(size=200) * 0.5
    noise = rng.normal(size=200) * 0.02
    assert slope(reference, measurement(own + small, own + noise)) is None
    assert abs(slope(reference, measurement(own + large, own + large + noise)) - 1) < 0.1
    assert abs(slope(reference, measurement(own + large, own + noise))) < 0.1
    assert abs(slope(reference, measurement(own + large, own + 2 * large + noise)) - 2) < 0.1


def test_tolerance_follows_the_dtype():
    shape = {"layers": 30, "width": 576, "logit_std": 2.0, "logit_max": 20.0}
    by_dtype = {d: derived_tolerance([d, d], **shape) for d in ("float32", "float16", "bfloat16")}
    assert 1e-4 <= by_dtype["float32"] < 1e-3 < by_dtype["float16"] < 0.2 < by_dtype["bfloat16"] < 2
    assert derived_tolerance(["float32", "bfloat16"], **shape) < by_dtype["bfloat16"]
    noise = merge_noise("bfloat16", layers=30, logit_std=2.0)
    assert (
        1
        < derived_tolerance(["float32", "bfloat16"], **shape, merge_noise=noise)
        / derived_tolerance(["float32", "bfloat16"], **shape)
        < 1.6
    )
    tiny = derived_tolerance(["float32"] * 2, layers=2, width=32, logit_std=0.5, logit_max=2.0)
    assert tiny == pytest.approx(1e-4)


def test_tolerance_follows_what_linear_attention_rounds():
    """Rms of what bfloat16 does to logprobs, of a sigma of the tolerance: not more than with attention."""
    found = {kind: rounding_of_sigma(kind, layers=16) for kind in ("full_attention", "linear_attention")}
    assert 0.1 < found["linear_attention"] < 1.2 * found["full_attention"]


def rounding_of_sigma(kind: str, layers: int) -> float:
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "linear_num_key_heads": 2}
    sizes |= {"linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, layer_types=[kind] * layers)).to(torch.bfloat16).eval()
    wide = copy.deepcopy(model).float()
    ids = torch.randint(0, 512, (4, 32))
    with torch.no_grad():
        narrow_NTV, wide_NTV = (each(input_ids=ids, use_cache=False).logits.float() for each in (model, wide))
    moved_NTV = narrow_NTV.log_softmax(-1) - wide_NTV.log_softmax(-1)
    rms = moved_NTV[:, :-1].gather(-1, ids[:, 1:, None]).square().mean().sqrt()
    shape = {"layers": layers, "width": 128, "linear_layers": layers if kind == "linear_attention" else 0}
    logits = {"logit_std": float(wide_NTV.std(-1).mean()), "logit_max": float(wide_NTV.abs().max())}
    return float(rms) * SAFETY / derived_tolerance(["bfloat16"], **shape, **logits)


@pytest.fixture
def server_elsewhere(server):
    """The server, whose base is not quite the learner's."""
    for weight in server.base.values():
        weight *= 1.01
    return server


@pytest.mark.usefixtures("server_elsewhere")
def test_a_base_in_another_precision_is_not_called_another_base(model, client):
    """float32 on both sides, and TRL's default bf16: the learner computes in bfloat16."""
    how = {"tolerance": 0.0, "same_base": True}
    proof = SyncProof(ServerPool.of(client), model, SEQUENCES, autocast="bfloat16", **how)
    with pytest.raises(LockstepError, match=r"hold the same base .* in bfloat16 by autocast, .* in float32: set bf16="):
        proof.check_base()
    proof = SyncProof(ServerPool.of(client), model, SEQUENCES, **how)
    with pytest.raises(LockstepError, match=r"hold the same base .* both compute in float32"):
        proof.check_base()
    proof = SyncProof(ServerPool.of(client), model.to(torch.bfloat16), SEQUENCES, **how)
    with pytest.raises(LockstepError, match="in bfloat16, the server in float32: give both the same --dtype"):
        proof.check_base()


@pytest.mark.usefixtures("server_elsewhere")
def test_a_base_that_is_not_known_to_be_the_same(model, client):
    with pytest.raises(LockstepError, match="may not hold the same base: compare model and revision"):
        SyncProof(ServerPool.of(client), model, SEQUENCES).check_base()


def test_the_tolerance_covers_autocast(model, client):
    by_autocast = {
        autocast: SyncProof(ServerPool.of(client), model, SEQUENCES, autocast=autocast).check_base()[0].tolerance
        for autocast in (None, "float16", "bfloat16")
    }
    assert by_autocast[None] < by_autocast["float16"] < by_autocast["bfloat16"]


@pytest.mark.usefixtures("server_elsewhere")
def test_a_tolerance_of_zero_is_zero(model, client):
    proof = SyncProof(ServerPool.of(client), model, SEQUENCES, tolerance=0.0)
    with pytest.raises(LockstepError, match=r"tolerance 0\."):
        proof.check_base()


def test_what_the_canary_has_found_is_said_even_if_its_run_cannot_be_deleted(proof, publisher, server, monkeypatch):
    def gone(self):
        raise NotReady("the server has gone away")

    monkeypatch.setattr(Publisher, "delete_run", gone)
    server.scale = 0.0
    proof.fixed_tolerance = 10.0
    with pytest.raises(LockstepError, match="factor of 0"):
        show_canary(proof, publisher, takeover=False)
    server.scale = 1.0
    with pytest.raises(NotReady):  # nothing else has failed
        show_canary(proof, publisher, takeover=False)
