"""A bad push is refused with a clear message, and the served weights stay exactly as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from learner.servers.client import RolloutClient
from shared.adapter_file import MANIFEST_KEY
from shared.errors import ErrorBody, ErrorCode
from shared.weights import WeightVersion
from tests.integration.support import policy as P
from tests.integration.support.server import HTTP

RUN = "bad-pushes"
SERVED = WeightVersion(run_id=RUN, fence=1, step=5)
PROBE = [5, 17, 99, 260, 41, 33, 270, 8, 120, 64, 7, 300]


@pytest.fixture
def policy(client: RolloutClient, model: Path):
    policy = P.make_policy(model)
    P.randomize(policy, seed=7)
    if any(run.run_id == RUN for run in client.state().runs):
        client.delete_run(RUN, P.LEASE)
    P.push(client, policy, RUN, step=5, fence=1)
    return policy


def _put(client: RolloutClient, data: bytes, run_id: str = RUN, lease: str = P.LEASE, **headers: str) -> httpx.Response:
    return HTTP.put(
        f"{client.url}/v1/runs/{run_id}/adapter", content=data, headers={"Lockstep-Lease": lease, **headers}, timeout=60
    )


def _next(policy, client: RolloutClient, **changes) -> bytes:
    """Push new weights as the next version."""
    P.randomize(policy, seed=8)
    version = WeightVersion(**{**SERVED.model_dump(), "step": 6, **changes})
    return P.blob(policy, version, client.state().base.weights)


def _edit(data: bytes, change: Callable[[dict, dict], None]) -> bytes:
    """Return the blob after `change(document, manifest)` of its header."""
    length = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + length])
    manifest = json.loads(document["__metadata__"][MANIFEST_KEY])
    change(document, manifest)
    document["__metadata__"][MANIFEST_KEY] = json.dumps(manifest)
    header = json.dumps(document).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _rename(document: dict, manifest: dict) -> None:
    old, new = "model.layers.0.self_attn.q_proj", "model.layers.9.self_attn.q_proj"
    manifest["modules"][new] = manifest["modules"].pop(old)
    for part in (".lora_A.weight", ".lora_B.weight"):
        document[new + part] = document.pop(old + part)


def _swap_shape(document: dict, manifest: dict) -> None:
    for name, info in document.items():
        if name.endswith("lora_A.weight"):
            info["shape"] = [info["shape"][0] // 2, info["shape"][1] * 2]
            manifest["modules"][name.removesuffix(".lora_A.weight")]["rank"] //= 2
        elif name.endswith("lora_B.weight"):
            info["shape"] = [info["shape"][0] * 2, info["shape"][1] // 2]


def _nan(policy, client: RolloutClient) -> bytes:
    """NaN with a correct checksum, as a broken learner would push it."""
    P.randomize(policy, seed=8)
    exporter = P.AdapterExporter(policy, dtype="float32")
    exporter._check_finite = lambda version: None  # type: ignore[method-assign]
    with torch.no_grad():
        next(p for n, p in policy.named_parameters() if "lora_B" in n).view(-1)[1] = float("nan")
    return b"".join(exporter.export(SERVED.model_copy(update={"step": 6})).pieces())


CASES: dict[str, tuple[ErrorCode, Callable]] = {
    "truncated-body": (ErrorCode.MALFORMED_ADAPTER, lambda p, c: _next(p, c)[:-100]),
    "truncated-header": (ErrorCode.MALFORMED_ADAPTER, lambda p, c: _next(p, c)[:40]),
    "empty": (ErrorCode.MALFORMED_ADAPTER, lambda p, c: b""),
    "not-safetensors": (ErrorCode.MALFORMED_ADAPTER, lambda p, c: b"\x80\x04 pickle?" * 100),
    "trailing-bytes": (ErrorCode.MALFORMED_ADAPTER, lambda p, c: _next(p, c) + b"x"),
    "flipped-bit": (ErrorCode.CHECKSUM_MISMATCH, lambda p, c: (d := _next(p, c))[:-9] + bytes([d[-9] ^ 1]) + d[-8:]),
    "wrong-checksum": (
        ErrorCode.CHECKSUM_MISMATCH,
        lambda p, c: _edit(_next(p, c), lambda d, m: m.update(checksum="0" * 32)),
    ),
    "nan": (ErrorCode.NOT_FINITE, _nan),
    "wrong-shape": (ErrorCode.SHAPE_MISMATCH, lambda p, c: _edit(_next(p, c), _swap_shape)),
    "unknown-module": (ErrorCode.UNSUPPORTED_ADAPTER, lambda p, c: _edit(_next(p, c), _rename)),
    "missing-tensor": (ErrorCode.MALFORMED_ADAPTER, lambda p, c: _edit(_next(p, c), lambda d, m: d.pop(sorted(d)[-1]))),
    "wrong-base": (
        ErrorCode.BASE_MISMATCH,
        lambda p, c: _edit(_next(p, c), lambda d, m: m.update(base_weights="ab" * 16)),
    ),
    "wrong-dtype": (
        ErrorCode.UNSUPPORTED_ADAPTER,
        lambda p, c: P.blob(p, SERVED.model_copy(update={"step": 6}), None, "bfloat16"),
    ),
    "other-protocol": (
        ErrorCode.PROTOCOL_MISMATCH,
        lambda p, c: _edit(_next(p, c), lambda d, m: m.update(protocol=99)),
    ),
    "dora": (
        ErrorCode.UNSUPPORTED_ADAPTER,
        lambda p, c: _edit(_next(p, c), lambda d, m: m["peft_config"].update(use_dora=True)),
    ),
    "other-run-inside": (
        ErrorCode.MALFORMED_ADAPTER,
        lambda p, c: _edit(_next(p, c), lambda d, m: m["version"].update(run_id="other")),
    ),
    "older-step": (ErrorCode.STALE_VERSION, lambda p, c: _next(p, c, step=4)),
    "older-fence": (ErrorCode.STALE_VERSION, lambda p, c: _next(p, c, fence=0, step=9)),
    "same-version-other-bytes": (ErrorCode.STALE_VERSION, lambda p, c: _next(p, c, step=5)),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_and_nothing_changed(client: RolloutClient, policy, case: str) -> None:
    before, state = P.score(client, PROBE), client.run(RUN)
    code, make = CASES[case]
    answer = _put(client, make(policy, client))
    assert 400 <= answer.status_code < 500, answer.text
    error = ErrorBody.model_validate(answer.json()).error
    assert error.code == code, answer.text
    assert len(error.message) > 20
    assert client.run(RUN).version == SERVED
    assert client.run(RUN).slots == state.slots
    assert torch.equal(P.score(client, PROBE), before), "served logprobs changed after a refused push"


def test_next_good_push_works_after_all_that(client: RolloutClient, policy) -> None:
    assert _put(client, _next(policy, client)).status_code == 200
    assert (P.score(client, PROBE) - P.reference(policy, PROBE)).abs().max() < 1e-4


def test_rank_above_the_servers(client: RolloutClient, model: Path) -> None:
    policy = P.make_policy(model, r=32)
    answer = _put(
        client, P.blob(policy, WeightVersion(run_id="rank", step=0), None), "rank", **{"Lockstep-Takeover": "1"}
    )
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "rank_too_high"
    assert "--max-lora-rank 16" in answer.json()["error"]["message"]


def test_a_strangers_push_is_refused(client: RolloutClient, policy) -> None:
    answer = _put(client, _next(policy, client), lease="a stranger's lease")
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "lease_mismatch"
    assert "Lockstep-Takeover" in answer.json()["error"]["message"]
    assert client.run(RUN).version == SERVED


def test_another_run_without_room_is_refused(client: RolloutClient, policy, model: Path) -> None:
    data = P.blob(policy, WeightVersion(run_id="another", step=0), client.state().base.weights)
    answer = _put(client, data, "another")
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "no_free_run"


def test_a_retried_push_is_recognised(client: RolloutClient, policy) -> None:
    data = P.blob(policy, SERVED, client.state().base.weights)
    again = _put(client, data).json()
    assert again["repeated"] is True
    assert again["version"] == SERVED.model_dump()
    assert client.run(RUN).install_seq == again["install_seq"]
