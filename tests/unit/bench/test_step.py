"""What bench.step makes of the steps of trainings; nothing is started."""

from __future__ import annotations

import json
import random
import statistics
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from bench.common.models import SHAPES
from bench.step.__main__ import StepBench
from bench.step.figures import (
    ASYNCHRONOUS,
    TRL,
    Step,
    asynchronous,
    figures,
    ours,
    reached,
    stop_ids,
    together,
)
from bench.step.learner import AsynchronousWatch, TrlWatch, counted, max_steps

ABOUT = {"shape": "tiny", "rank": 8, "batch": 16, "tokens": 64, "ok": True}
ALTERNATING = [Step(10.0, 4.0, 1.0, 6.0, 100), Step(14.0, 6.0, 1.0, 8.0, 300), Step(12.0, 5.0, 1.0, 7.0, 200)]
AHEAD = [Step(8.0, 1.0, 0.5, 2.0, 200)] * 3
MERGED = [Step(16.0, 5.0, 3.0, 11.0, 200)] * 3
UNKNOWN = [Step(12.0, 1.0, 0.5, None, 200)] * 3


def row(name: str, steps: list[Step], **more: Any) -> dict[str, Any]:
    return {"row": name, **ABOUT, **(figures(steps) if steps else {}), **more}


ROWS = [row(ours(0), ALTERNATING), row(ours(1), AHEAD), row(TRL, MERGED)]


def test_a_step_is_waiting_bringing_weights_and_training() -> None:
    made = figures(ALTERNATING)
    assert made["n"] == 3
    assert made["step_s"] == {"median": 12.0, "min": 10.0, "max": 14.0, "mean": 12.0}
    assert made["train_s"] == {"median": 6.0, "min": 5.0, "max": 7.0, "mean": 6.0}
    assert made["tokens_per_step"] == 200
    assert made["tokens_per_s"] == 600 / 36
    # Nothing is generated ahead: the server works exactly while the trainer waits.
    assert made["server_bubble"] == 21 / 36
    assert made["learner_bubble"] == 15 / 36
    assert made["server_tokens_per_s"] == 600 / 15
    assert made["learner_tokens_per_s"] == 600 / 18
    # Ahead: the server says itself for how long nothing was asked of it.
    ahead = figures(AHEAD)
    assert ahead["server_bubble"] == 2 / 8
    assert ahead["server_tokens_per_s"] == 200 / 6
    # A server that nothing is known of has no figures, rather than wrong ones.
    assert not {"idle_s", "server_bubble", "server_tokens_per_s"} & set(figures(UNKNOWN))
    assert figures(UNKNOWN)["learner_bubble"] == 1 / 12


def test_ratios() -> None:
    shown = together(ROWS)
    assert shown == {
        "generation_alone_s": 5.0,
        "training_alone_s": 6.0,
        "of_larger": 8 / 6,
        "of_s0": 8 / 12,
        "trl_of_s1": 2.0,
    }
    assert together([row(TRL, MERGED), row(ours(2), AHEAD)]) == {"trl_of_s2": 2.0}
    beside = [row(ours(1), AHEAD), row(ours(2), AHEAD), row(asynchronous(2), UNKNOWN)]
    assert together(beside)["asynchronous_of_s2"] == 12 / 8
    assert "asynchronous_of_s2" not in together([row(ours(2), AHEAD), row(asynchronous(1), UNKNOWN)])  # another bound
    assert "trl_of_s1" not in together([*ROWS[:2], row(TRL, [], skipped="needs two GPUs")])


@pytest.mark.parametrize(("of_larger", "trl_of_s1", "met"), [(1.1, 1.6, True), (1.11, 9.0, False), (0.9, 1.59, False)])
def test_targets(of_larger: float, trl_of_s1: float, met: bool) -> None:
    assert reached({"of_larger": of_larger, "trl_of_s1": trl_of_s1}) is met
    assert reached({"of_larger": of_larger}) is None


def test_rows_become_a_file_a_table_and_a_picture(tmp_path: Path) -> None:
    bench = StepBench(["--json", str(tmp_path / "step.json")])
    bench.machine = {"devices": ["H", "H"]}
    for each in [*ROWS[:2], row(TRL, [], skipped="needs two GPUs")]:
        bench.add(each, {})
    document = json.loads((tmp_path / "step.json").read_text())
    assert document["ok"]
    assert document["reached"] is None
    assert len(document["rows"]) == 3
    assert document["headline"].startswith("tiny, LoRA rank 8, 16 completions of up to 64 tokens a step, on H: ")
    assert "S = 1 takes 1.33 times the larger of generation alone (5.00 s) and training" in document["headline"]
    lines = bench.table().splitlines()
    assert len(lines) == 2 + 3
    assert "needs two GPUs" in lines[4]
    assert lines[2].split()[-3:] == ["58%", "-", "-"]
    bench.add(row(ours(2), [], ok=False, error="RuntimeError: no\nmore"), {})
    assert bench.document()["ok"] is False
    assert "more" not in bench.table()
    bench.plot(tmp_path / "step.png", bench.measured())
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    bench.plot(tmp_path / "empty.png", [])


def test_nothing_measured_is_not_ok() -> None:
    bench = StepBench([])
    bench.add(row(TRL, [], skipped="needs two GPUs"), {})
    assert bench.document()["ok"] is False


def test_lengths_spread() -> None:
    vocab, mean = SHAPES["qwen3-4b"].vocab, 200
    ends = set(stop_ids(vocab, mean))
    assert not ends & {0, 1, 2}
    rng = random.Random(0)
    lengths = [next(n for n in range(1, 10**6) if rng.randrange(vocab) in ends) for _ in range(2000)]
    assert 0.9 * mean < statistics.fmean(lengths) < 1.1 * mean
    assert 0.9 * mean < statistics.stdev(lengths) < 1.1 * mean  # geometric: as wide as its mean


def test_steps_that_generate_nothing_ahead_are_not_counted() -> None:
    training = Namespace(max_staleness=2, asynchronous=False, steps=5, warm_up=3, profile=None)
    steps = [Step(float(i), 0.0, 0.0, 0.0, 0) for i in range(max_steps(training))]
    assert [one.seconds for one in counted(training, steps)] == [3.0, 4.0, 5.0, 6.0, 7.0]
    assert max_steps(training) == 10
    training.asynchronous = True  # TRL's asynchronous trainer generates to the end
    assert max_steps(training) == 8


def test_trl_is_timed_by_what_its_trainer_calls() -> None:
    class Generation:
        def generate(self, prompts: list[list[int]], images: None) -> tuple[list[list[int]], list[list[int]]]:
            time.sleep(0.05)
            return prompts, [[1, 2], [3]]

        def sync_weights(self) -> None:
            time.sleep(0.02)

        def _iter_named_params(self) -> None: ...

    generation = Generation()
    watch = TrlWatch(generation)
    watch.on_train_begin(None, None, None)
    for _ in range(6):
        generation.sync_weights()
        assert generation.generate([[0]], images=None) == ([[0]], [[1, 2], [3]])
        time.sleep(0.03)
        watch.on_step_end(None, None, None)
    assert len(watch.steps) == 6
    for one in watch.steps:
        assert one.tokens == 3
        assert one.idle == one.seconds - one.wait
        assert one.wait >= 0.05
        assert one.sync >= 0.02
        assert one.train >= 0.03
    # A busy machine may spoil most of them.
    assert min(one.wait for one in watch.steps) < 0.1
    assert min(one.sync for one in watch.steps) < 0.05
    assert min(one.train for one in watch.steps) < 0.1


def test_the_asynchronous_trainer_is_timed_by_what_it_logs() -> None:
    logged = {"perf/rollout_wait_s": 0.25, "perf/weight_sync_s": 0.125, "batch/trained_tokens_per_step": 300.0}
    logged |= {"batch/samples_per_step": 15.999999, "sample/staleness_max": 1.0, "sample/dropped_stale_total": 2.0}
    watch = AsynchronousWatch()
    watch.on_train_begin(None, None, None)
    for lag in (1.0, 2.0):
        watch.on_step_end(None, None, None)
        watch.on_log(None, None, None, logs=logged | {"sample/staleness_max": lag})
    watch.on_log(None, None, None, logs={"train_runtime": 3.0})  # at the end of the training
    assert [(one.wait, one.sync, one.idle, one.tokens) for one in watch.steps] == [(0.25, 0.125, None, 300)] * 2
    assert all(one.seconds >= 0.0 for one in watch.steps)
    assert watch.completions == 32
    assert watch.dropped == 4
    assert watch.lag == 2


def test_a_load_is_what_further_flags_change() -> None:
    bench = StepBench(["--load", "long", "--batch", "32"])
    options = bench.options
    assert (options.prompt_tokens, options.tokens, options.batch) == (512, 4096, 32)
    assert options.staleness == [2]
    assert options.only == ["lockstep", ASYNCHRONOUS]
    assert bench.sized().engine_flags[1] == str(512 + 4096 + 16)


def test_servers_that_do_not_fit_beside_each_other_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Namespace(total_memory=80 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: gpu)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    short, long = StepBench(["--batch", "128"]), StepBench(["--load", "long"])
    short.device = long.device = "cuda:0"
    assert short.side_by_side() == 2
    assert long.side_by_side() == 1


def test_the_server_has_room_for_the_batch_that_is_generated_ahead() -> None:
    sizes = "--prompt-tokens 64 --tokens 512 --mean-tokens 200 --batch 256"
    bench = StepBench(["--shape", "qwen3-4b", *sizes.split()])
    bench.device = "cuda:0"
    flags = bench.sized().engine_flags
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert given["--max-num-seqs"] == "512"
    assert given["--max-model-len"] == "592"
    assert int(given["--kv-cache-memory-bytes"]) > 512 * (64 + 200) * 147_456


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--staleness", "-1"], "0 or more"),
        (["--batch", "20", "--micro-batch", "8"], "whole micro-batches"),
        (["--group", "1"], "at least 2"),
        (["--steps", "0"], "1 or more"),
        (["--batch", "96", "--packed-micro-batch", "64"], "whole micro-batches"),
        (["--load", "longest"], "there are long"),
        (["--only", "Lockstep"], "there are lockstep; TRL server mode"),
    ],
)
def test_refused(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        StepBench(flags)
    assert word in capsys.readouterr().err
