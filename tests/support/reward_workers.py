"""Reward workers forked from one process with the imports done, for tests that are not about how they start."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping

from learner.rewards import worker

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__, "tests.support.rewards"])


def prepare(_: int, blobs: Mapping[int, bytes]) -> None:
    """Prepare a worker whose parent is the fork server."""
    worker.prepare(os.getppid(), blobs)
