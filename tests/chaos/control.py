"""Client of the proxy's control socket."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from tests.chaos.recording import Pushes


class Control:
    """Calls the `do_` methods of `tests.chaos.proxy.Link`, and reads what the proxy recorded."""

    def __init__(self, folder: Path) -> None:
        self._path, self._pushes = folder / "control", Pushes(folder)
        self._receipts: list[dict[str, Any]] = []

    def __call__(self, do: str, **arguments: Any) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(arguments.get("timeout", 0) + 30.0)
            connection.connect(str(self._path))
            stream = connection.makefile("rwb")
            stream.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            stream.flush()
            return json.loads(stream.readline())

    def receipts(self) -> list[dict[str, Any]]:
        """Return every receipt that the proxy has forwarded to the learner so far."""
        known = list(self._receipts)
        known += self("receipts", since=len(known))
        self._receipts = known
        return known

    def pushed(self) -> dict[tuple[int, int], Path]:
        """Return the last adapters that the learner has pushed, by fence and step."""
        return self._pushes.stored()
