"""Atomic checkpoints, and the state that they add to TRL's.

`checkpoint-N/` holds transformers' files (adapter, optimizer, scheduler, random states, trainer state), our
`lockstep.json`, under FSDP2 the adapter, and, inside a generation batch, that batch.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from learner.utils.atomic import replace_directory
from shared.errors import InvalidRequest

logger = logging.getLogger("lockstep.run_dir")

#: Written last; marks a complete checkpoint of ours.
STATE_FILE = "lockstep.json"
#: The adapter of a checkpoint, as PEFT writes it.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
#: Directory in which a checkpoint is written before its rename.
STAGING = ".checkpoint-incomplete"
#: A checkpoint, and one that was being replaced when its learner was killed.
_CHECKPOINT, _SET_ASIDE = re.compile(r"checkpoint-\d+"), re.compile(r"\.checkpoint-\d+\.[0-9a-f]{8}")
#: Settings that may change when a training goes on; recorded because the optimizer's copy of them must follow.
_FREE = ("learning_rate",)


@dataclass(frozen=True)
class TrainingState:
    """Training state that transformers' checkpoint lacks.

    Attributes:
        fence: of the learner that wrote it; a higher one belongs to a later history of the run.
        step: optimizer steps done.
        micro_step: TRL's count of forward-backward passes, which gives the position in a generation batch.
        pushes, completions, completion_tokens: totals of the run.
        settings: what it was trained with, see `learner.trainer.settings`.
        files: size in bytes of every other file of the checkpoint.
    """

    fence: int
    step: int
    micro_step: int
    pushes: int
    completions: int
    completion_tokens: int
    settings: dict[str, Any]
    files: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            kind = dict if name in ("settings", "files") else int
            if type(value) is not kind:
                raise TypeError(f"{name} is {value!r:.40}")


def save_state(folder: Path, state: TrainingState) -> None:
    """Write `state` into a checkpoint directory."""
    (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")


def load_state(folder: Path, needed: Collection[str] | None = None) -> TrainingState | None:
    """Return a checkpoint's state, or None if it is not ours; raises `invalid_request` if any of it is damaged.

    Args:
        needed: names of the files that must be whole; None: all.
    """
    path = folder / STATE_FILE
    try:
        if not path.is_file():
            return None
        document = json.loads(path.read_text())
        # Earlier versions recorded fewer settings, under another name, and no files.
        known = {"settings": document.get("geometry"), "files": {}} | document
        state = TrainingState(**{field.name: known[field.name] for field in fields(TrainingState)})
        sizes = {name: (folder / name).stat().st_size for name in state.files if (folder / name).is_file()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"{path} is damaged ({type(error).__name__}: {error}); resume from another checkpoint"
        ) from error
    damaged = [name for name, size in state.files.items() if sizes.get(name) != size]
    if any(needed is None or name in needed for name in damaged):
        instead = f", or start a new run from its weights with init_adapter {folder} and another output_dir"
        raise InvalidRequest(
            f"{folder} is damaged ({', '.join(damaged[:3])}: missing or cut off); resume from another checkpoint"
            + ("" if set(ADAPTER_FILES) & set(damaged) else instead)
        )
    return state


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below `folder`, by its relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def check_settings(folder: Path, now: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint, or over a finished adapter, that was trained with other settings than `now`.

    Settings that either does not know are left out. Raises `invalid_request` with every name, old and new value.
    """
    state = load_state(folder)
    changed = [
        f"{name}={_short(now[name])} instead of {_short(was)}"
        for name, was in (state.settings if state else {}).items()
        if name in now and now[name] != was and name not in _FREE
    ]
    if changed:
        raise InvalidRequest(
            f"{folder} was trained with other settings: {', '.join(changed)}; give the old values, another output_dir "
            f"(with init_adapter {folder} a new run starts there from these weights), or resume_from_checkpoint=false "
            "to start over here"
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else f"{text[:160]}..."


def commit(staged: Path, final: Path) -> None:
    """Sync a finished checkpoint to disk and rename it to `final`; its staging directory goes.

    A resumed training may come to a step that has a checkpoint. That one is set aside under a name by which
    `last_checkpoint` finds it, until the new one has its name: at any moment one of the two is whole.
    """
    aside = final.with_name(f".{final.name}.{secrets.token_hex(4)}")
    replace_directory(staged, final, aside=aside, durable=True)
    for path in final.parent.iterdir():
        if _SET_ASIDE.fullmatch(path.name):
            _discard(path)
    shutil.rmtree(staged.parent, ignore_errors=True)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest whole checkpoint of ours in `output_dir`: the last step of the highest fence.

    Warns of damaged ones, and leaves them alone.
    """
    whole, damaged = _checkpoints(Path(output_dir))
    for error in damaged:
        logger.warning(f"passed over: {error.message}")
    return whole[-1] if whole else None


def require_undamaged(output_dir: str | Path) -> None:
    """Raise `invalid_request` if there are checkpoints of ours and none is whole: starting over would lose them."""
    whole, damaged = _checkpoints(Path(output_dir))
    if damaged and not whole:
        raise InvalidRequest(
            f"no checkpoint in {output_dir} is whole: {damaged[-1].message}, or start over in another output_dir, or "
            "here with resume_from_checkpoint false"
        )


def rotate(output_dir: Path, limit: int | None, *, keep: Collection[Path]) -> None:
    """Remove the oldest whole checkpoints of ours beyond `limit`, but none of `keep`, and nothing that is damaged."""
    whole, _ = _checkpoints(output_dir)
    old = [path for path in whole if path not in keep]
    excess = len(whole) - max(limit, len(whole) - len(old)) if limit else 0
    for path in old[: max(excess, 0)]:
        _discard(path)


def _checkpoints(output_dir: Path) -> tuple[list[Path], list[InvalidRequest]]:
    """Return the whole checkpoints of ours, oldest first, and what is wrong with the others."""
    order: dict[Path, tuple[int, int, bool]] = {}
    damaged: list[InvalidRequest] = []
    for path in sorted(output_dir.iterdir()) if output_dir.is_dir() else ():
        named = _CHECKPOINT.fullmatch(path.name) is not None
        if not (named or _SET_ASIDE.fullmatch(path.name)):
            continue
        try:
            if state := load_state(path):
                order[path] = (state.fence, state.step, named)
        except InvalidRequest as error:
            damaged += [error] if named else []  # else it was being removed
    return sorted(order, key=lambda path: order[path]), damaged


def _discard(folder: Path) -> None:
    """Remove a checkpoint. If that is cut off half-way, what is left does not pass for one."""
    (folder / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
