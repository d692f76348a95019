"""What bench.sync pushes and writes down; nothing is started."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from bench.contenders import Moved, SyncPath
from bench.sync import __main__ as sync
from bench.sync.__main__ import SyncBench


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--ranks", "1024"], "rank 1024 is above 512"),
        (["--only", "theirs"], "unknown row 'theirs'"),
        (["--parallel-start"], "--share-server"),
        (["--adapter-dtype", "float16"], "float32 or bfloat16"),
    ],
)
def test_refused(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        SyncBench(flags)
    assert word in capsys.readouterr().err


def test_servers_and_their_rows() -> None:
    bench = SyncBench(["--shapes", "tiny", "--ranks", "8,32", "--only", "lockstep http,merged"])
    plans = list(bench.plans(bench.shapes[0]))
    assert [(plan.max_rank, plan.ranks, plan.rows) for plan in plans] == [
        (8, [8], ["lockstep http"]),
        (32, [32], ["lockstep http"]),
        (32, [8, 32], ["merged weights (TRL)"]),
    ]
    bench.options.share_server = True
    assert [plan.ranks for plan in bench.plans(bench.shapes[0])] == [[8, 32], [8, 32]]


def row(name: str, seconds: float, rank: int = 8, **more: Any) -> dict[str, Any]:
    spread = {"median": seconds, "min": seconds / 2, "max": seconds * 2}
    figures = {"bytes": 1_000_000, "n": 5, "push_s": spread, "first_token_s": spread}
    about = {"shape": "tiny", "rank": rank, "row": name, "parameters": 1, "ok": True}
    return {**about, **figures, "parts_median_s": {"install": 0.001}, **more}


def test_headline_takes_the_group_with_most_rows_and_orders_by_time() -> None:
    bench = SyncBench([])
    bench.machine = {"devices": ["H", "H"]}
    text = bench.headline([row("peer", 1.5), row("ours", 0.01), row("ours", 0.02, rank=32)])
    assert "tiny, LoRA rank 8, on H:" in text
    assert text.index("ours 0.0100") < text.index("peer 1.5000")


def test_table_and_picture(tmp_path: Path) -> None:
    bench = SyncBench([])
    served = {"workers": 2, "fidelity": {"mean_abs_gap": 0.003}}
    bench.rows = [
        row("ours", 0.01, **served),
        row("peer", 1.5, under_load={"share": 0.9, "share_error": 0.05, "tokens_per_s_quiet": 900.0}),
    ]
    lines = bench.table().splitlines()
    assert lines[2].split()[2:] == [
        *(
            "ours",
            "1.0",
            "5",
            "0.0100",
            "(0.0050-0.0200)",
            "0.0100",
            "(0.0050-0.0200)",
            "2",
            "3.00e-03",
            "install",
            "1.0",
        )
    ]
    assert lines[3].endswith("install 1.0 | decode 90.0% (5.0%) of 900 tok/s")
    bench.plot(tmp_path / "sync.png", bench.rows)
    assert (tmp_path / "sync.png").read_bytes().startswith(b"\x89PNG")
    bench.plot(tmp_path / "empty.png", [])


def test_a_row_that_hangs_ends_its_server() -> None:
    bench, ended = SyncBench(["--row-limit-s", "0.05"]), threading.Event()

    class Server:
        def end(self) -> None:
            ended.set()

    with bench.watched(Server(), {}):  # type: ignore[arg-type]
        assert ended.wait(10)
    assert bench.rows == []


class FakePath(SyncPath):
    """Answers with the number of pushes, or always the same."""

    def __init__(self, deaf: bool = False) -> None:
        self.deaf, self.pushes, self.settled = deaf, 0, 0

    def push(self, step: int) -> Moved:
        self.pushes += 1
        assert step == self.pushes
        return Moved(10, {"install": 0.5})

    def first_token(self, prompt: list[int]) -> tuple[int, float]:
        return (0 if self.deaf else self.pushes), -1.0

    def settle(self) -> None:
        self.settled += 1


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sync, "optimizer_step", lambda model: None)
    return None


def test_a_row_counts_what_comes_after_the_warm_up(no_model: Any) -> None:
    path = FakePath()
    figures = sync.measure(path, no_model, 4, vocab=100)
    assert path.pushes == path.settled == sync.WARM_UP + 4
    assert figures["n"] == 4
    assert figures["bytes"] == 10
    assert figures["parts_median_s"] == {"install": 0.5}
    assert figures["push_s"]["median"] <= figures["first_token_s"]["median"]


def test_pushes_without_effect_are_an_error(no_model: Any) -> None:
    with pytest.raises(RuntimeError, match="no effect"):
        sync.measure(FakePath(deaf=True), no_model, 4, vocab=100)


def test_prompts_are_fresh() -> None:
    prompts = sync.fresh_prompts(1000)
    assert len({tuple(next(prompts)) for _ in range(50)}) == 50
