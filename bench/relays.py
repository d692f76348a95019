"""A push to many servers: directly, and through relays on the nodes of a Ray cluster, on this machine.

python -m bench.relays --quick                                  # 3 and 8 simulated servers, a tiny adapter
python -m bench.relays --json relays.json                       # 1 to 50, an adapter of 10 MB, some minutes

The servers are simulated (`bench.fleet.simulated`) and verify the checksum of what comes. Of the learner's process and
of all processes together (servers, raylets, relays) a row has the processor time of a push; of the learner also the
bytes: those that it has sent over TCP, and those that it has put into its node's object store.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import psutil

from bench.common.harness import Bench
from bench.common.models import Policy, optimizer_step
from bench.common.report import Row
from bench.contenders.lockstep import LockstepPool
from bench.fleet.cluster import NAME, cluster_of
from bench.fleet.sockets import bytes_sent
from bench.scale import simulated, used
from learner.cluster.relay import Relays

DIRECT, RELAYED = "direct", "relayed"


class RelaysBench(Bench):
    """Pushes, a row for every number of servers and way."""

    name = "relays"
    flags = {
        "--servers": ("1,2,4,8,16,50", "numbers of servers, comma-separated"),
        "--nodes": (3, "of the Ray cluster; servers are spread over them"),
        "--shape": ("smollm2-135m", ""),
        "--rank": (16, "of the adapter: with that shape 10 MB, as Qwen3-0.6B at rank 8"),
        "--pushes": (5, "of each row, after one that is not counted"),
    }
    quick = "--servers 3,8 --nodes 2 --shape tiny --pushes 2"
    same = "rank", "nodes"
    figure = "learner_s"
    about = {"servers": "servers", "way": "row"}
    columns = {
        "wall s": "{wall_s:.3f}",
        "learner, ms": "{learner_s:1e3*.1f}",
        "all processes, ms": "{all_s:1e3*.0f}",
        "sent, MB": "{sent_bytes:1e-6*.2f}",
        "stored, MB": "{stored_bytes:1e-6*.2f}",
    }
    what = "{servers} servers, {row}"
    told = "{learner_s:1e3*.1f} ms of the learner's processor time, {sent_bytes:1e-6*.2f} MB sent, {wall_s:.3f} s"

    def check(self) -> None:
        super().check()
        self.numbers("servers")
        self.at_least(1, "servers", "nodes", "pushes")

    def run(self) -> None:
        options = self.options
        folder = self.shape.write(self.scratch / self.shape.name, self.dtype)
        with (
            Policy(folder, self.device, self.dtype).adapter(options.rank, "float32") as self.model,
            simulated(max(options.servers)) as urls,
            cluster_of(options.nodes, urls),
        ):
            for count in options.servers:
                listed = self.work / f"servers-{count}.txt"
                listed.write_text("".join(f"{url}\n" for url in urls[:count]))
                for way in (DIRECT, RELAYED):
                    about = self.about_row(way, servers=count)
                    with self.failure_kept(about):
                        self.add(about, self.pushes(f"file:{listed}", Relays(NAME) if way == RELAYED else None))

    def pushes(self, place: str, relays: Relays | None) -> dict[str, Any]:
        """Return the figures of pushes to the servers at a place."""
        options, size = self.options, 0
        learner, everyone, walls, sent = [], [], [], []
        with contextlib.closing(LockstepPool(place, self.model, self.work / "servers.jsonl", relays=relays)) as pool:
            for step in range(1, options.pushes + 2):
                optimizer_step(self.model)
                exported, before = pool.export_s, bytes_sent()
                everyone_before, started = processor_s(), time.monotonic()
                taken = used(partial(pool.push, step))
                walls.append(time.monotonic() - started)
                exported = pool.export_s - exported
                learner.append(taken - exported)
                everyone.append(processor_s() - everyone_before - exported)
                sent.append(bytes_sent() - before)
                size = pool.pushed_bytes()
        return {
            "bytes": size,
            "wall_s": statistics.median(walls[1:]),
            "learner_s": statistics.median(learner[1:]),
            "all_s": statistics.median(everyone[1:]),
            "sent_bytes": statistics.median(sent[1:]),
            "stored_bytes": size if relays else 0,
        }

    def headline(self, done: Sequence[Row]) -> str:
        rows = {(row["servers"], row["row"]): row for row in done}
        most = max(row["servers"] for row in done)
        if not all((most, way) in rows for way in (DIRECT, RELAYED)):
            return super().headline(done)
        direct, relayed = rows[most, DIRECT], rows[most, RELAYED]
        moved = relayed["sent_bytes"] + relayed["stored_bytes"]
        return (
            f"on {self.where}: a push to {most} servers through relays takes {moved / direct['sent_bytes']:.1%} of the "
            f"learner's bytes and {relayed['learner_s'] / direct['learner_s']:.1%} of its processor time of direct ones"
        )


def processor_s() -> float:
    """Return the processor time of this process and all below it that live."""
    total = 0.0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


if __name__ == "__main__":
    sys.exit(RelaysBench().main())
