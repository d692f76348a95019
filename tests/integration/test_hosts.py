"""An engine over two hosts without Ray (`--nnodes 2`): what ends it, and what it does not begin with.

That pushes reach both workers, and that the other host ends with the head, is seen in `test_parallel`, on the layout
`nnodes`.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil

from shared.bearer_tokens import TOKEN_VARIABLE
from tests.integration.conftest import FLAGS
from tests.integration.support.on_hosts import OTHER, TOKEN, ServerOnHosts, running_on_hosts


def _shared_memory(processes: list[psutil.Process]) -> set[str]:
    """Return the names of shared memory that one of these processes has mapped."""
    mapped = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in processes)
    return {name for name in os.listdir("/dev/shm") if f"/dev/shm/{name}" in mapped}


def test_a_host_with_other_flags_ends_the_start(model: Path, tmp_path: Path) -> None:
    server = ServerOnHosts(model, tmp_path, *FLAGS, others=(*FLAGS, "--max-num-seqs", "32", "--apply", "merge"))
    try:
        assert server.wait_started() == 1
        assert server.follower.wait(30.0) == 1
        for log in (server.log, server.follower_log):
            last = log.read_text().splitlines()[-1]
            assert f"host 1 of the engine ({OTHER}, worker 1) differs from the head in " in last
            assert "--apply (merge; adapter on the head), " in last
            assert "--max-num-seqs (32; 64 on the head): give all hosts the same flags" in last
    finally:
        server.stop()


def test_a_host_that_is_lost_ends_the_head_with_a_reason(model: Path, tmp_path: Path) -> None:
    with running_on_hosts(model, tmp_path, *FLAGS) as server:
        head, other = server.processes_of_hosts()
        assert [server.worker(rank) in host for rank, host in enumerate((head, other))] == [True, True]
        assert all(TOKEN not in str(process.cmdline()) for process in head + other)
        assert all(TOKEN not in log.read_text() for log in (server.log, server.follower_log))
        # Its own token is in the environment that a process began with, and its workers did not get it.
        assert all(TOKEN_VARIABLE not in server.worker(rank).environ() for rank in (0, 1))
        shared_memory = _shared_memory(head + other)
        assert shared_memory
        os.kill(server.follower.pid, signal.SIGKILL)
        assert server.process.wait(60.0) == 1
        assert psutil.wait_procs(head + other, timeout=60.0)[1] == []
        # Its connection and that of its worker end at about the same time.
        lost = rf"(host 1 of the engine \({OTHER}, worker 1\)|worker 1 of the engine \({OTHER}:\d+\)) has ended"
        assert re.search(f"the engine died: .*{lost}", server.log.read_text())
        assert not shared_memory & set(os.listdir("/dev/shm"))
