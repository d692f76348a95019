"""What the learner is said to have sent, and how relays compare."""

from __future__ import annotations

import socket

from bench.fleet.sockets import bytes_sent
from bench.relays import DIRECT, RELAYED, RelaysBench


def test_the_kernel_counts_what_open_connections_have_sent():
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as client,
        listening.accept()[0] as accepted,
    ):
        before = bytes_sent()
        client.sendall(b"x" * 1000)
        accepted.recv(1000, socket.MSG_WAITALL)
        assert bytes_sent() - before == 1000


def test_the_headline_compares_the_most_servers_stored_bytes_included():
    bench = RelaysBench(["--quick"])
    for servers, way, sent, stored, seconds in (
        (3, DIRECT, 30e6, 0, 0.3),
        (50, DIRECT, 500e6, 0, 0.5),
        (50, RELAYED, 5e6, 10e6, 0.05),
    ):
        figures = {"sent_bytes": sent, "stored_bytes": stored, "learner_s": seconds, "all_s": 1.0, "wall_s": 1.0}
        bench.add({"row": way, "servers": servers}, figures)
    assert (
        "50 servers through relays takes 3.0% of the learner's bytes and 10.0% of its" in bench.document()["headline"]
    )
