"""The reward function of a training on a cluster, which also records what a proxy records elsewhere.

The learner imports it, and with it keeps every adapter before it is pushed, and every receipt once it has come. A proxy
has no place between learner and servers on a cluster: a server is listed at its node's address.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from learner.servers.client import RolloutClient
from shared.weights import PushReceipt
from tests.chaos.recording import Pushes
from tests.support.rewards import reward_odd

#: Environment variable of the folder to write to.
FOLDER_VARIABLE = "LOCKSTEP_CHAOS_FOLDER"
#: Receipts, one a line; the seconds that a batch takes to be scored, if there is such a file.
RECEIPTS, PAUSE = "receipts.jsonl", "pause"

_folder = Path(os.environ.get(FOLDER_VARIABLE, "."))
_push = RolloutClient.push


def odd_with_pauses(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return the share of odd token ids, after the pause that the suite asks for: servers that start need the cores."""
    with contextlib.suppress(OSError, ValueError):
        time.sleep(float((_folder / PAUSE).read_text()))
    return reward_odd(completion_ids)


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
