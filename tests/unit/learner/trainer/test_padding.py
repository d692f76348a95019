"""Losses and gradients of a real TRL trainer, with and without what `attach` does to make its passes shorter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch
import trl.kernels.chunked_logprob
from datasets import Dataset
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

import learner.trainer.attach
import learner.trainer.hooks
from learner.passes import attention
from learner.passes.packing import Row, Segment
from learner.trainer.attach import attach
from learner.trainer.forks import Forks
from learner.trainer.packed_scoring import PackedScoring, pass_tokens, why_not_packed
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
    (learner.trainer.attach, "score_packed"): lambda *_, **__: None,
    (learner.trainer.attach, "use_one_product"): lambda model, adapter: 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
PADDED = {
    **CUT,
    (learner.trainer.attach, "cut_passes"): lambda trainer: None,
    (learner.trainer.attach, "sort_rows"): lambda trainer: None,
}


@dataclass
class Seen(TrainerCallback):
    """What a training did: loss of every optimizer step, gradients, and positions that went through the model."""

    losses: list[float] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    positions: int = 0
    packed: list[int] = field(default_factory=list)  # positions of each packed pass

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
        for group in answer.groups if request.policy != "base" else ():
            for completion in group.completions[::2]:
                completion.token_ids[-1] = 2
        return answer

    server._generate = some_end  # or mask_truncated_completions would leave nothing

    def run(
        changes: dict[tuple[ModuleType, str], object], options: dict[str, object] | None = None, **config: object
    ) -> Seen:
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
        # The tokens that end a completion were not drawn.
        options = {"proof_canary": False, "proof_tolerance": 99.0, **(options or {})}
        attach(trainer, client=client, run_id="r", **options)

        def compute_loss(*args, **kwargs):
            loss = compute(*args, **kwargs)
            if trainer.state.global_step == len(seen.losses):
                seen.losses.append(0.0)
            seen.losses[-1] += loss.item()
            return loss

        def count(module, args, kwargs):
            seen.positions += kwargs["input_ids"].numel()
            if "packed_segments" in kwargs:
                seen.packed.append(kwargs["input_ids"].numel())

        trainer.compute_loss = compute_loss
        trainer.add_callback(seen)
        trainer.model.get_base_model().model.register_forward_pre_hook(count, with_kwargs=True)
        trainer.train()
        return seen

    return run


def _with_rope(init, rope):
    def init_with_rope(self, **settings):
        init(self, **{**settings, "rope_parameters": dict(rope)})

    return init_with_rope


def assert_same(one: Seen, other: Seen) -> None:
    assert one.losses == pytest.approx(other.losses, rel=1e-5, abs=1e-5)
    assert any(abs(x) > 1e-3 for x in one.losses)
    for mine, theirs in zip(one.gradients, other.gradients, strict=True):
        assert theirs.abs().max() > 1e-3
        assert (mine - theirs).abs().max() < 1e-5
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()  # small gradients are differences of larger terms


@pytest.mark.parametrize(
    ("case", "changes"),
    [*((case, {}) for case in CASES), *((case, CUT) for case in ("grpo", "entropy", "reused-batches"))],
    ids=[*CASES, "grpo-cut", "entropy-cut", "reused-batches-cut"],
)
def test_shorter_passes_change_nothing(train, case, changes):
    ours = train(changes, **CASES[case])
    plain = train(PADDED, **CASES[case])
    assert_same(ours, plain)
    assert ours.positions < plain.positions


@pytest.mark.parametrize("case", ["grpo", "reused-batches", "no-correction"])
def test_the_size_of_passes_changes_nothing(train, case):
    """Where logprobs are known before the loss, and where they are not."""
    config = {**CASES, "no-correction": {"vllm_importance_sampling_correction": False}}[case]
    ours = train({}, {"max_tokens_per_pass": 60}, **config)
    assert_same(ours, train(PADDED, **config))
    assert max(ours.packed) <= 60
    assert len(ours.packed) > 10


def test_passes_do_not_follow_micro_batches(train):
    seen = train({}, {"max_tokens_per_pass": 10_000}, max_steps=1)
    # A few rows to compare, and all rows.
    assert len(seen.packed) == 2


@pytest.mark.parametrize(
    ("config", "passes"),
    [
        ({}, 4),
        ({"beta": 0.1}, 4 + 3),  # those of the reference model
        ({"gradient_checkpointing": True}, 1 + 3 * 2),
        # Nothing is scored before: a pass for each micro-batch.
        ({"vllm_importance_sampling_correction": False}, 1 + 3 * 3),
        # Two steps on each batch: the first has half of its rows, the second other weights.
        ({"steps_per_generation": 6}, 1 + 2 + 3 + 2),
        ({"num_iterations": 2}, 1 + 2 + 3 + 2),
    ],
    ids=str,
)
def test_a_batch_that_is_one_step_is_passed_through_once(train, config, passes):
    seen = train({}, {"max_tokens_per_pass": 10_000}, max_steps=3, **config)
    assert len(seen.packed) == passes
    assert_same(seen, train(PADDED, max_steps=3, **config))


NO_HOOK = {(learner.trainer.attach, "keep_old_values"): lambda trainer: None}


@pytest.mark.parametrize(
    ("changes", "options", "equal"),
    [
        ({}, {}, True),
        ({}, {"packed_passes": False}, True),
        (NO_HOOK, {"packed_passes": False}, False),
        ({(learner.trainer.attach, "score_packed"): lambda *_, **__: None}, {}, True),
    ],
    ids=["packed", "cut", "cut-without", "fallback"],
)
def test_ratios_are_1_at_the_weights_of_the_old_logprobs_in_bfloat16(
    make_trainer, server, client, monkeypatch, one_thread, changes, options, equal
):
    """Rows of a bnpo loss stay as TRL shuffles them, so a row's two passes have other companions and other widths."""
    for (module, name), value in changes.items():
        monkeypatch.setattr(module, name, value)
    trainer = make_trainer(
        bf16=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        max_completion_length=24,
        max_steps=2,
        learning_rate=1e-3,
        loss_type="bnpo",
    )
    rows = [{"prompt": " ".join(f"w{(7 * i + j) % 60}" for j in range(1 + 5 * (i % 4)))} for i in range(12)]
    trainer.train_dataset = Dataset.from_list(rows)
    attach(trainer, client=client, run_id="r", proof_canary=False, proof_tolerance=1.0, **options)
    compute, score = trainer._compute_loss, trainer._get_per_token_logps_and_entropies
    now, differences, gradients = {}, [], Seen()

    def compute_seen(model, inputs):
        now.update(inputs)
        return compute(model, inputs)

    def score_seen(*args, **kwargs):
        scored = score(*args, **kwargs)
        if torch.is_grad_enabled() and scored[0].requires_grad:
            differences.append((scored[0] - now["old_per_token_logps"]).abs().max().item())
        return scored

    trainer._compute_loss, trainer._get_per_token_logps_and_entropies = compute_seen, score_seen
    trainer.add_callback(gradients)
    trainer.train()
    assert len(differences) == 6
    assert (max(differences) == 0.0) is equal
    assert all(gradient.abs().max() > 0 for gradient in gradients.gradients)


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}, LONGROPE], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_nothing_is_cut_where_positions_depend_on_the_width(train, monkeypatch, rope, packed):
    """All passes have the width of the batch, so that each row has the same angles in all of them."""
    monkeypatch.setattr(Qwen3Config, "__init__", _with_rope(Qwen3Config.__init__, rope))
    ours = train({}, {"packed_passes": packed, "proof_tolerance": 1e3}, max_steps=1)
    plain = train(PADDED, {"packed_passes": packed, "proof_tolerance": 1e3}, max_steps=1)
    assert ours.positions == plain.positions
    assert not ours.packed


@pytest.mark.parametrize(
    ("needed_gib", "free_gib", "hidden", "tokens"),
    [
        (2, 10, 4096, 2816),
        (1, 1000, 4096, 8192),
        (1, 1000, 576, 28928),
        (2, 10, 576, 2816),
        (100, 10, 4096, 256),
        (0, 10, 4096, 8192),
    ],
)
def test_passes_take_a_part_of_the_free_memory(needed_gib, free_gib, hidden, tokens):
    assert pass_tokens(1000, needed_gib * 2**30, free_gib * 2**30, hidden) == tokens


def test_passes_that_differ_are_not_believed(train, monkeypatch, caplog):
    attend = attention.attend

    def wrong(*args, **kwargs):
        out, weights = attend(*args, **kwargs)
        return out.flip(1), weights

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.PACKED, wrong)
    ours = train({})
    assert "not packed: their logprobs differ" in caplog.text
    assert_same(ours, train(PADDED))


def test_a_check_that_runs_out_of_memory_leaves_the_model_training():
    """A caller may catch it, and go on with smaller batches."""

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("of the device")

    scoring, model = object.__new__(PackedScoring), torch.nn.Dropout()
    scoring._plain, scoring._forks = out_of_memory, Forks()
    with pytest.raises(torch.OutOfMemoryError):
        scoring._check_first(model, torch.ones(1, 4), torch.ones(1, 4), 2, [Row([1, 1], [1, 1])])
    assert model.training


@pytest.mark.parametrize("packed", [True, False])
def test_a_second_training_does_not_take_old_values_for_the_present_ones(make_trainer, client, packed):
    """TRL goes on with the rows that the first has left of a generation batch, at step 0 again and other weights."""
    trainer = make_trainer(
        steps_per_generation=2, max_steps=1, vllm_importance_sampling_mode="token_truncate", learning_rate=0.3
    )
    session = attach(trainer, client=client, run_id="r", packed_passes=packed)
    score, compute, inputs, moved = trainer._get_per_token_logps_and_entropies, trainer._compute_loss, {}, []

    def compute_seen(model, own):
        inputs.update(own)
        return compute(model, own)

    def score_seen(*args, **options):
        scored = score(*args, **options)
        if torch.is_grad_enabled():
            moved.append((scored[0].detach() - inputs["old_per_token_logps"]).abs().max().item())
        return scored

    trainer._compute_loss, trainer._get_per_token_logps_and_entropies = compute_seen, score_seen
    trainer.train()
    trainer.train()
    session.close()
    assert moved[0] == 0.0
    assert moved[1] > 0.1


@pytest.mark.parametrize("asked", [{"sliding_window": 4}, {"s_aux": torch.zeros(2)}, {"softcap": 50.0}], ids=str)
def test_attention_that_is_more_than_causal_is_never_packed(asked):
    query = torch.zeros(1, 2, 3, 4)
    segments = [(Segment(0, 3, 0, 0), None)]
    with pytest.raises(ValueError, match=next(iter(asked))):
        attention.attend(None, query, query, query, None, packed_segments=segments, **asked)
    attention.attend(None, query, query, query, None, packed_segments=segments, **dict.fromkeys(asked))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
    ],
    ids=str,
)
def test_models_that_are_not_packed(changes, reason):
    model = Qwen3ForCausalLM(Qwen3Config(hidden_size=8, intermediate_size=8, num_hidden_layers=2, vocab_size=16))
    assert why_not_packed(model, torch.device("cpu"), torch.float32) is None
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert reason in why_not_packed(model, torch.device("cpu"), torch.float32)


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
