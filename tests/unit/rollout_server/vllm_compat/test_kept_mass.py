"""The kept mass on its way through vLLM; tests/integration/test_requests.py has the real sampler of the CPU backend."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from vllm.v1.sample.sampler import Sampler as V1Sampler

from rollout_server.vllm_compat import kept_mass


def test_masses_and_ranks_are_told_apart():
    masses = torch.tensor([0.0, -1e-6, -0.5, -31.25, -torch.inf, 1e-7, torch.nan])
    numbers = kept_mass.encoded(masses)
    assert numbers.dtype == torch.int64
    assert numbers.abs().max() < 2**31
    expected = [0.0, -1e-6, -0.5, -31.25, -100.0, 0.0, 0.0]
    assert kept_mass.decoded(numbers.tolist()) == pytest.approx(expected, abs=1e-7)
    assert kept_mass.decoded([-5, 1]) is None
    assert kept_mass.decoded([None]) is None


class LogprobsTensors(NamedTuple):
    logprobs: torch.Tensor
    selected_token_ranks: torch.Tensor


class States:
    """The part of V2's `SamplingStates` that is relied on."""

    def __init__(self, vocab_size: int, top_k: list[int], top_p: list[float], min_p: list[float]) -> None:
        self.vocab_size = vocab_size
        self.top_k = SimpleNamespace(np=np.array(top_k))
        self.top_p = SimpleNamespace(np=np.array(top_p))
        self.min_p = SimpleNamespace(np=np.array(min_p))
        self.temperature = SimpleNamespace(gpu=torch.full((len(top_k),), 0.7))

    def apply_min_p(self, logits: torch.Tensor, expanded_idx_mapping: object, idx_mapping_np: np.ndarray) -> None:
        least = logits.amax(-1, keepdim=True) + torch.tensor(self.min_p.np[idx_mapping_np]).float().log()[:, None]
        logits.masked_fill_(logits < least, -torch.inf)


class Sampler:
    """The order of V2's calls: temperature, min_p, top_k; logprobs of the first token."""

    def __init__(self, states: States, *, cuts: bool = True) -> None:
        self.sampling_states, self.logprobs_mode, self.cuts = states, "processed_logprobs", cuts

    def __call__(self, logits: torch.Tensor, rows: np.ndarray) -> SimpleNamespace:
        sampled, processed = self.sample(logits, rows)
        ranks = torch.ones(len(rows), dtype=torch.int64)
        tensors = LogprobsTensors(processed.log_softmax(-1).gather(1, sampled[:, None]), ranks)
        return SimpleNamespace(logprobs_tensors=tensors)

    def sample(self, logits: torch.Tensor, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits / self.sampling_states.temperature.gpu[rows][:, None]
        if self.cuts:  # else vLLM processes nothing
            self.sampling_states.apply_min_p(logits, None, rows)
        top_k = torch.tensor(self.sampling_states.top_k.np[rows])
        least = logits.sort(-1, descending=True).values.gather(1, top_k[:, None] - 1)
        processed = logits.masked_fill(logits < least, -torch.inf)
        return processed.argmax(-1), processed


def _install(sampler: object, **tokens: int | None) -> None:
    config = SimpleNamespace(**tokens)
    model = SimpleNamespace(is_multimodal_model=bool(tokens), hf_config=config, get_vocab_size=lambda: 20)
    kept_mass.install(SimpleNamespace(model_runner=SimpleNamespace(sampler=sampler), model_config=model))


def test_the_second_runners_sampler():
    torch.manual_seed(0)
    logits = torch.randn(3, 20)
    sampler = Sampler(States(20, top_k=[20, 4, 20, 20], top_p=[1.0] * 4, min_p=[0.0, 0.0, 0.3, 0.0]))
    plain = Sampler(sampler.sampling_states)(logits, np.array([0, 1, 2])).logprobs_tensors.logprobs[:, 0]
    _install(sampler)
    cut = sampler(logits, np.array([0, 1, 2])).logprobs_tensors
    assert torch.equal(cut.logprobs[:, 0], plain)
    masses = torch.tensor(kept_mass.decoded(cut.selected_token_ranks.tolist()))
    full = (logits / 0.7).log_softmax(-1).amax(-1)  # the arg-max is what this sampler takes
    torch.testing.assert_close(plain + masses, full)
    assert masses[0] == 0.0
    assert masses[1] < -0.1
    assert masses[2] < -0.01
    uncut = sampler(logits[:2], np.array([0, 3])).logprobs_tensors
    assert uncut.selected_token_ranks.tolist() == [1, 1], "a batch that truncates nothing keeps its ranks"


@pytest.mark.parametrize("cuts", [False, True])
def test_the_second_runners_sampler_draws_no_token_of_an_image(cuts: bool) -> None:
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    logits[:, 7] = logits[:, 9] = 9.0
    top_k = [4, 20] if cuts else [20, 20]
    sampler = Sampler(States(20, top_k=top_k, top_p=[1.0] * 2, min_p=[0.0] * 2), cuts=cuts)
    _install(sampler, image_token_id=7, video_token_id=9, audio_token_id=None)
    tensors = sampler(logits, np.array([0, 1])).logprobs_tensors
    drawn = logits.index_fill(-1, torch.tensor([7, 9]), -torch.inf).argmax(-1)
    full = (logits / 0.7).log_softmax(-1).gather(1, drawn[:, None])[:, 0]
    masses = torch.tensor(kept_mass.decoded(tensors.selected_token_ranks.tolist()))
    torch.testing.assert_close(tensors.logprobs[:, 0] + masses, full)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(("temperature", "top_k"), [(None, None), (0.7, None), (0.7, 4), (0.0, None)])
def test_vllms_first_sampler_draws_no_token_of_an_image(temperature: float | None, top_k: int | None) -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(2))
    logits[:, 7] = 9.0
    rows = torch.full((3,), temperature or 0.0)
    metadata = SimpleNamespace(
        temperature=None if temperature is None else rows,
        all_greedy=temperature is None,
        all_random=bool(temperature),
        max_num_logprobs=0,
        logprob_token_ids=None,
        generators={},
        top_k=None if top_k is None else torch.full((3,), top_k),
        top_p=None,
        logitsprocs=SimpleNamespace(argmax_invariant=[], non_argmax_invariant=[]),
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        no_penalties=True,
        thinking_budget_state_holder=None,
        output_token_ids=[],
    )
    sampler = V1Sampler("processed_logprobs")
    _install(sampler, image_token_id=7)
    output = sampler(logits.clone(), metadata)
    sampled = output.sampled_token_ids.long()
    assert not (sampled == 7).any()
    tensors = output.logprobs_tensors
    masses = torch.tensor(kept_mass.decoded(tensors.selected_token_ranks.tolist()))
    full = (logits / (temperature or 1.0)).log_softmax(-1).gather(1, sampled)[:, 0]
    torch.testing.assert_close(tensors.logprobs[:, 0] + masses, full)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits"])
def test_other_logprobs_are_left_alone(mode):
    sampler = Sampler(States(20, top_k=[4], top_p=[1.0], min_p=[0.0]))
    sampler.logprobs_mode = mode
    _install(sampler)
    assert type(sampler) is Sampler
    kept_mass.install(SimpleNamespace(model_runner=SimpleNamespace(sampler=None)))
