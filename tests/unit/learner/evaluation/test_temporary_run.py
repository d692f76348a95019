"""A stored adapter is pushed as the learner would push it, and its run ends with the evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from learner.adapters.exporter import AdapterExporter
from learner.adapters.stored import open_adapter
from learner.evaluation.temporary_run import adapter_blob, temporary_run
from learner.servers.client import RolloutClient
from shared.adapter_file import header_length, parse_header
from shared.checksum import block_sums, block_weights, checksum
from shared.errors import ErrorCode, LockstepError, NoFreeRun
from shared.weights import WeightVersion
from tests.unit.learner.adapters.test_exporter import peft_model

VERSION = WeightVersion(run_id="r", step=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v": 3}}])
def test_a_stored_adapter_is_pushed_as_the_learner_would(model_dir: Path, tmp_path: Path, dtype: str, lora) -> None:
    model = peft_model(model_dir, **lora)
    model.save_pretrained(tmp_path)
    own = load(b"".join(AdapterExporter(model, dtype=dtype).export(VERSION).pieces()))
    blob = b"".join(adapter_blob(open_adapter(tmp_path), VERSION, dtype))
    header = parse_header(blob[8 : 8 + header_length(blob)])
    tensors = load(blob)
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensors[name], own[name]) for name in own)
    data = torch.frombuffer(bytearray(blob[header.data_offset :]), dtype=torch.uint8)
    elements = data.view(torch.int32 if dtype == "float32" else torch.int16)
    sums = torch.cat(list(block_sums(elements, torch.from_numpy(block_weights()))))
    assert header.manifest.checksum == checksum(header.layout.index, sums.numpy().tobytes())
    assert header.manifest.base_weights is not None, "its base lies beside it"


def test_a_temporary_run_ends_whatever_happens(server, model_dir: Path, tmp_path: Path) -> None:
    peft_model(model_dir).save_pretrained(tmp_path)
    client = RolloutClient("http://fake", transport=server.transport)
    adapter = open_adapter(tmp_path)
    with pytest.raises(KeyboardInterrupt), temporary_run(client, adapter) as version:
        assert list(server.served) == [version.run_id]
        raise KeyboardInterrupt
    assert not server.served
    server.served = dict.fromkeys(("one", "two"), (VERSION, ""))  # perhaps finished ones, which would give way
    with pytest.raises(LockstepError, match="--max-runs 3"), temporary_run(client, adapter):
        pass
    assert not server.pushed[1:]
    server.served.clear()
    server._push = _full
    with pytest.raises(LockstepError, match="--max-runs 3") as refusal, temporary_run(client, adapter):
        pass
    assert refusal.value.code is ErrorCode.NO_FREE_RUN


def _full(run_id, request):
    raise NoFreeRun(f"no room for {run_id}")
