"""Which tokens belong to which servers."""

from __future__ import annotations

from pathlib import Path

from bench.fleet.__main__ import FleetBench, stretches


def tokens(server: str, seconds: range, count: int) -> list[dict]:
    return [{"time": second, "server": server, "tokens": count} for second in seconds]


RECORDS = [
    {"time": 0.5, "server": "A", "event": "serves"},
    *tokens("A", range(1, 60), 10),
    {"time": 20.5, "server": "B", "event": "serves"},
    *tokens("B", range(25, 40), 16),
    {"time": 40.5, "server": "B", "event": "lost: gone"},
]


def test_stretches_lie_between_events_and_count_who_was_up():
    rows = stretches(RECORDS, {"A": 10.0, "B": 20.0})
    assert [(row["row"], row["tokens_per_s"], row["expected"]) for row in rows] == [
        ("A", 10.0, 10.0),
        ("A+B", 26.0, 30.0),
        ("A", 10.0, 10.0),
    ]


def test_the_headline_says_the_least(tmp_path: Path):
    bench = FleetBench(["--quick"])
    for row in stretches(RECORDS, {"A": 10.0, "B": 20.0}):
        bench.add(row, {})
    assert "least 86.7%" in bench.document()["headline"]
    assert bench.document()["ok"]
    assert len(bench.table().splitlines()) == 2 + 3
    bench.machine |= {"records": RECORDS, "alone_tokens_per_s": {"A": 10.0, "B": 20.0}}
    bench.plot(tmp_path / "fleet.png", bench.rows)
    assert (tmp_path / "fleet.png").read_bytes().startswith(b"\x89PNG")
