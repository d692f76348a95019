"""A tiny random Qwen3 with a word tokenizer, a fake server that holds the same base, and a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from learner.config import LearnerConfig
from learner.rewards import pool
from learner.servers.client import RolloutClient
from shared.fingerprint import fingerprint_checkpoint
from shared.weights import ServerState
from tests.support.fake_server import FakeServer
from tests.support.reward_workers import FORKED, prepare
from tests.support.rewards import reward_odd

torch.set_num_threads(1)  # of tensors this small, a second thread only waits for its turn on a busy machine

WORDS = [f"w{i}" for i in range(61)]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint directory of the tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="w0"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server_state(model_dir: Path) -> ServerState:
    """State of a healthy server of the tiny model."""
    return ServerState(
        epoch="e1",
        ready=True,
        model=str(model_dir),
        base=fingerprint_checkpoint(str(model_dir)),
        vllm_version="0.32.0",
        device="cpu",
        dtype="float32",
        lora_dtype="float32",
        max_model_len=128,
        max_lora_rank=16,
        slots_per_run=2,
        max_runs=2,
        workers=1,
        logprobs_mode="processed_logprobs",
    )


@pytest.fixture
def server(model_dir: Path, server_state: ServerState) -> FakeServer:
    """A server with the base of `model_dir`."""
    return FakeServer(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), server_state)


@pytest.fixture
def client(server: FakeServer) -> RolloutClient:
    """A client of `server`."""
    return RolloutClient("http://fake", transport=server.transport)


@pytest.fixture
def canary() -> bool:
    """Whether trainings push one by default, which takes as long as the rest of a short training."""
    return False


@pytest.fixture(autouse=True)
def canary_by_default(canary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LearnerConfig.__init__.__kwdefaults__, "proof_canary", canary)


@pytest.fixture
def reward_workers() -> int | None:
    """How many a trainer has, unless None: what it is told. Two would take twice as long to start."""
    return 1


@pytest.fixture
def no_workers_left(reward_workers: int | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends the reward workers of what a test attached."""
    if reward_workers is not None:
        monkeypatch.setattr(pool, "get_context", lambda _: FORKED)
        monkeypatch.setattr(pool.worker, "prepare", prepare)

        def make_pool(*args: Any, workers: int, **options: Any) -> pool.RewardPool:
            return pool.RewardPool(*args, workers=min(workers, reward_workers), **options)

        monkeypatch.setattr("learner.trainer.reward_hooks.RewardPool", make_pool)
    yield
    pool.close_all()


@pytest.fixture
def make_trainer(model_dir: Path, tmp_path: Path, no_workers_left: None) -> Callable[..., GRPOTrainer]:
    """Builds a GRPOTrainer of the tiny model; keyword arguments go to GRPOConfig, `lora` to LoraConfig."""

    def make(
        lora: dict[str, Any] | None = None, trainer_kwargs: dict[str, Any] | None = None, **config: Any
    ) -> GRPOTrainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": False,
            "max_steps": 3,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            **config,
        }
        lora_settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        rows = [{"prompt": f"w{i} w{i + 7} w{i + 20}"} for i in range(16)]
        return GRPOTrainer(
            model=str(model_dir),
            args=GRPOConfig(**settings),
            peft_config=LoraConfig(**{**lora_settings, **(lora or {})}),
            **{"train_dataset": Dataset.from_list(rows), "reward_funcs": [reward_odd], **(trainer_kwargs or {})},
        )

    return make


@pytest.fixture
def grpo(tmp_path: Path) -> Callable[..., GRPOConfig]:
    """Builds a GRPOConfig that is valid on a CPU."""

    def make(**settings: Any) -> GRPOConfig:
        return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)

    return make
