"""What all benches share: flags, rows, the file, the table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.common.harness import Bench, Skip, pick_rows
from bench.common.report import Row, fill, picture
from learner.utils.processes import Stopped


class ToyBench(Bench):
    """A bench of nothing."""

    name = "toy"
    standard = "plot shapes rank only deadline-s server-flags"
    flags = {"--rank": (8, ""), "--paces": ("1,2", ""), "--fast": (False, ""), "--share": (float, "")}  # noqa: RUF012
    quick = "--shapes tiny"
    row_names = ("ours, http", "ours, nccl", "theirs")
    notes = {"theirs": "slow"}  # noqa: RUF012
    figure = "wait_s"
    about = {"rank": "rank", "row": "row"}  # noqa: RUF012
    columns = {"n": "{n}", "wait s": "{wait_s:.4f}", "gap": "{fit[gap]:.1e}", "MiB": "{memory}"}  # noqa: RUF012
    what, told = "rank {rank} {row}", "waits {wait_s:.4f} s"

    def check(self) -> None:
        super().check()
        self.numbers("paces")
        self.at_least(1, "rank", "paces")

    def run(self) -> None:
        for rank in (1, 2):
            about = {"rank": rank, "row": "ours, http"}
            with self.failure_kept(about):
                self.in_time()
                self.add(about, figures(0.5))

    def plot(self, path: Path, done: Sequence[Row]) -> None:
        with picture(path, 4, 3, "toy", loc="outside right upper") as axes:
            axes.plot([row["wait_s"]["median"] for row in done], label="wait")


def figures(seconds: float) -> dict[str, Any]:
    return {"n": 5, "wait_s": {"median": seconds, "min": seconds / 2, "max": seconds * 2}}


def about(row: str = "ours, http", rank: int = 8) -> dict[str, Any]:
    return {"row": row, "rank": rank}


def test_flags_have_the_types_of_their_defaults() -> None:
    options = ToyBench(["--quick", "--fast", "--share", "0.5", "--paces", "2,1", "--only", "theirs"]).options
    assert (options.shapes, options.rank, options.paces, options.fast, options.share) == ("tiny", 8, [1, 2], True, 0.5)
    assert options.only == ["theirs"]
    assert ToyBench([]).options.share is None


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--shapes", "qwen3-5b"], "unknown shape qwen3-5b"),
        (["--shapes", ""], "unknown shape"),
        (["--rank", "1024"], "above 512"),
        (["--rank", "0"], "1 or more"),
        (["--paces", "2,0"], "1 or more"),
        (["--paces", "many"], "many"),
        (["--only", "mine"], "unknown row 'mine'"),
    ],
)
def test_refused(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        ToyBench(flags)
    assert word in capsys.readouterr().err


def test_rows_are_picked_by_their_beginnings() -> None:
    names = ToyBench.row_names
    assert pick_rows(None, names) == list(names)
    assert pick_rows("ours", names) == ["ours, http", "ours, nccl"]
    assert pick_rows("theirs, our", ("ours", "mine", "theirs")) == ["ours", "theirs"]


def test_templates_have_ranges_and_what_is_missing() -> None:
    row = {"wait_s": {"median": 0.5, "min": 0.25, "max": 1.0}, "pace": 2.0, "memory": None, "lags": [0, 1]}
    assert fill("{wait_s:.2f} {wait_s[max]:.1f} {pace} {memory} {fit[gap]:.1e} {lags}", row) == (
        "0.50 (0.25-1.00) 1.0 2 - - [0, 1]"
    )


def test_templates_may_begin_with_a_factor() -> None:
    row = {"wait_s": {"median": 0.5, "min": 0.25, "max": 1.0}}
    assert fill("{wait_s:1e3*.0f} {wait_s[max]:1e3*.1f} {push_s:1e3*.1f}", row) == "500 (250-1000) 1000.0 -"


def test_table_columns_line_up() -> None:
    bench = ToyBench([])
    bench.add(about("ours"), figures(0.01))
    bench.add(about("a peer with a long name"), {**figures(1.5), "fit": {"gap": 0.01}, "memory": 123})
    bench.add(about("third"), {"skipped": "needs two GPUs"})
    bench.add(about("fourth"), {"ok": False, "error": "ValueError: no\nmore of it"})
    lines = bench.table().splitlines()
    assert len(lines) == 2 + 4
    column = lines[0].index("wait s")
    assert lines[2][column:].startswith("0.0100 (0.0050-0.0200)")
    assert lines[3][column:].startswith("1.5000 (0.7500-3.0000)")
    assert lines[2].endswith("  -")
    assert lines[3].endswith("1.0e-02  123")
    assert "skipped: needs two GPUs" in lines[4]
    assert "error: ValueError: no" in lines[5]
    assert "more of it" not in lines[5]


def test_every_row_leaves_a_complete_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out" / "toy.json"
    bench = ToyBench(["--json", str(path)])
    bench.add(about(), figures(0.01))
    bench.add(about("theirs"), {"skipped": "needs two GPUs"})
    document = json.loads(path.read_text())
    assert set(document) == {"headline", "ok", "machine", "rows"}
    assert document["ok"]
    assert document["machine"]["command"] == f"python -m bench.toy --json {path}"
    assert [row["row"] for row in document["rows"]] == ["ours, http", "theirs"]
    assert document["rows"][1]["note"] == "slow"
    bench.add(about("fourth"), {"ok": False, "error": "no"})
    assert json.loads(path.read_text())["ok"] is False
    assert [file.name for file in path.parent.iterdir()] == ["toy.json"]
    said = capsys.readouterr().out
    assert "bench: rank 8 ours, http: waits 0.0100 (0.0050-0.0200) s" in said
    assert "bench: rank 8 theirs: skipped: needs two GPUs" in said
    assert "bench: rank 8 fourth: ERROR no" in said


def test_a_row_measured_again_takes_the_place_of_the_old_one() -> None:
    bench = ToyBench([])
    bench.rows = [{**about(), "ok": True, **figures(5.0)}]
    bench.add(about(), figures(0.01))
    assert [row["wait_s"]["median"] for row in bench.rows] == [0.01]


def test_only_skipped_rows_are_not_ok() -> None:
    bench = ToyBench([])
    bench.add(about(), {"skipped": "needs two GPUs"})
    assert bench.document()["ok"] is False
    assert bench.document()["headline"] == "nothing was measured"


def test_no_picture_is_drawn_where_nothing_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "toy.png"
    bench = ToyBench(["--plot", str(path)])
    bench.add(about(), {"skipped": "needs two GPUs"})
    assert bench.finish() == 1
    assert not path.exists()


def test_a_failure_becomes_the_rows_that_are_missing() -> None:
    bench = ToyBench([])
    bench.rows = [{**about("of an earlier run"), "ok": True, **figures(5.0)}]
    abouts = about("measured"), about("missing"), about("of an earlier run")
    with bench.failure_kept(*abouts):
        bench.add(abouts[0], figures(0.01))
        raise RuntimeError("gone")
    rows = {row["row"]: row for row in bench.rows}
    assert rows["measured"]["wait_s"]["median"] == 0.01
    assert rows["missing"]["error"] == rows["of an earlier run"]["error"] == "RuntimeError: gone"


def test_a_skipped_row_does_not_replace_a_measured_one() -> None:
    bench = ToyBench([])
    bench.rows = [{**about("of an earlier run"), "ok": True, **figures(5.0)}]
    with bench.failure_kept(about("of an earlier run"), about("missing")):
        raise Skip("needs two GPUs")
    assert [row.get("skipped") for row in bench.rows] == [None, "needs two GPUs"]


class FakeServer:
    """Starts, or does not."""

    started, start_s = time.monotonic(), 1.0

    def __init__(self, error: str | None = None) -> None:
        self.error, self.ended = error, False

    def wait_ready(self, timeout_s: float) -> None:
        if self.error:
            raise RuntimeError(self.error)

    def end(self) -> None:
        self.ended = True


def test_servers_that_do_not_start_cost_their_rows_only() -> None:
    bench, started = ToyBench([]), {"a": FakeServer(), "b": FakeServer("unrecognized arguments")}
    starts: Any = {name: lambda server=server: server for name, server in started.items()}
    with bench.servers(starts, lambda name: [about(name)]) as servers:
        assert list(servers) == ["a"]
        assert len(bench.running) == 2
    assert [(row["row"], row["error"]) for row in bench.rows] == [("b", "RuntimeError: unrecognized arguments")]
    assert all(server.ended for server in started.values())
    assert bench.running == []


def test_after_the_deadline_nothing_is_started() -> None:
    bench = ToyBench(["--deadline-s", "-1"])
    with bench.servers({"a": lambda: pytest.fail("started")}, lambda name: [about(name)]) as servers:
        assert servers == {}
    assert bench.rows[0]["skipped"] == "the deadline had passed"


class Target:
    """Takes turns."""

    def __init__(self, name: str) -> None:
        self.name, self.server = name, self

    def tail(self) -> str:
        return "log"


def turns(bench: ToyBench, rounds: int, turn: Callable[[str, int], Any], names: str = "ab") -> list[Any]:
    """The results of each target's row, or why it has none."""
    targets = [Target(name) for name in names]
    try:
        bench.take_turns(
            targets,
            rounds,
            lambda target, number: turn(target.name, number),
            lambda target: about(target.name),
            lambda i, results: {"found": results[i]},
        )
    finally:
        found = [row.get("found", row.get("error", row.get("skipped"))) for row in bench.rows]
    return found


def test_another_target_is_first_in_every_round_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []
    assert turns(ToyBench([]), 3, lambda name, number: (order.append(name), number)[1], "abc") == [[1, 2, 3]] * 3
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]


def test_a_target_that_fails_gets_no_further_turn() -> None:
    asked: list[str] = []

    def turn(name: str, number: int) -> int:
        asked.append(name)
        if (name, number) == ("b", 2):
            raise RuntimeError("gone")
        return number

    assert turns(ToyBench([]), 3, turn) == [[1, 2, 3], "RuntimeError: gone; log"]
    assert asked.count("b") == 3


def test_a_round_counts_completely_and_none_begins_too_late() -> None:
    late, calls = ToyBench([]), 0

    def in_time_once(name: str, number: int) -> int:
        late.deadline = 0.0
        return number

    assert turns(late, 4, in_time_once) == [[1], [1]]
    assert turns(ToyBench(["--deadline-s", "-1"]), 4, lambda name, number: number) == ["the deadline had passed"] * 2

    def stopped(name: str, number: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Stopped("SIGTERM")
        return number

    bench = ToyBench([])
    with pytest.raises(Stopped):
        turns(bench, 4, stopped)
    assert [row["found"] for row in bench.rows] == [[1], [1]]


def test_main_measures_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ToyBench(["--plot", str(tmp_path / "toy.png"), "--work-dir", str(tmp_path / "work")]).main() == 0
    said = capsys.readouterr().out
    assert "rank  row" in said
    assert "rank 1 ours, http: waits" in said.splitlines()[-1]
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "work").is_dir()
    late = ToyBench(["--deadline-s", "-1", "--plot", str(tmp_path / "empty.png")])
    assert late.main() == 1
    assert [row["skipped"] for row in late.rows] == ["the deadline had passed"] * 2


def test_the_key_value_cache_is_sized_on_a_gpu_only() -> None:
    bench = ToyBench(["--server-flags", "--seed 3"])
    flags = bench.setting(288, 1, 1e6, "--load-format", "dummy").engine_flags
    assert flags[:4] == ("--max-model-len", "288", "--max-num-seqs", "2")
    assert flags[-4:] == ("--load-format", "dummy", "--seed", "3")
    assert "--enforce-eager" in flags
    assert "--kv-cache-memory-bytes" not in flags
    bench.device = "cuda:0"
    flags = bench.setting(288, 1, 1e6).engine_flags
    assert flags[flags.index("--kv-cache-memory-bytes") + 1] == "1000000"


class ServersBench(ToyBench):
    """With servers of several GPUs."""

    standard = "shapes only learner-gpu server-gpu server-gpus server-flags deadline-s"


@pytest.mark.parametrize(
    ("flags", "learner", "servers", "shared"),
    [
        ([], "cuda:0", "4", False),
        (["--server-gpus", "2"], "cuda:0", "4,5", False),
        (["--server-gpus", "2", "--server-gpu", "0", "--learner-gpu", "1"], "cuda:1", "3,4", True),
        (["--server-gpus", "3"], "cuda:0", "3,4,5", True),  # there is no third one behind the first
    ],
)
def test_gpus_of_servers(
    flags: list[str], learner: str, servers: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_gpus(monkeypatch)
    bench = ServersBench(flags)
    assert (bench.device, bench.server_device) == (learner, servers)
    assert bench.setting(64, 2, 1e9).same_gpu == shared
    assert bench.machine["devices"] == ["H (learner)", *["H (server)"] * len(servers.split(","))]


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    three_gpus(monkeypatch)
    with pytest.raises(SystemExit, match="2"):
        ServersBench(["--server-gpus", "4"])
    assert "--server-gpus 4: there are 3 GPUs" in capsys.readouterr().err


def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process see the GPUs 3, 4 and 5 of its machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "H")
    monkeypatch.setattr("torch.cuda.set_device", lambda index: None)
