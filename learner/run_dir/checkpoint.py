"""Atomic checkpoints, and the state that they add to TRL's.

`checkpoint-N/` holds transformers' files (adapter, optimizer, scheduler, random states, trainer state), our
`lockstep.json`, under FSDP2 the adapter, and, inside a generation batch, that batch.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from learner.utils.atomic import replace_directory
from shared.errors import InvalidRequest

#: Written last; marks a complete checkpoint of ours.
STATE_FILE = "lockstep.json"
#: Directory in which a checkpoint is written before its rename.
STAGING = ".checkpoint-incomplete"


@dataclass(frozen=True)
class TrainingState:
    """Training state that transformers' checkpoint lacks.

    Attributes:
        fence: of the learner that wrote it; a higher one belongs to a later history of the run.
        step: optimizer steps done.
        micro_step: TRL's count of forward-backward passes, which gives the position in a generation batch.
        pushes, completions, completion_tokens: totals of the run.
        geometry: options that `micro_step` and the saved batch depend on, by TRL's names.
    """

    fence: int
    step: int
    micro_step: int
    pushes: int
    completions: int
    completion_tokens: int
    geometry: dict[str, int]


def save_state(folder: Path, state: TrainingState) -> None:
    """Write `state` into a checkpoint directory."""
    (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")


def load_state(folder: Path) -> TrainingState | None:
    """Return a checkpoint's state, or None if it is not ours; raises `invalid_request` if the file is damaged."""
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text())
        return TrainingState(**{field.name: document[field.name] for field in fields(TrainingState)})
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{path} is damaged ({error}); resume from another checkpoint") from error


def commit(staged: Path, final: Path) -> None:
    """Sync a finished checkpoint to disk and rename it to `final`; its staging directory goes."""
    replace_directory(staged, final, durable=True)  # a resumed training may come to a step that has a checkpoint
    shutil.rmtree(staged.parent, ignore_errors=True)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of ours in `output_dir`: the last step of the highest fence."""
    folders = (path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    states = {path: state for path in folders if (state := load_state(path)) is not None}
    return max(states, key=lambda path: (states[path].fence, states[path].step), default=None)
