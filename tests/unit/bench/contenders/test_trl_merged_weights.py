"""TRL's own sync with TRL's own classes; only its HTTP and NCCL client is a stand-in."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common.harness import Skip
from bench.common.models import SHAPES, Policy, optimizer_step
from bench.common.servers import Setting
from bench.contenders.trl_merged_weights import MERGED, MergedPath, TrlMergedWeights, make_generation

# The versions of vLLM that TRL names are not all that it works with.
pytestmark = pytest.mark.filterwarnings("ignore:TRL currently supports vLLM:UserWarning")


def vllms_packing() -> Any:
    """Return vLLM's module that gathers weights, without its package, which takes long to import."""
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0], "distributed", "weight_transfer", "packed_tensor.py")
    spec = importlib.util.spec_from_file_location("vllms_packing", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


class Client:
    """Takes what TRL would stream, gathered by vLLM."""

    def __init__(self, base_url: str, group_port: int, connection_timeout: float) -> None:
        self.received: dict[str, torch.Tensor] = {}
        self.resets = 0

    def init_communicator(self, device: Any) -> None:
        pass

    def update_named_params(self, metadata: list[Any], named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
        packing = vllms_packing()
        chunk = packing.pack_tensors(named_params, lambda item: item[1], 2**30)
        parts = chunk.names, chunk.shapes, chunk.dtypes, chunk.tensor_sizes
        self.received = dict(packing.unpack_tensor(chunk.packed_tensor, *parts))
        assert [name for name, _, _ in metadata] == list(self.received)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, prompts: list[list[int]], **sampling: Any) -> dict[str, Any]:
        assert sampling == {"max_tokens": 1, "temperature": 0.0}
        return {"completion_ids": [[7]], "logprobs": [[[-1.5]]]}


def test_without_copies_the_base_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails, TRL sends what it has merged, and `send_copies` can go."""
    monkeypatch.setattr("trl.generation.vllm_generation.VLLMClient", Client)
    monkeypatch.setattr("bench.contenders.trl_merged_weights.send_copies", lambda generation: None)
    policy = Policy(SHAPES["tiny"].write(tmp_path, "float32"), "cpu", "float32")
    before = policy.base.model.layers[0].self_attn.q_proj.weight.clone()
    with policy.adapter(8, "float32") as model:
        generation = make_generation("http://127.0.0.1:1", model)
        optimizer_step(model)
        MergedPath(generation).push(1)
    sent = generation.vllm_client.received["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(sent, before)


def test_a_push_streams_every_base_parameter_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.generation.vllm_generation.VLLMClient", Client)
    policy = Policy(SHAPES["tiny"].write(tmp_path, "float32"), "cpu", "float32")
    names = {name for name, _ in policy.base.named_parameters()}
    before = policy.base.model.layers[0].self_attn.q_proj.weight.clone()
    with policy.adapter(8, "float32") as model:
        generation = make_generation("http://127.0.0.1:1", model)
        path = MergedPath(generation)
        optimizer_step(model)
        moved = path.push(1)
        client = generation.vllm_client
        assert set(client.received) == names
        assert client.resets == 1
        assert moved.nbytes == 4 * sum(tensor.numel() for tensor in client.received.values())
        merged = client.received["model.layers.0.self_attn.q_proj.weight"]
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        torch.testing.assert_close(merged, before + layer.get_delta_weight("default"))
        torch.testing.assert_close(layer.base_layer.weight, before)
        assert path.first_token([1, 2]) == (7, -1.5)
    assert {name for name, _ in policy.base.named_parameters()} == names


def test_what_it_cannot_do(tmp_path: Path) -> None:
    setting = Setting(tmp_path, device="cpu", server_device=None, dtype="float32", engine_flags=())
    with pytest.raises(Skip, match="needs two GPUs"):
        TrlMergedWeights(setting).start(tmp_path, 8)


def test_the_server_is_started_as_trl_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("bench.contenders.trl_merged_weights.Server", lambda *args: started.extend(args))
    monkeypatch.setattr(Setting, "same_gpu", False)
    setting = Setting(tmp_path, device="cuda:0", server_device="1", dtype="bfloat16", engine_flags=("--dtype", "half"))
    TrlMergedWeights(setting).start(tmp_path, 8)
    _, command, _, _, env = started
    assert "--weight-transfer-config" in command
    assert command[-2:] == ["--dtype", "half"]
    assert env["VLLM_SERVER_DEV_MODE"] == "1"
    assert env["CUDA_VISIBLE_DEVICES"] == "1"
    assert MERGED in TrlMergedWeights.notes
