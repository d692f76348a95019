"""RolloutClient: retries, streams, and errors of every kind as LockstepErrors that name the URL and the remedy."""

from __future__ import annotations

import json
import time
from typing import Any

import certifi
import httpx
import numpy as np
import pytest

from bench.fleet.simulated import SimulatedServer, serving
from learner.servers.client import RolloutClient
from learner.servers.credentials import read_token, ssl_context
from shared.adapter_file import LORA_A, LORA_B, Layout, lay_out
from shared.checksum import block_sums, block_weights, checksum
from shared.errors import EngineDead, ErrorCode, LockstepError, Overloaded, StaleVersion
from shared.rollouts import GenerateRequest, Prompt
from shared.weights import AdapterManifest, ModuleSpec, WeightVersion

REQUEST = GenerateRequest(prompts=[Prompt(token_ids=[1])])


def client_of(handler):
    return RolloutClient("https://host:1", token="secret", transport=httpx.MockTransport(handler))


def raising(error):
    def handler(request):
        raise error("", request=request)

    return handler


def code_of(call):
    with pytest.raises(LockstepError) as caught:
        call()
    assert "https://host:1" in caught.value.message
    return caught.value.code


def test_server_errors_keep_code_message_and_detail():
    body = StaleVersion("too old", served=3).body().model_dump()
    client = client_of(lambda request: httpx.Response(409, json=body))
    with pytest.raises(LockstepError, match="too old") as caught:
        client.state()
    assert caught.value.code is ErrorCode.STALE_VERSION
    assert caught.value.detail == {"served": 3}


def test_unreachable_slow_and_foreign_servers():
    assert code_of(client_of(raising(httpx.ConnectError)).state) is ErrorCode.NOT_READY
    assert code_of(client_of(raising(httpx.ReadTimeout)).state) is ErrorCode.TIMEOUT
    assert code_of(client_of(lambda r: httpx.Response(200, text="hello")).state) is ErrorCode.PROTOCOL_MISMATCH
    assert code_of(client_of(lambda r: httpx.Response(418, text="bad")).state) is ErrorCode.PROTOCOL_MISMATCH
    with pytest.raises(LockstepError, match="same lockstep-rl") as caught:
        client_of(lambda r: httpx.Response(200, json={"protocol": 99})).state()
    assert caught.value.code is ErrorCode.PROTOCOL_MISMATCH


def test_a_connection_from_before_a_restart_is_replaced_for_requests_that_may_be_repeated(server_state):
    seen = []

    def handler(request):
        seen.append(request.method)
        if len(seen) == 1:
            raise httpx.ReadError("reset by peer", request=request)
        return httpx.Response(200, json=server_state.model_dump() if request.method == "GET" else {})

    client_of(handler).state()
    assert seen == ["GET", "GET"]
    seen.clear()
    client_of(handler).delete_run("r", "a lease")
    assert seen == ["DELETE", "DELETE"]
    seen.clear()
    assert code_of(client_of(handler).sleep) is ErrorCode.NOT_READY
    assert seen == ["POST"]


def test_waits_until_ready(server_state):
    answers = iter([httpx.Response(503), httpx.Response(503), httpx.Response(200)])

    def handler(request):
        assert request.headers["authorization"] == "Bearer secret"
        return next(answers) if request.url.path == "/ready" else httpx.Response(200, json=server_state.model_dump())

    assert client_of(handler).wait_ready(5, poll_s=0.01) == server_state
    waiting = client_of(lambda r: httpx.Response(503))
    assert code_of(lambda: waiting.wait_ready(0.05, poll_s=0.01)) is ErrorCode.NOT_READY


def test_push_is_retried_when_its_response_is_lost():
    bodies = []
    receipt = {
        "epoch": "e",
        "version": {"run_id": "r", "fence": 0, "step": 1},
        "install_seq": 1,
        "checksum": "c",
        "bytes": 4,
        "workers": 1,
        "modules": 1,
        "transfer_seconds": 0,
        "install_seconds": 0,
        "flip_seconds": 0,
        "wait_seconds": 0,
        "repeated": True,
    }

    def handler(request):
        bodies.append(request.content)
        assert request.headers["Lockstep-Lease"] == "lease"
        assert request.headers["Lockstep-Takeover"] == "1"
        assert request.headers["content-length"] == "4"
        if len(bodies) == 1:
            raise httpx.RemoteProtocolError("cut off", request=request)
        return httpx.Response(200, json=receipt)

    assert client_of(handler).push("r", [b"ab", memoryview(b"cd")], "lease", takeover=True).repeated
    assert bodies == [b"abcd"] * 2


def test_stream_yields_groups_and_notices_a_missing_end():
    group = {"prompt_index": 0, "prompt_token_ids": [1], "completions": []}
    error = EngineDead("gone").body().model_dump()

    def lines(*documents):
        return client_of(lambda r: httpx.Response(200, text="".join(json.dumps(d) + "\n" for d in documents)))

    assert len(list(lines(group, {"done": True, "epoch": "e"}).iter_groups(REQUEST))) == 1
    with pytest.raises(LockstepError, match="gone"):
        list(lines(group, error).iter_groups(REQUEST))
    with pytest.raises(LockstepError, match="cut off"):
        list(lines(group).iter_groups(REQUEST))


def test_a_token_file_that_others_can_read_is_said(tmp_path, caplog):
    path = tmp_path / "token"
    path.write_text("a-token-of-a-file\n")
    path.chmod(0o600)
    assert read_token(str(path)) == "a-token-of-a-file"
    assert not caplog.messages
    path.chmod(0o644)
    assert read_token(str(path)) == "a-token-of-a-file"
    assert f"token file {path} can be read by every user of this machine" in caplog.messages[0]


def test_urls_and_tokens(tmp_path, monkeypatch):
    with pytest.raises(LockstepError, match="http://"):
        RolloutClient("localhost:8000")
    monkeypatch.delenv("LOCKSTEP_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("LOCKSTEP_TOKEN", "from-the-environment")
    (tmp_path / "token").write_text("the-newest-of-a-file\nan-older-one-of-it\n")
    assert read_token(None) == "from-the-environment"
    assert read_token(str(tmp_path / "token")) == "the-newest-of-a-file"
    (tmp_path / "empty").write_text(" \n")
    for name in ("none", "empty"):
        with pytest.raises(LockstepError, match="token_file"):
            read_token(str(tmp_path / name))


@pytest.mark.parametrize(("status", "code"), [(401, ErrorCode.UNAUTHENTICATED), (403, ErrorCode.FORBIDDEN)])
def test_a_proxy_that_refuses(status, code):
    client = client_of(lambda r: httpx.Response(status, text="no entry"))
    assert code_of(client.state) is code
    with pytest.raises(LockstepError, match="token_file"):
        client.wait_ready(60)  # at once: waiting brings no token


def test_an_overloaded_server_is_retried_until_the_deadline(monkeypatch):
    slept = []
    monkeypatch.setattr("learner.servers.client.time.sleep", slept.append)
    busy = Overloaded("too much").body().model_dump()
    group = {"prompt_index": 0, "prompt_token_ids": [1], "completions": []}
    answers = []

    def handler(request):
        answers.append(json.loads(request.content).get("stream", False))
        if len(answers) % 2:
            return httpx.Response(429, json=busy, headers={"Retry-After": "3"})
        if answers[-1]:
            return httpx.Response(200, text=json.dumps(group) + '\n{"done":true,"epoch":"e"}\n')
        return httpx.Response(200, json={"epoch": "e", "groups": [group]})

    client = client_of(handler)
    assert len(client.generate(REQUEST).groups) == len(list(client.iter_groups(REQUEST))) == 1
    assert answers == [False, False, True, True]
    assert len(slept) == 2
    assert all(3 <= s <= 4.5 for s in slept)
    client.generate_timeout_s = 2.0
    for call in (client.generate, lambda request: list(client.iter_groups(request))):
        answers.clear()
        with pytest.raises(LockstepError, match="too much"):
            call(REQUEST)
    assert len(slept) == 2


def test_a_stream_that_never_ends_has_a_deadline():
    def endless():
        while True:
            time.sleep(0.01)
            yield b"\n"

    client = client_of(lambda request: httpx.Response(200, content=endless()))
    client.generate_timeout_s = 0.1
    with pytest.raises(LockstepError) as late:
        list(client.iter_groups(REQUEST))
    assert late.value.code is ErrorCode.TIMEOUT


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (httpx.Response(502, text="<html>Bad Gateway</html>"), ErrorCode.NOT_READY),
        (httpx.Response(200, text='{"prompt_index": 0, "pro'), ErrorCode.NOT_READY),
        (httpx.Response(200, text="[1]\n"), ErrorCode.PROTOCOL_MISMATCH),
        (httpx.Response(200, text='{"error": {"code": "of_tomorrow", "message": "?"}}\n'), ErrorCode.PROTOCOL_MISMATCH),
    ],
)
def test_responses_of_a_proxy(answer, code):
    client = client_of(lambda request: answer)
    assert code_of(lambda: list(client.iter_groups(REQUEST))) is code


def _pool(client: RolloutClient) -> Any:
    """Return the connections of a client."""
    transport: Any = client._http._transport
    return transport._pool


def test_connections_to_many_servers_share_what_is_trusted(tmp_path, monkeypatch):
    assert ssl_context(None) is ssl_context(None)
    with RolloutClient("http://a:1") as one, RolloutClient("http://b:1") as other:
        assert _pool(one)._ssl_context is _pool(other)._ssl_context
    before = ssl_context(None)
    monkeypatch.setenv("SSL_CERT_FILE", certifi.where())
    assert ssl_context(None) is not before


def test_a_connection_is_used_again_after_a_stream():
    with serving([SimulatedServer(tokens=2, decode_s=0.0)]) as [url], RolloutClient(url) as client:
        layout = Layout(lay_out({"m" + LORA_A: (1, 2), "m" + LORA_B: (2, 1)}, "float32"))
        sums = b"".join(part.tobytes() for part in block_sums(np.zeros(4, np.int32), block_weights()))
        manifest = AdapterManifest(
            version=WeightVersion(run_id="r", step=0),
            base_weights=None,
            dtype="float32",
            checksum=checksum(layout.index, sums),
            peft_config={},
            modules={"m": ModuleSpec(rank=1, scaling=1.0)},
        )
        client.push("r", [layout.header(manifest), bytes(16)], "lease")
        request = GenerateRequest(prompts=[Prompt(token_ids=[1])], run_id="r")
        assert len(list(client.iter_groups(request))) == 1
        [first] = _pool(client).connections
        assert first.is_available()
        list(client.iter_groups(request))
        assert _pool(client).connections == [first]
        assert first._connection._keepalive_expiry > 10.0, "the next step's push"
