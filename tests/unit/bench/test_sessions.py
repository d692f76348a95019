"""What bench.sessions computes and writes down; nothing is started."""

from __future__ import annotations

import pytest

from bench.sessions import PLAIN, SESSION, SessionsBench, WaveFigures, figures


def test_ratios_are_of_the_plain_calls_of_the_same_round() -> None:
    plain = [WaveFigures(10.0, 0.02, [0.1]), WaveFigures(5.0, 0.02, [0.2])]
    own = [WaveFigures(9.0, 0.03, [0.1, 0.3]), WaveFigures(5.0, 0.02, [0.2])]
    found = figures(1, [plain, own])
    assert found["n"] == 2
    assert found["ratio"]["median"] == pytest.approx(0.95)
    assert found["processor_ratio"]["median"] == pytest.approx(1.25)
    assert figures(0, [plain, own])["ratio"]["median"] == 1.0


def test_rows_become_a_table_and_a_sentence() -> None:
    bench = SessionsBench(["--quick"])
    bench.machine = {"devices": ["H"]}
    waves = [[WaveFigures(10.0, 0.02, [0.1])], [WaveFigures(9.0, 0.03, [0.1])]]
    for i, row in enumerate((PLAIN, SESSION)):
        bench.add({"row": row, "concurrency": 12, "shape": "tiny"}, figures(i, waves))
    assert bench.document()["headline"].endswith("of that without: 90.0% at 12")
    assert len(bench.table().splitlines()) == 4


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        SessionsBench(["--calls", "0"])
    assert "1 or more" in capsys.readouterr().err
