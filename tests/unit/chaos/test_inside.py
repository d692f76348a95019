"""Errors that a process of the engine makes at a signal, and connections that the learner cuts at one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import recorder
from tests.chaos.devices import INSIDE, Devices
from tests.chaos.surroundings import UnavailableError
from tests.chaos.world import python_path

# A signal that comes right before a system call that waits is seen only after it, so this waits a little at a time.
# Whatever else holds it up is in what the test then shows.
_WAITS = """
import faulthandler, time
faulthandler.dump_traceback_later(200, exit=True)
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGUSR2, "allocate memory"), (signal.SIGUSR1, "Expected Tensor with single nonzero")]
)
def test_a_signal_ends_a_process_with_an_error_of_torch(number: signal.Signals, words: str) -> None:
    environment = {**os.environ, **python_path(INSIDE)}
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITS], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said = process.communicate(timeout=300)[1]
    assert words in said
    assert process.returncode == 1


_READS = "import socket, sys; print(socket.create_connection(('127.0.0.1', int(sys.argv[1]))).recv(1))"


def test_the_learner_cuts_what_is_not_http(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as http, socket.create_server(("127.0.0.1", 0)) as group:
        monkeypatch.setattr(recorder, "_http_ports", {http.getsockname()[1]})
        monkeypatch.setattr(recorder, "_folder", tmp_path)
        readers = [
            subprocess.Popen([sys.executable, "-c", _READS, str(at.getsockname()[1])], stdout=subprocess.PIPE)
            for at in (http, group)
        ]
        kept, cut = http.accept()[0], group.accept()[0]
        with kept, cut, socket.create_connection(group.getsockname()) as within, group.accept()[0] as beside:
            recorder._cut_groups()
            kept.sendall(b"x")
            assert [reader.communicate(timeout=30)[0] for reader in readers] == [b"b'x'\n", b"b''\n"]
            within.sendall(b"y")
            assert beside.recv(1) == b"y"
    assert json.loads((tmp_path / recorder.CUT).read_text()) >= 1


@pytest.mark.parametrize(
    ("visible", "learner", "server", "shared"), [("2,5,7", "2", "5", False), ("GPU-ab", "GPU-ab", "GPU-ab", True)]
)
def test_learner_and_servers_have_a_gpu_each_if_there_are_two(
    monkeypatch: pytest.MonkeyPatch, visible: str, learner: str, server: str, shared: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices = Devices.of_this_machine()
    assert (devices.learner, devices.server, devices.shared) == (learner, server, shared)
    assert devices.learner_environment["CUDA_VISIBLE_DEVICES"] == learner
    assert devices.server_environment["CUDA_VISIBLE_DEVICES"] == server
    assert ("NCCL_HOSTID" in devices.learner_environment) is shared, "NCCL takes no GPU twice of one host"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UnavailableError, match="no GPU is visible"):
        Devices.of_this_machine()
