"""What a push that is refused must leave: what is served, whose it is, and a server that can be pushed to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from learner.servers.client import RolloutClient
from shared.adapter_file import MANIFEST_KEY
from shared.errors import ErrorCode, LockstepError
from shared.weights import PushReceipt, WeightVersion
from tests.integration.conftest import FLAGS
from tests.integration.support import policy as P
from tests.integration.support.policy import FP32, PROBE
from tests.integration.support.server import HTTP, ServerProcess, running_server

OWNER, STRANGER = "the owner's lease", "a stranger's lease"


@pytest.fixture(scope="module", params=["adapter", "columns", "merge"])
def server(
    model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[ServerProcess]:
    """A server of each kind of its own: what these tests break, others need."""
    with running_server(model, tmp_path_factory.mktemp("server"), *FLAGS, "--apply", request.param) as process:
        yield process


@pytest.fixture
def policy(client: RolloutClient, model: Path) -> Iterator[torch.nn.Module]:
    """A policy of which the owner's run "r" serves step 5."""
    policy = P.make_policy(model)
    P.randomize(policy, seed=5)
    client.push("r", [_blob(client, policy, "r", 5)], OWNER)
    yield policy
    client.delete_run("r", OWNER)


def _blob(client: RolloutClient, policy, run_id: str, step: int) -> bytes:
    return P.blob(policy, WeightVersion(run_id=run_id, step=step), client.state().base.weights)


def _damaged(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def _with_a_module_named(name: str, data: bytes) -> bytes:
    """Return the blob with its first module under another name."""
    length = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + length])
    manifest = json.loads(document["__metadata__"][MANIFEST_KEY])
    old = next(iter(manifest["modules"]))
    manifest["modules"][name] = manifest["modules"].pop(old)
    for part in (".lora_A.weight", ".lora_B.weight"):
        document[name + part] = document.pop(old + part)
    document["__metadata__"][MANIFEST_KEY] = json.dumps(manifest)
    header = json.dumps(document).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@pytest.mark.parametrize("character", ["a", "\x00", "\N{GRINNING FACE}", '"'])
def test_a_long_module_name_is_refused_and_the_next_push_lands(
    client: RolloutClient, policy, server: ServerProcess, character: str
) -> None:
    long = _with_a_module_named(70_000 * character, _blob(client, policy, "r", 6))
    with pytest.raises(LockstepError) as refused:
        client.push("r", [long], OWNER)
    assert refused.value.status < 500
    assert len(refused.value.message) < 30_000
    assert HTTP.get(server.url + "/health").status_code == 200
    P.randomize(policy, seed=7)
    client.push("r", [_blob(client, policy, "r", 7)], OWNER)
    assert (P.score(client, PROBE) - P.reference(policy, PROBE)).abs().max() < FP32


@pytest.mark.parametrize("run_id", ["r", "another"])
def test_a_takeover_that_fails_takes_nothing(
    client: RolloutClient, policy, server: ServerProcess, model: Path, run_id: str
) -> None:
    served, models = P.score(client, PROBE), HTTP.get(server.url + "/v1/models").json()["data"]
    theirs = P.make_policy(model)
    P.randomize(theirs, seed=6)
    damaged = _damaged(_blob(client, theirs, run_id, 6))
    with pytest.raises(LockstepError) as refused:
        client.push(run_id, [damaged], STRANGER, takeover=True)
    assert refused.value.code is ErrorCode.CHECKSUM_MISMATCH
    assert torch.equal(P.score(client, PROBE, run_id="r"), served)
    assert [run.run_id for run in client.state().runs] == ["r"]
    assert [entry["id"] for entry in HTTP.get(server.url + "/v1/models").json()["data"]] == [m["id"] for m in models]
    with pytest.raises(LockstepError) as refused:
        client.push("r", [_blob(client, policy, "r", 8)], STRANGER)
    assert refused.value.code is ErrorCode.LEASE_MISMATCH
    P.randomize(policy, seed=8)
    client.push("r", [_blob(client, policy, "r", 8)], OWNER)
    assert (P.score(client, PROBE) - P.reference(policy, PROBE)).abs().max() < FP32


def test_a_takeover_of_the_place_lands(client: RolloutClient, policy, model: Path) -> None:
    theirs = P.make_policy(model, target_modules=["q_proj", "down_proj"])
    P.randomize(theirs, seed=9)
    client.push("another", [_blob(client, theirs, "another", 0)], STRANGER, takeover=True)
    assert [run.run_id for run in client.state().runs] == ["another"]
    assert (P.score(client, PROBE) - P.reference(theirs, PROBE)).abs().max() < FP32
    client.push("r", [_blob(client, policy, "r", 5)], OWNER, takeover=True)
    assert (P.score(client, PROBE) - P.reference(policy, PROBE)).abs().max() < FP32


@pytest.mark.parametrize("in_flight", ["drain", "keep", "carried"])
def test_one_push_four_times_at_once_has_one_install(
    client: RolloutClient, policy, server: ServerProcess, in_flight: str
) -> None:
    """All four have the receipt of one install, whatever it is doing when they come, with requests under way."""
    running = threading.Thread(target=P.generate, args=(client, [PROBE]), kwargs={"n": 4, "max_tokens": 200})
    running.start()
    P.randomize(policy, seed=10)
    data = _blob(client, policy, "r", 10)
    receipts: list[PushReceipt] = []

    def push() -> None:
        with RolloutClient(server.url) as own:
            receipts.append(own.push("r", [data], OWNER, in_flight=in_flight))

    pushes = [threading.Thread(target=push) for _ in range(4)]
    for thread in pushes:
        thread.start()
    for thread in (*pushes, running):
        thread.join(60)
    assert len(receipts) == 4
    assert len({receipt.install_seq for receipt in receipts}) == 1
    assert sorted(receipt.repeated for receipt in receipts) == [False, True, True, True]
    assert (P.score(client, PROBE) - P.reference(policy, PROBE)).abs().max() < FP32
