"""`learner eval` of several policies, stored ones among them, and the statistics beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load

import learner.commands.eval
from learner.adapters.exporter import AdapterExporter
from learner.adapters.stored import open_adapter
from learner.cli import main
from learner.evaluation.results import EvalResult, EvalRow
from learner.evaluation.statistics import EvalPoint, differences, interval, lines
from learner.evaluation.temporary_run import adapter_blob, temporary_run
from learner.servers.client import RolloutClient
from learner.tasks import Task
from shared.adapter_file import header_length, parse_header
from shared.checksum import block_sums, block_weights, checksum
from shared.errors import ErrorCode, LockstepError, NoFreeRun
from shared.weights import WeightVersion
from tests.unit.learner.adapters.test_exporter import peft_model

TASK = f"{__name__}:task"
VERSION = WeightVersion(run_id="r", step=0)


def task(**_):
    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 9}"} for i in range(12)])
    return Task(name="toy", train=rows.select(range(4)), eval=rows.select(range(4, 12)), reward_funcs=[odd])


def odd(completion_ids, **_):
    return [float(ids[0] % 2) for ids in completion_ids]


def result(policy: str, rewards: list[list[float]]) -> EvalResult:
    rows = [EvalRow(i, "", "", "stop", 1, {"odd": r}, r) for i, values in enumerate(rewards) for r in values]
    mean = sum(sum(values) / len(values) for values in rewards) / len(rewards)
    return EvalResult("toy", policy, [policy], len(rewards), mean, 0.1, {"odd": mean}, 1, rows)


def test_differences_are_paired() -> None:
    base = result("base", [[0.0], [1.0], [0.0], [1.0]])
    same = result("same", [[0.0], [1.0], [0.0], [1.0]])
    better = result("better", [[1.0, 0.0], [1.0, 1.0], [0.5, 0.5], [1.0, 1.0]])
    no, gain = differences([base, same, better])
    assert (no.difference, no.stderr, no.low, no.high) == (0.0, 0.0, 0.0, 0.0)
    values = torch.tensor([0.5, 0.0, 0.5, 0.0])
    assert gain.against == "base"
    assert gain.difference == pytest.approx(0.25)
    assert gain.stderr == pytest.approx(values.std().item() / 2)
    assert gain.high - gain.low == pytest.approx(2 * 1.959964 * gain.stderr)
    text = lines([base, same, better])
    assert "+0.250 [" in text[2]
    assert "against base" in text[2]
    assert "against" not in text[0]
    assert differences([]) == []


def test_intervals() -> None:
    low, high = interval(result("p", [[1.0]] * 10))
    assert high == 1.0, "ten of ten is no proof of always"
    assert 0.6 < low < 0.8, "ten of ten is no proof of always"
    low, high = interval(result("p", [[3.0], [5.0]]))
    assert (low + high) / 2 == pytest.approx(4.0)
    assert high - low == pytest.approx(2 * 1.959964 * 0.1)


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


@pytest.fixture
def connected(server, monkeypatch):
    def connect(url, token=None, **kwargs):
        return RolloutClient(url, token, transport=server.transport, **kwargs)

    monkeypatch.setattr(learner.commands.eval, "RolloutClient", connect)
    return server


def test_policies_side_by_side(connected, model_dir: Path, tmp_path: Path, capsys) -> None:
    peft_model(model_dir).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "eval.json"
    flags = ["--rollout-url", "http://fake", "--task", TASK, "--max-tokens", "4", "--json", str(out)]
    assert main(["eval", *flags, "--policy", "base", str(tmp_path / "adapter")]) == 0
    document = json.loads(out.read_text())
    assert [r["policy"] for r in document["results"]] == ["base", str(tmp_path / "adapter")]
    assert document["results"][0]["low"] <= document["results"][0]["reward"] <= document["results"][0]["high"]
    assert document["results"][1]["versions"][0].startswith("eval-")
    assert document["differences"][0]["against"] == "base"
    assert "8 questions" in capsys.readouterr().out
    assert connected.pushed, "the temporary run is gone"
    assert not connected.served, "the temporary run is gone"
    assert main(["eval", *flags, "--policy", str(tmp_path / "nothing")]) == 2


def test_a_temporary_run_ends_whatever_happens(server, model_dir: Path, tmp_path: Path) -> None:
    peft_model(model_dir).save_pretrained(tmp_path)
    client = RolloutClient("http://fake", transport=server.transport)
    adapter = open_adapter(tmp_path)
    with pytest.raises(KeyboardInterrupt), temporary_run(client, adapter) as version:
        assert list(server.served) == [version.run_id]
        raise KeyboardInterrupt
    assert not server.served
    server._push = _full
    with pytest.raises(LockstepError, match="--max-runs 2") as refusal, temporary_run(client, adapter):
        pass
    assert refusal.value.code is ErrorCode.NO_FREE_RUN


def _full(run_id, request):
    raise NoFreeRun(f"no room for {run_id}")


def test_interval_is_wilsons() -> None:
    # Published example: 15 of 148 gives 0.0624 to 0.1605 (Newcombe 1998, method 3: 81 of 263 gives 0.2553 to 0.3662).
    low, high = EvalPoint(81 / 263, 263).interval()
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert EvalPoint(0.0, 128).interval()[0] == 0.0
    assert EvalPoint(1.0, 128).interval()[1] == 1.0
