"""Real worker processes: what is scored, what is killed, and what is left behind when the learner goes."""

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


lock = threading.Lock()


def waits_for_a_lock():
    mine = lock

    def function(completions, **_):
        with mine:
            return [1.0] * len(completions)

    return function


FUNCTIONS = {
    "lengths": lengths,
    "in_a_coroutine": in_a_coroutine,
    "misbehaving": misbehaving,
    "heavy_modules": heavy_modules,
    "closure": closure(),
    "waits_for_a_lock": waits_for_a_lock(),
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
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def pool(said: list[str]) -> Iterator[RewardPool]:
    pool = RewardPool(list(FUNCTIONS.items()), workers=2, timeout_s=LIMIT_S, warn=said.append)
    yield pool
    pool.close()


def scored(pool: RewardPool, name: str, *completions: str) -> list[tuple[int, RewardResult | None]]:
    return pool.wait(pool.submit(list(FUNCTIONS).index(name), group(*completions)))


def test_a_group_is_one_call_with_all_that_trl_passes(pool: RewardPool) -> None:
    [(rows, answer)] = scored(pool, "lengths", "a", "", "ccc")
    assert rows == 3
    assert answer.rewards == [2.0, None, 6.0]
    assert answer.metrics == [("step", 7.0)]
    assert answer.extras == [("first", ["a", "", "c"])]


@pytest.mark.parametrize(("name", "expected"), [("in_a_coroutine", [1.0] * 2), ("closure", [1.5, 2.5])])
def test_other_kinds_of_functions(pool: RewardPool, name: str, expected: list[float]) -> None:
    [(_, answer)] = scored(pool, name, "a", "bb")
    assert answer.rewards == expected


def test_workers_are_light(pool: RewardPool) -> None:
    [(_, answer)] = scored(pool, "heavy_modules", "a")
    assert answer.rewards == [0.0]


@pytest.mark.parametrize("bad", ["hangs", "dies"])
def test_one_bad_sample_costs_the_others_nothing(pool: RewardPool, bad: str) -> None:
    parts = scored(pool, "misbehaving", "a", bad, "ccc", "dddd")
    assert [answer and answer.rewards for _, answer in parts] == [[1.0], None, [3.0], [4.0]]
    assert scored(pool, "misbehaving", bad) == [(1, None)]


def test_an_exception_comes_with_its_traceback(pool: RewardPool) -> None:
    [(_, answer)] = scored(pool, "misbehaving", "a", "raises")
    assert "the user's own" in answer.error
    assert "in misbehaving" in answer.error


def test_an_idle_worker_that_is_killed_is_replaced(pool: RewardPool) -> None:
    workers = [child for child in psutil.Process().children() if "popen_loky" in " ".join(child.cmdline())]
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
    outcomes = [pool.submit(0, group("a")) for _ in range(20)]
    assert all(pool.wait(outcome)[0][1].rewards == [2.0] for outcome in outcomes)


def test_what_cannot_be_pickled_has_a_soft_limit(pool: RewardPool, said: list[str]) -> None:
    """It says so at once; threads that are stuck are left behind, and not for ever more of them."""
    assert [text for text in said if "waits_for_a_lock" in text and "cannot be pickled" in text]
    with lock:
        for _ in range(3):
            assert scored(pool, "waits_for_a_lock", "a") == [(1, None)]
        with pytest.raises(LockstepError, match="stuck on 3 threads"):
            scored(pool, "waits_for_a_lock", "a")
    until(lambda: not pool._threads[5]._alive())
    assert scored(pool, "waits_for_a_lock", "a", "b")[0][1].rewards == [1.0, 1.0]


def test_what_a_worker_cannot_load_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_here = f"import os\nassert os.getpid() == {os.getpid()}\ndef one(completions, **_):\n    return [1.0]\n"
    (tmp_path / "only_here.py").write_text(only_here)
    monkeypatch.syspath_prepend(str(tmp_path))
    from only_here import one  # type: ignore[import-not-found]

    said: list[str] = []
    pool = RewardPool([("one", one)], workers=1, timeout_s=5.0, warn=said.append)
    assert pool.wait(pool.submit(0, group("a")))[0][1].rewards == [1.0]
    assert len(said) == 1
    assert "AssertionError" in said[0]
    pool.close()


SCRIPT = """
import os, sys, threading, time
from types import SimpleNamespace
import psutil
from learner.rewards.pool import RewardCall, RewardPool
print("executed", flush=True)
scale = 3.0
never = threading.Lock(); never.acquire()
def reward(completions, **_):
    if completions[0] == "hangs":
        while True: pass
    return [scale * len(c) for c in completions]
def here(completions, **_):
    with never: return []
def call(*texts):
    return RewardCall({"prompts": ["p"] * len(texts), "completions": list(texts)}, None)
pool = RewardPool([("reward", reward), ("here", here)], workers=2, timeout_s=600, warn=lambda text: None)
assert pool.wait(pool.submit(0, call("aa", "b")))[0][1].rewards == [6.0, 3.0]
for _ in range(50): pool.submit(0, call("hangs"))
pool.submit(1, call("a"))
time.sleep(0.3)
print(*(child.pid for child in psutil.Process().children()), flush=True)
if "wait" in sys.argv: time.sleep(600)
"""


def run_script(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """An unguarded script whose rewards hang, in workers and on a thread; the processes it has started."""
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
