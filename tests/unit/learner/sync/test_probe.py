"""What is scored: sequences of unequal length in one pass, the end of a long one, and tokens that were drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from learner.servers.pool import ServerPool
from learner.sync.probe import SEQUENCES as SEQUENCES_ALWAYS
from learner.sync.probe import SEQUENCES_IN_16_BITS, Probe, make_probe, sequences_at_once
from learner.sync.proof import SyncProof
from shared.errors import LockstepError

SEQUENCES = [[5, 9, 14, 20, 33, 8], [40, 41, 3, 7], [12, 13]]


@pytest.fixture
def model(model_dir):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), config)


def test_sequences_of_unequal_length_in_one_pass(model):
    probe = Probe(model, SEQUENCES)
    alone = [Probe(model, [sequence]).logprobs().values for sequence in SEQUENCES]
    assert np.allclose(probe.logprobs().values, np.concatenate(alone), atol=1e-5)
    assert probe.places[5:8] == [(1, 1), (1, 2), (1, 3)]


_4B, _32B = 20 * 36 * 2560 * 2, 20 * 64 * 5120 * 2  # bytes per token


@pytest.mark.parametrize(
    ("vocabulary", "kept", "free", "most", "count"),
    [
        (49_152, _4B, 0, 8, 7),
        (248_320, _4B, 0, 8, 1),
        (248_320, _4B, 8 << 30, 8, 2),
        (248_320, _4B, 80 << 30, 8, 8),
        (151_936, _32B, 8 << 30, 8, 2),
        (1024, _4B, 80 << 30, 8, 372),
        (49_152, 0, 80 << 30, 32, 32),
        (248_320, 0, 8 << 30, 32, 3),
        (49_152, 0, 0, 32, 7),
    ],
)
def test_sequences_of_a_pass(vocabulary, kept, free, most, count):
    """Those of a large vocabulary go one by one only where a GPU has no room for more, or for what is kept of them."""
    assert sequences_at_once(88 * vocabulary, 88 * kept, free, most) == count


def test_the_end_of_a_long_sequence(model):
    tokens = [3 + i % 60 for i in range(100)]
    end = Probe(model, [tokens], last=10)
    assert np.allclose(end.logprobs().values, Probe(model, [tokens]).logprobs().values[-10:], atol=1e-5)
    assert end.places[0] == (0, 90)
    assert end.picked([list(range(99))]).tolist() == list(range(89, 99))


def test_sensitivities_are_derivatives_in_the_scale_of_b(model):
    probe = Probe(model, SEQUENCES)
    weights = np.random.default_rng(0).normal(size=len(probe.places))
    b = [p for name, p in model.named_parameters() if "lora_B" in name][:3]
    found = probe.sensitivities(weights, b).sum(0)
    for parameter, derivative in zip(b, found, strict=True):
        values = []
        for factor in (1.01, 0.99):
            with torch.no_grad():
                kept = parameter.clone()
                parameter.mul_(factor)
                values.append(weights @ probe.logprobs().values)
                parameter.copy_(kept)
        assert derivative == pytest.approx((values[0] - values[1]) / 0.02, rel=0.02, abs=1e-3)


@pytest.mark.parametrize(("dtype", "count"), [("float32", SEQUENCES_ALWAYS), ("bfloat16", SEQUENCES_IN_16_BITS)])
def test_a_server_in_16_bits_gets_a_longer_probe(server, client, dtype, count):
    server.state = server.state.model_copy(update={"dtype": dtype})
    text = make_probe(ServerPool.of(client), [[3, 4, 5 + row] for row in range(40)], longest=100)
    assert len(text.sequences) == count


def test_a_base_that_differs_far_into_a_sequence_only(model, server, client):
    """As with another rotary scaling, or a sliding window: the short sequences agree."""
    score = server._logprobs
    server._logprobs = lambda sequence, *more: [x - (t > 60) for t, x in enumerate(score(sequence, *more))]
    pool = ServerPool.of(client)
    text = make_probe(pool, [[3, 4, 5], [6, 7, 8]], longest=100)
    assert len(text.long) == 100
    with pytest.raises(LockstepError, match="at the base"):
        SyncProof(pool, model, text).check_base()


def test_a_server_that_decodes_another_policy_than_it_scores(model, server, client):
    pool = ServerPool.of(client)
    SyncProof(pool, model, make_probe(pool, [[3, 4, 5], [6, 7, 8]], longest=100)).check_base()
    generate = server._generate

    def shifted(request):
        answer = generate(request)
        for group in answer.groups:
            group.completions[0].logprobs = [x - 0.1 for x in group.completions[0].logprobs]
        return answer

    server._generate = shifted
    text = make_probe(pool, [[3, 4, 5], [6, 7, 8]], longest=100)
    with pytest.raises(LockstepError, match="decodes another policy than it scores"):
        SyncProof(pool, model, text).check_base()
