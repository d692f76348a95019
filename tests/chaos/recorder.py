"""The reward function of a training of which a proxy does not see all: it also records what a proxy records elsewhere.

The learner imports it, and with it keeps every adapter before it is pushed, and every receipt of a push over HTTP. On a
cluster a proxy has no place between learner and servers, since a server is listed at its node's address; and what is
broadcast passes no proxy anywhere. A broadcast that has failed is tried again soon, so that faults find others. SIGUSR2
cuts the connections of the learner's collective groups.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from learner.adapters.exporter import AdapterExport
from learner.servers.client import RolloutClient
from learner.sync import transport
from shared.weights import PushReceipt
from tests.chaos.recording import Pushes
from tests.support.rewards import reward_odd

#: Environment variable of the folder to write to.
FOLDER_VARIABLE = "LOCKSTEP_CHAOS_FOLDER"
#: Receipts, one a line; the seconds that a batch takes to be scored, if there is such a file.
RECEIPTS, PAUSE = "receipts.jsonl", "pause"
#: How many connections SIGUSR2 has cut.
CUT = "cut"
_RETRY_S = 1.0

_folder = Path(os.environ.get(FOLDER_VARIABLE, "."))
_push, _send = RolloutClient.push, transport.Transport.send
_http_ports: set[int | None] = set()


def odd_with_pauses(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return the share of odd token ids, after the pause that the suite asks for: servers that start need the cores."""
    with contextlib.suppress(OSError, ValueError):
        time.sleep(float((_folder / PAUSE).read_text()))
    return reward_odd(completion_ids)


def _recorded_send(self: transport.Transport, export: AdapterExport, **kwargs: Any) -> PushReceipt:
    _http_ports.add(urlsplit(self._client.url).port)
    if self._group is not None:
        Pushes(_folder).store(b"".join(bytes(piece) for piece in export.pieces()))
    return _send(self, export, **kwargs)


def _cut_groups(*_: object) -> None:
    """Shut down every TCP connection of this process to another one that is not to a server's HTTP port."""
    with contextlib.ExitStack() as opened:
        found: list[tuple[socket.socket, Any, Any]] = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    connection = opened.enter_context(socket.socket(fileno=os.dup(int(name))))
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        found.append((connection, connection.getsockname(), connection.getpeername()))
        cut, all_own = 0, {own for _, own, _ in found}
        for connection, own, other in found:
            # NCCL's threads have connections to one another.
            if other not in all_own and not _http_ports & {own[1], other[1]}:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                    cut += 1
    (_folder / CUT).write_text(str(cut))


def _recorded_push(client: RolloutClient, run_id: str, pieces: Any, *args: Any, **kwargs: Any) -> PushReceipt:
    Pushes(_folder).store(b"".join(bytes(piece) for piece in pieces))
    receipt = _push(client, run_id, pieces, *args, **kwargs)
    row = {
        "url": client.url,
        "epoch": receipt.epoch,
        "fence": receipt.version.fence,
        "step": receipt.version.step,
        "checksum": receipt.checksum,
        "time": time.monotonic(),
    }
    with (_folder / RECEIPTS).open("a") as stream:  # one write for a line: two threads do not mix them
        stream.write(json.dumps(row) + "\n")
    return receipt


if FOLDER_VARIABLE in os.environ:
    RolloutClient.push = _recorded_push  # type: ignore[method-assign]
    transport.Transport.send = _recorded_send  # type: ignore[method-assign]
    transport._FIRST_RETRY_S = _RETRY_S
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR2, _cut_groups)
