"""Rows of bench.learner, their data and their updates; nothing is trained."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench.common.harness import Skip
from bench.common.models import MAX_POSITION
from bench.learner.__main__ import LearnerBench
from bench.learner.rank import Rollouts
from bench.learner.rows import ALONE, COMPILED, CUT, DDP, FSDP2, PACKED, PRODUCT, TOGETHER, ZERO3, difference


def test_the_long_load_has_all_rows_but_cut_padding() -> None:
    options = LearnerBench(["--load", "long", "--steps", "2", "--ranks", "2"]).options
    assert set(LearnerBench.row_names) - set(options.only) == {CUT}
    assert options.checkpointing
    assert options.micro_batch == 1
    assert options.steps == 2
    assert options.prompt_tokens + options.tokens < MAX_POSITION


def test_rows_of_several_ranks_need_ranks() -> None:
    assert LearnerBench([]).options.only == list(ALONE)
    bench = LearnerBench(["--ranks", "2"])
    assert bench.options.only == [*ALONE, *TOGETHER]
    assert [bench.ranks(row) for row in (PACKED, DDP)] == [1, 2]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--only", DDP], "need --ranks 2 or more"),
        (["--ranks", "3"], "DDP: a rank's share"),
        (["--ranks", "2", "--sharded-micro-batch", "48"], "FSDP2: a rank's share"),
        (["--ranks", "0"], "--ranks must be 1 or more"),
    ],
)
def test_refused(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        LearnerBench(flags)
    assert word in capsys.readouterr().err


def test_ranks_have_their_shares_of_the_same_batch() -> None:
    training = Namespace(
        vocab=100,
        tokens=20,
        mean_tokens=8,
        batch=8,
        group=4,
        prompt_tokens=3,
        warm_up=1,
        steps=1,
    )
    alone, two = Rollouts(training, 0), [Rollouts(training, rank) for rank in range(2)]
    batches = []
    for _ in range(2):
        whole = alone.generate([[1, 2, 3]] * 8, None, 4)[1]
        assert whole == [row for rank in two for row in rank.generate([[1, 2, 3]] * 4, None, 4)[1]]
        batches.append(whole)
    assert batches[0] != batches[1]
    assert alone.tokens == [sum(shares) for shares in zip(*(rank.tokens for rank in two), strict=True)]
    assert alone.prompts() == two[1].prompts()


def test_the_difference_of_updates() -> None:
    expected = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert difference(expected, expected) == {"difference": 0.0, "slope": 1.0}
    halved = {name: tensor / 2 for name, tensor in expected.items()}
    assert difference(halved, expected) == pytest.approx({"difference": 0.5, "slope": 0.5})
    across = {"a": torch.tensor([3.0, 5.0]), "b": torch.tensor([[4.0]])}
    assert difference(across, expected) == pytest.approx({"difference": 1.0, "slope": 1.0})
    with pytest.raises(ValueError, match="different matrices"):
        difference({"a": expected["a"]}, expected)
    with pytest.raises(ValueError, match="nothing was updated"):
        difference(expected, {name: torch.zeros_like(tensor) for name, tensor in expected.items()})


def answer(step_s: float, ranks: int) -> dict[str, Any]:
    memory = [{"allocated_gib": 10.0 + rank, "reserved_gib": 20.0} for rank in range(ranks)]
    steps = [[9.0, 1.0], [8.0, 1.0], *([step_s, 1.0] for _ in range(3))]
    about = {"weights": 10, "scores_apart": True, "peak_flops": 1e6, "model": "M", "fsdp_units": 0}
    return {"steps": steps, "tokens": [100] * 5, "memory": memory, **about}


def test_a_row_is_compared_with_the_one_most_like_it(tmp_path: Path) -> None:
    bench = LearnerBench(["--ranks", "2"])
    files: dict[str, Path] = {}
    for row, step_s, moved in ((PACKED, 4.0, 1.0), (PRODUCT, 3.0, 1.0), (COMPILED, 2.0, 1.0), (DDP, 1.0, 1.1)):
        files[row] = tmp_path / row
        save_file({"b": torch.tensor([moved])}, files[row])
        answered = answer(step_s, bench.ranks(row))
        figures = bench.figures(row, answered) | bench.beside(row, answered, files)
        bench.add(bench.about_row(row, ranks=bench.ranks(row)), figures)
    rows = {row["row"]: row for row in bench.rows}
    assert "beside" not in rows[PACKED]
    assert rows[DDP]["beside"] == pytest.approx({"row": COMPILED, "speed_up": 2.0, "difference": 0.1, "slope": 1.1})
    assert rows[DDP]["allocated_gib"] == 11.0
    assert [rank["allocated_gib"] for rank in rows[DDP]["memory_of_ranks"]] == [10.0, 11.0]
    assert rows[DDP]["n"] == 3
    assert rows[DDP]["tokens_per_s"] == 100.0
    ddp = bench.table().splitlines()[-1].split()
    assert ddp[-3:] == ["compiled", "2.00", "10.00%"]


def test_what_cannot_be_measured_here_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = LearnerBench(["--ranks", "4", "--sharded-micro-batch", "8"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for row, word in ((COMPILED, "for GPUs only"), (ZERO3, r"lockstep-rl\[zero3\]")):
        with pytest.raises(Skip, match=word):
            bench.check_place(row)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(Skip, match="4 ranks need as many GPUs; there are 2"):
        bench.check_place(FSDP2)


def test_ranks_find_the_variables_of_torchrun() -> None:
    bench = LearnerBench(["--ranks", "2"])
    assert "RANK" not in bench.environment_of(0, 1, 29500)
    second = bench.environment_of(1, 2, 29500)
    assert (second["RANK"], second["LOCAL_RANK"], second["WORLD_SIZE"], second["MASTER_PORT"]) == (
        "1",
        "1",
        "2",
        "29500",
    )


def test_a_rank_that_fails_is_the_rows_error(tmp_path: Path) -> None:
    bench = LearnerBench(["--ranks", "2", *LearnerBench.quick.split()])
    bench.work = bench.scratch = tmp_path
    with pytest.raises(RuntimeError, match=r"(?s)rank \d ended with status 1; log .*missing-model"):
        bench.train(DDP, tmp_path / "missing-model")
