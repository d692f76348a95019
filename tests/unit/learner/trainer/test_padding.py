"""Losses and gradients of a real TRL trainer, with and without what `attach` does to make its passes shorter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch
import trl.kernels.chunked_logprob
from datasets import Dataset
from transformers import TrainerCallback

import learner.trainer.attach
import learner.trainer.hooks
from learner.trainer.attach import attach
from learner.trainer.padding import sorted_windows

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]
CASES = {
    **{loss: {"loss_type": loss} for loss in LOSSES},
    "reference": {"beta": 0.1},
    "sequence-ratios": {"importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.05},
    "entropy": {"entropy_coef": 0.1, "top_entropy_quantile": 0.5},
    "multiples-and-masked": {"pad_to_multiple_of": 5, "mask_truncated_completions": True},
    "reused-batches": {"steps_per_generation": 6, "num_iterations": 2},
}
CUT = {
    (learner.trainer.attach, "score_packed"): lambda trainer, max_tokens: None,
    (learner.trainer.attach, "use_one_product"): lambda model, adapter: 0,
}
PADDED = {**CUT, (learner.trainer.attach, "skip_padding"): lambda trainer: None}


@dataclass
class Seen(TrainerCallback):
    """What a training did: loss of every optimizer step, gradients, and positions that went through the model."""

    losses: list[float] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    positions: int = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        self.gradients.append(torch.cat([g.flatten() for g in trained]).clone())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices this small wait for threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def train(make_trainer, server, client, monkeypatch, one_thread) -> Callable[..., Seen]:
    """Trains two optimizer steps of three micro-batches; `changes` replace attributes of these modules."""

    generate = server._generate

    def some_end(request):
        answer = generate(request)
        for group in answer.groups:
            for completion in group.completions[::2]:
                completion.token_ids[-1] = 2
        return answer

    server._generate = some_end  # or mask_truncated_completions would leave nothing

    def run(changes: dict[tuple[ModuleType, str], object], **config: object) -> Seen:
        monkeypatch.setattr("trl.trainer.utils._use_triton", trl.kernels.chunked_logprob._use_triton)
        for (module, name), value in changes.items():
            monkeypatch.setattr(module, name, value)
        torch.manual_seed(0)
        server.drawn.manual_seed(0)
        server.restart()
        trainer = make_trainer(
            **{
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 3,
                "max_completion_length": 24,
                "temperature": 0.9,
                "vllm_importance_sampling_mode": "token_truncate",
                "max_steps": 2,
                "optim": "sgd",
                "learning_rate": 0.1,
                "max_grad_norm": 0.0,
                **config,
            }
        )
        rows = [{"prompt": " ".join(f"w{(7 * i + j) % 60}" for j in range(1 + 5 * (i % 4)))} for i in range(12)]
        trainer.train_dataset = Dataset.from_list(rows)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zero at first, which would leave the gradients of A at zero
                parameter.data = torch.randn(parameter.shape) * 0.1
        seen, compute = Seen(), trainer.compute_loss
        attach(trainer, client=client, run_id="r", proof_canary=False)

        def compute_loss(*args, **kwargs):
            loss = compute(*args, **kwargs)
            if trainer.state.global_step == len(seen.losses):
                seen.losses.append(0.0)
            seen.losses[-1] += loss.item()
            return loss

        def count(module, args, kwargs):
            seen.positions += kwargs["input_ids"].numel()

        trainer.compute_loss = compute_loss
        trainer.add_callback(seen)
        trainer.model.get_base_model().model.register_forward_pre_hook(count, with_kwargs=True)
        trainer.train()
        return seen

    return run


def assert_same(one: Seen, other: Seen) -> None:
    assert one.losses == pytest.approx(other.losses, rel=1e-5, abs=1e-5)
    assert any(abs(x) > 1e-3 for x in one.losses)
    for mine, theirs in zip(one.gradients, other.gradients, strict=True):
        assert theirs.abs().max() > 1e-3
        assert (mine - theirs).abs().max() < 1e-5
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()  # small gradients are differences of larger terms


@pytest.mark.parametrize("changes", [{}, CUT], ids=["packed", "cut"])
@pytest.mark.parametrize("case", CASES)
def test_shorter_passes_change_nothing(train, case, changes):
    ours = train(changes, **CASES[case])
    plain = train(PADDED, **CASES[case])
    assert_same(ours, plain)
    assert ours.positions < plain.positions


def test_head_on_scored_positions_changes_nothing(train):
    ours = train(PADDED)
    plain = train(
        {**PADDED, (learner.trainer.hooks, "_picks_scored_positions"): trl.kernels.chunked_logprob._use_triton}
    )
    assert_same(ours, plain)


def test_windows_keep_their_rows_together():
    def batch(lengths, first):
        mask = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
        rows = range(first, first + len(lengths))
        return {
            "prompt_mask": torch.ones(len(lengths), 1),
            "completion_mask": mask,
            "row": torch.tensor(rows),
            "name": [str(row) for row in rows],
            "num_items_in_batch": torch.tensor(9),
        }

    sorted_ = sorted_windows([batch([1, 6], 0), batch([5, 2], 2), batch([3, 4], 4), batch([6, 1], 6)], 2)
    assert [b["row"].tolist() for b in sorted_] == [[1, 2], [3, 0], [6, 5], [4, 7]]
    assert [b["name"] for b in sorted_] == [["1", "2"], ["3", "0"], ["6", "5"], ["4", "7"]]
    assert all(b["num_items_in_batch"] == 9 and b["completion_mask"].shape == (2, 6) for b in sorted_)
