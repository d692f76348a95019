"""Checkpoints that are damaged, replaced, or removed: at any moment the newest whole one is found."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from learner.run_dir.checkpoint import (
    ADAPTER_FILES,
    STAGING,
    STATE_FILE,
    TrainingState,
    check_settings,
    commit,
    file_sizes,
    last_checkpoint,
    load_state,
    require_undamaged,
    rotate,
    save_state,
)
from shared.errors import InvalidRequest

WEIGHTS = "adapter_model.safetensors"


def _state(step: int, fence: int = 0, **settings: object) -> TrainingState:
    return TrainingState(
        fence, step, micro_step=step, pushes=step, completions=0, completion_tokens=0, settings=settings
    )


def _write(folder: Path, step: int, fence: int = 0, text: str = "weights") -> Path:
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_text(text)
    (folder / "nested").mkdir()
    (folder / "nested" / "optimizer.pt").write_text("moments")
    state = _state(step, fence)
    save_state(folder, TrainingState(**{**vars(state), "files": file_sizes(folder)}))
    return folder


def _rewrite(**changes: object) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        document = json.loads((folder / STATE_FILE).read_text())
        (folder / STATE_FILE).write_text(json.dumps(document | changes))

    return rewrite


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda folder: (folder / STATE_FILE).write_text("{"),
    "empty": lambda folder: (folder / STATE_FILE).write_text(""),
    "binary": lambda folder: (folder / STATE_FILE).write_bytes(b"\xff\x00" * 20),
    "no object": lambda folder: (folder / STATE_FILE).write_text("[1]"),
    "null": lambda folder: (folder / STATE_FILE).write_text("null"),
    "an entry is missing": lambda folder: (folder / STATE_FILE).write_text('{"fence": 0, "step": 2}'),
    "a step that is no number": _rewrite(step="four"),
    "a fence that is null": _rewrite(fence=None),
    "settings that are no object": _rewrite(settings=[1]),
    "a file is cut off": lambda folder: (folder / WEIGHTS).write_text("w"),
    "a file is missing": lambda folder: (folder / "nested" / "optimizer.pt").unlink(),
    "a file is a directory": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("damaged", ["checkpoint-2", "checkpoint-4"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, damaged: str
) -> None:
    for step in (2, 4):
        _write(tmp_path / f"checkpoint-{step}", step)
    DAMAGE[damage](tmp_path / damaged)
    before = sorted(path.name for path in (tmp_path / damaged).rglob("*"))
    with caplog.at_level(logging.WARNING):
        found = last_checkpoint(tmp_path)
    assert found == tmp_path / ("checkpoint-2" if damaged == "checkpoint-4" else "checkpoint-4")
    assert str(tmp_path / damaged) in caplog.text
    assert sorted(path.name for path in (tmp_path / damaged).rglob("*")) == before
    with pytest.raises(InvalidRequest, match="damaged"):
        load_state(tmp_path / damaged)
    require_undamaged(tmp_path)


def test_starting_over_is_refused_where_all_are_damaged(tmp_path: Path) -> None:
    require_undamaged(tmp_path / "nothing yet")
    (_write(tmp_path / "checkpoint-2", 2) / WEIGHTS).unlink()
    assert last_checkpoint(tmp_path) is None
    with pytest.raises(InvalidRequest, match=rf"checkpoint-2 is damaged \({WEIGHTS}.*resume_from_checkpoint false"):
        require_undamaged(tmp_path)


def test_what_earlier_versions_recorded_is_read(tmp_path: Path) -> None:
    old = {"fence": 1, "step": 2, "micro_step": 4, "pushes": 2, "completions": 8, "completion_tokens": 9}
    (tmp_path / STATE_FILE).write_text(json.dumps(old | {"geometry": {"num_processes": 2}}))
    assert load_state(tmp_path).settings == {"num_processes": 2}


def test_changed_settings_are_named_with_both_values(tmp_path: Path) -> None:
    settings = {"lora_r": 8, "lora_target_modules": ["q_proj"], "task": "sums", "gone": 1, "learning_rate": 0.1}
    save_state(tmp_path, _state(2, **settings))
    check_settings(tmp_path, {"lora_r": 8, "lora_target_modules": ["q_proj"], "learning_rate": 0.2, "new": 1})
    check_settings(tmp_path / "nothing", {"lora_r": 16})
    with pytest.raises(InvalidRequest) as refusal:
        check_settings(tmp_path, settings | {"lora_r": 16, "lora_target_modules": ["q_proj", "k_proj"]})
    message = refusal.value.message
    assert 'lora_r=16 instead of 8, lora_target_modules=["q_proj", "k_proj"] instead of ["q_proj"];' in message
    assert "another output_dir" in message
    assert "\n" not in message


class KilledError(BaseException):
    """Stands for the end of the process."""


def test_a_kill_between_any_two_file_operations_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A step that is reached again replaces its checkpoint, with save_total_limit=1; then the training goes on."""
    kept = set()
    for operations in range(1000):
        run = tmp_path / str(operations)
        final, staged = run / "checkpoint-2", run / STAGING / "checkpoint-2"
        _write(final, 2, fence=0, text="old")
        _write(staged, 2, fence=1, text="new")
        finished = _killed_after(operations, lambda final=final, staged=staged: _replace(final, staged))
        found = last_checkpoint(run)
        assert found is not None, f"killed after {operations} operations"
        kept.add((found / WEIGHTS).read_text())
        assert load_state(found).step == 2
        staged = _write(run / STAGING / "again" / "checkpoint-3", 3, fence=2)
        commit(staged, run / "checkpoint-3")
        rotate(run, 1, keep={run / "checkpoint-3"})
        assert last_checkpoint(run) == run / "checkpoint-3"
        left = {path.name for path in run.iterdir() if (path / STATE_FILE).is_file()}
        assert left == {"checkpoint-3"}
        if finished:
            break
    assert finished
    assert operations > 10
    assert kept == {"old", "new"}


def _replace(final: Path, staged: Path) -> None:
    commit(staged, final)
    rotate(final.parent, 1, keep={final})


def _killed_after(operations: int, action: Callable[[], None]) -> bool:
    """Run `action`, but let only so many operations change the disk; return whether it came to its end."""
    left = [operations]

    def counted(operation: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            if not left[0]:
                raise KilledError
            left[0] -= 1
            return operation(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        except KilledError:
            return False
    return True


def test_rotation_removes_the_oldest_of_whole_ones_only(tmp_path: Path) -> None:
    """Those of an earlier history first, whatever their step; never the best one, the new one, or what is damaged."""
    for step, fence in ((9, 0), (2, 1), (3, 1), (4, 1), (5, 1)):
        _write(tmp_path / f"checkpoint-{step}", step, fence)
    (tmp_path / "checkpoint-3" / WEIGHTS).unlink()
    (tmp_path / "checkpoint-1").mkdir()  # not ours
    new, best = tmp_path / "checkpoint-5", tmp_path / "checkpoint-2"
    rotate(tmp_path, None, keep={new})
    rotate(tmp_path, 3, keep={new, best})
    assert not (tmp_path / "checkpoint-9").exists()
    rotate(tmp_path, 1, keep={new, best})
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (1, 2, 3, 5)}


def test_a_checkpoint_whose_optimizer_was_deleted(tmp_path: Path) -> None:
    """To save space: its weights are whole, and the refusal to resume from it says what can be done with them."""
    folder = _write(tmp_path / "checkpoint-4", 4)
    (folder / "nested" / "optimizer.pt").unlink()
    with pytest.raises(InvalidRequest, match=rf"optimizer.pt: .*new run from its weights with init_adapter {folder}"):
        load_state(folder)
    state = load_state(folder, needed=ADAPTER_FILES)
    assert state is not None
    assert state.step == 4
    (folder / WEIGHTS).write_text("w")
    with pytest.raises(InvalidRequest, match=r"resume from another checkpoint \["):
        load_state(folder, needed=ADAPTER_FILES)
