"""Real worker processes: scoring, time limits, deaths, and no process left behind when the learner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from learner.rewards.calls import RewardCall, RewardResult
from learner.rewards.pool import RewardPool
from shared.errors import LockstepError
from tests.integration.support.waiting import until

LIMIT_S = 0.4


def lengths(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, scale, **_):
    log_metric("step", trainer_state.global_step)
    log_extra("first", [completion[:1] for completion in completions])
    return [None if c == "" else len(c) * s for c, s in zip(completions, scale, strict=True)]


async def in_a_coroutine(completions, **_):
    return [1] * len(completions)


def misbehaving(completions, **_):
    for completion in completions:
        if completion == "hangs":
            time.sleep(600)
        if completion == "dies":
            os._exit(3)
        if completion == "raises":
            raise KeyError("the user's own")
    return [float(len(completion)) for completion in completions]


def heavy_modules(completions, **_):
    return [float(sum(name in sys.modules for name in ("torch", "trl", "transformers")))] * len(completions)


def closure():
    bonus = {"": 0.5}
    return lambda completions, **_: [len(c) + bonus[""] for c in completions]


def holds_a_lock():
    lock = threading.Lock()
    return lambda completions, **_: [1.0 + lock.locked()] * len(completions)


FUNCTIONS = {
    "lengths": lengths,
    "in_a_coroutine": in_a_coroutine,
    "misbehaving": misbehaving,
    "heavy_modules": heavy_modules,
    "closure": closure(),
}


def group(*completions: str) -> RewardCall:
    rows = {
        "prompts": ["p"] * len(completions),
        "completions": list(completions),
        "completion_ids": [[1, 2]] * len(completions),
        "scale": [2.0] * len(completions),
    }
    return RewardCall(rows, SimpleNamespace(global_step=7))


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    pool = RewardPool(dict(enumerate(FUNCTIONS.items())), workers=2, timeout_s=LIMIT_S)
    yield pool
    pool.close()


def scored(pool: RewardPool, name: str, *completions: str) -> list[tuple[int, RewardResult | None]]:
    return pool.wait(pool.submit(list(FUNCTIONS).index(name), group(*completions)))


def test_a_group_is_one_call_with_all_that_trl_passes(pool: RewardPool) -> None:
    [(rows, result)] = scored(pool, "lengths", "a", "", "ccc")
    assert rows == 3
    assert result.rewards == [2.0, None, 6.0]
    assert result.metrics == [("step", 7.0)]
    assert result.extras == [("first", ["a", "", "c"])]


@pytest.mark.parametrize(("name", "expected"), [("in_a_coroutine", [1.0] * 2), ("closure", [1.5, 2.5])])
def test_other_kinds_of_functions(pool: RewardPool, name: str, expected: list[float]) -> None:
    [(_, result)] = scored(pool, name, "a", "bb")
    assert result.rewards == expected


def test_workers_are_light(pool: RewardPool) -> None:
    [(_, result)] = scored(pool, "heavy_modules", "a")
    assert result.rewards == [0.0]


@pytest.mark.parametrize("bad", ["hangs", "dies"])
def test_one_bad_sample_costs_the_others_nothing(pool: RewardPool, bad: str) -> None:
    parts = scored(pool, "misbehaving", "a", bad, "ccc", "dddd")
    assert [result and result.rewards for _, result in parts] == [[1.0], None, [3.0], [4.0]]
    assert scored(pool, "misbehaving", bad) == [(1, None)]


def test_an_exception_comes_with_its_traceback(pool: RewardPool) -> None:
    [(_, result)] = scored(pool, "misbehaving", "a", "raises")
    assert "the user's own" in result.error
    assert "in misbehaving" in result.error


def test_an_idle_worker_that_is_killed_is_replaced(pool: RewardPool) -> None:
    workers = [child for child in psutil.Process().children() if "popen_loky" in " ".join(child.cmdline())]
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
    outcomes = [pool.submit(0, group("a")) for _ in range(20)]
    assert all(pool.wait(outcome)[0][1].rewards == [2.0] for outcome in outcomes)


@pytest.mark.parametrize("reason", ["cannot be pickled", "AssertionError"])
def test_functions_that_no_worker_can_run_are_left_out(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    only_here = f"import os\nassert os.getpid() == {os.getpid()}\ndef one(completions, **_):\n    return [1.0]\n"
    (tmp_path / "only_here.py").write_text(only_here)
    monkeypatch.syspath_prepend(str(tmp_path))
    from only_here import one  # type: ignore[import-not-found]

    function = one if reason == "AssertionError" else holds_a_lock()
    pool = RewardPool({2: ("lengths", lengths), 5: ("one", function)}, workers=1, timeout_s=5.0)
    assert pool.names == {2: "lengths"}
    [warning] = caplog.messages
    assert "the reward one runs on the training thread" in warning
    assert reason in warning
    assert "Define it at the top level of a module" in warning
    assert pool.wait(pool.submit(2, group("a")))[0][1].rewards == [2.0]
    pool.close()


def test_arguments_that_cannot_be_pickled(pool: RewardPool) -> None:
    call = RewardCall({**group("a").rows, "locks": [threading.Lock()]}, None)
    with pytest.raises(LockstepError, match=r"arguments of the reward lengths cannot be sent .*reward_workers=0"):
        pool.wait(pool.submit(0, call))


SCRIPT = """
import sys, time
import psutil
from learner.rewards.calls import RewardCall
from learner.rewards.pool import RewardPool
print("executed", flush=True)
scale = 3.0
def reward(completions, **_):
    if completions[0] == "hangs":
        while True: pass
    return [scale * len(c) for c in completions]
def call(*texts):
    return RewardCall({"prompts": ["p"] * len(texts), "completions": list(texts)}, None)
pool = RewardPool({0: ("reward", reward)}, workers=2, timeout_s=600)
assert pool.wait(pool.submit(0, call("aa", "b")))[0][1].rewards == [6.0, 3.0]
for _ in range(50): pool.submit(0, call("hangs"))
time.sleep(0.3)
print(*(child.pid for child in psutil.Process().children()), flush=True)
if "wait" in sys.argv: time.sleep(600)
"""


def run_script(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start an unguarded script whose rewards hang; return it and the processes that it has started."""
    path = folder / "script.py"
    path.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(path), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[4],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])},
    )
    assert process.stdout
    assert process.stdout.readline() == "executed\n"
    children = [int(pid) for pid in process.stdout.readline().split()]
    assert len(children) >= 2
    return process, children


def test_nothing_outlives_a_script_that_ends(tmp_path: Path) -> None:
    process, children = run_script(tmp_path)
    assert process.communicate(timeout=20)[0] == "", "workers do not execute __main__ again"
    assert process.returncode == 0
    until(lambda: not any(map(psutil.pid_exists, children)))


def test_nothing_outlives_a_script_that_is_killed(tmp_path: Path) -> None:
    process, children = run_script(tmp_path, "wait")
    process.kill()
    process.communicate(timeout=20)
    until(lambda: not any(map(psutil.pid_exists, children)))
