"""Which tokens belong to which servers."""

from __future__ import annotations

from bench.fleet.report import FleetReport, stretches


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


def test_the_headline_says_the_least():
    report = FleetReport(None, {"devices": ["a machine"]})
    report.take(RECORDS, {"A": 10.0, "B": 20.0})
    assert "least 86.7%" in report.document()["headline"]
    assert report.document()["ok"]
