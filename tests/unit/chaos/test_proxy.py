"""The proxy breaks connections as requested, and records pushes and receipts."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from shared.adapter_file import Layout, lay_out
from shared.weights import AdapterManifest, ModuleSpec, PushReceipt, WeightVersion
from shared.wire import RECEIVING, marker
from tests.chaos.control import Control
from tests.chaos.forgery import reversioned
from tests.chaos.processes import REPOSITORY
from tests.chaos.proxy import Link, Proxy

MANIFEST = AdapterManifest(
    version=WeightVersion(run_id="run", fence=2, step=7),
    base_weights=None,
    dtype="float32",
    modules={"a": ModuleSpec(rank=8, scaling=1.0)},
    peft_config={},
    checksum="ab" * 16,
)
LAYOUT = Layout(lay_out({"a.lora_A.weight": (8, 1000), "a.lora_B.weight": (1000, 8)}, "float32"))
BLOB = LAYOUT.header(MANIFEST) + bytes(LAYOUT.nbytes)
RECEIPT = PushReceipt(
    epoch="e1",
    version=MANIFEST.version,
    install_seq=3,
    checksum=MANIFEST.checksum,
    bytes=len(BLOB),
    workers=1,
    modules=1,
    transfer_seconds=0,
    install_seconds=0,
    flip_seconds=0,
    wait_seconds=0,
)


class _Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        assert len(self.rfile.read(int(self.headers["content-length"]))) == len(BLOB)
        self._answer(RECEIPT.model_dump_json().encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for line in (marker(RECEIVING), RECEIPT.model_dump_json().encode()):
            self.wfile.write(b"%x\r\n%s\n\r\n" % (len(line) + 1, line))
            time.sleep(0.2)  # a chunk is a packet
        self.wfile.write(b"0\r\n\r\n")

    def do_GET(self) -> None:
        self._answer(b"x" * 5000)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(scope="module")
def upstream() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture(scope="module")
def control(upstream: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    folder = tmp_path_factory.mktemp("proxy")
    command = [sys.executable, "-m", "tests.chaos.proxy", str(folder), "127.0.0.1", str(upstream)]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    deadline = time.monotonic() + 30
    while not (folder / "control").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    yield Control(folder)
    process.kill()
    process.wait()


@pytest.fixture
def http(control: Control) -> Iterator[httpx.Client]:
    (port,) = control("ports")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=5) as client:
        yield client


def _push(http: httpx.Client) -> httpx.Response:
    return http.put("/v1/runs/run/adapter", content=BLOB)


def test_pushes_and_receipts_are_seen(control: Control, http: httpx.Client) -> None:
    before = len(control.receipts())
    assert http.get("/").content == b"x" * 5000
    assert _push(http).status_code == 200
    (receipt,) = control.receipts()[before:]
    assert (receipt["epoch"], receipt["fence"], receipt["step"]) == ("e1", 2, 7)
    assert control.pushed()[2, 7].read_bytes() == BLOB


def test_a_push_is_held_in_its_middle(control: Control, http: httpx.Client) -> None:
    with ThreadPoolExecutor() as pool:
        held = pool.submit(control, "hold", server=0, at=0.5, timeout=20)
        time.sleep(1.0)
        push = pool.submit(_push, http)
        assert held.result() is True
        time.sleep(0.3)
        assert not push.done()
        control("release", server=0)
        assert push.result().status_code == 200
    assert control("hold", server=0, at=0.5, timeout=0.1) is False


@pytest.mark.parametrize(("at", "lines"), [(0.2, 0), (0.8, 1)])
def test_a_broadcast_is_held_before_the_learner_sends_or_knows_that_it_is_installed(
    control: Control, http: httpx.Client, at: float, lines: int
) -> None:
    before, seen = len(control.receipts()), list[str]()

    def announce() -> None:
        with http.stream("POST", "/v1/runs/run/broadcast", json={}) as answer:
            seen.extend(line for line in answer.iter_lines() if line)

    with ThreadPoolExecutor() as pool:
        held = pool.submit(control, "hold", server=0, at=at, timeout=20, broadcast=True)
        time.sleep(1.0)
        assert _push(http).status_code == 200, "a push over HTTP is not held"
        announced = pool.submit(announce)
        assert held.result() is True
        time.sleep(0.5)
        assert (len(seen), announced.done()) == (lines, False)
        control("release", server=0)
        announced.result()
    assert len(seen) == 2
    assert [receipt["broadcast"] for receipt in control.receipts()[before:]] == [False, True]


def test_a_push_is_reset_in_its_middle(control: Control, http: httpx.Client) -> None:
    with ThreadPoolExecutor() as pool:
        held = pool.submit(control, "hold", server=0, at=0.5, timeout=20)
        time.sleep(1.0)
        push = pool.submit(_push, http)
        assert held.result() is True
        assert control("reset", server=0) == 1
        control("release", server=0)
        with pytest.raises(httpx.TransportError):
            push.result()


def test_an_answer_is_cut_short(control: Control, http: httpx.Client) -> None:
    http.get("/")
    control("cut", server=0, side=1, after=1000)
    with pytest.raises(httpx.RemoteProtocolError):
        http.get("/")
    assert http.get("/").status_code == 200


def test_half_open_connections_stay_silent(control: Control, http: httpx.Client) -> None:
    http.get("/")
    assert control("half_open", server=0) >= 1
    with pytest.raises(httpx.ReadTimeout):
        http.get("/", timeout=1)
    assert http.get("/").status_code == 200


def test_refused_and_silent(control: Control, http: httpx.Client) -> None:
    control("refuse", server=0, on=True)
    with pytest.raises(httpx.TransportError):
        httpx.get(http.base_url)
    control("refuse", server=0, on=False)
    control("block", server=0, on=True)
    with pytest.raises(httpx.TimeoutException):
        http.get("/", timeout=0.5)
    control("block", server=0, on=False)
    assert http.get("/").status_code == 200


def test_another_version_in_the_same_bytes(tmp_path: Path) -> None:
    other = reversioned(BLOB, 1, 9)
    assert b'"fence": 1' in other.replace(b"\\", b"")
    assert other[-LAYOUT.nbytes :] == BLOB[-LAYOUT.nbytes :]


async def test_the_server_is_called_by_a_name_of_the_loopback(tmp_path: Path) -> None:
    """Although the learner, in its own network, calls the proxy by another."""
    heads: list[bytes] = []

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(upstream, "127.0.0.1", 0) as server:
        link = Link(Proxy(tmp_path, []), server.sockets[0].getsockname()[1])
        await link.serve("127.200.200.200")
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.200.200.200:{link.port}/")).status_code == 204
    assert re.search(rb"\r\nHost: +127\.0\.0\.1:%d\r\n" % link.port, heads[0])
