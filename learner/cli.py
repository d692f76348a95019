"""`learner train | up | init | doctor | status | runs | eval | export | four-bit-base`.

A command is imported only when it is called: `up`, `init`, `status`, `runs`, `eval` and `export` need no torch.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from learner.utils.processes import Stopped
from learner.utils.wording import speak_of_flags
from shared.errors import ErrorCode, InvalidRequest, LockstepError
from shared.messages import did_you_mean, one_line

COMMANDS = {
    "train": ("learner.commands.training", "train a LoRA adapter with GRPO, with rollouts from rollout servers"),
    "up": ("learner.commands.up", "start a rollout server and a training with it, both on this machine"),
    "init": ("learner.commands.init", "write a recipe, from flags or questions"),
    "doctor": ("learner.commands.doctor", "say what will not work, before anything is loaded"),
    "status": ("learner.commands.status", "show what the rollout servers serve, and the progress of a run"),
    "runs": ("learner.commands.runs", "list the runs of rollout servers, and end them"),
    "eval": ("learner.commands.eval", "score and compare policies on a task, over HTTP"),
    "four-bit-base": ("learner.commands.four_bit_base", "make a base model that the learner can load in 4-bit (QLoRA)"),
    "export": ("learner.commands.export", "export a trained adapter, alone or merged into its base model"),
}
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_STOPPED = 1, 2, 130, 143
#: Errors of options: alone, or beside what the server was started with. Trying again would not help.
_OF_OPTIONS = (
    ErrorCode.INVALID_REQUEST,
    ErrorCode.UNSUPPORTED_ADAPTER,
    ErrorCode.RANK_TOO_HIGH,
    ErrorCode.BASE_MISMATCH,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0 done, 1 failed (another try may succeed), 2 wrong options, 130
    interrupted, 143 stopped by a signal: not finished, so that a supervisor starts it again.

    Errors that the user can fix are one line on stderr; $LOCKSTEP_TRACEBACK=1 shows the traceback instead.
    """
    speak_of_flags()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else EXIT_USAGE
    if argv[0] == "--version":
        print(f"learner {version('lockstep-rl')}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"learner: no command {argv[0]!r}{did_you_mean(argv[0], COMMANDS)} (learner --help)", file=sys.stderr)
        return EXIT_USAGE
    # It is installed beside TRL and need not be used: an error would not be the only line on stderr.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return import_module(COMMANDS[argv[0]][0]).main(argv[1:])
    except (LockstepError, OSError) as error:  # OSError: a full disk, a path that cannot be written
        if os.environ.get("LOCKSTEP_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # what only an option can be
            error = InvalidRequest(f"{error.filename!r:.80}... is too long for a file's name")
        print(f"learner {argv[0]}: {one_line(error)}", file=sys.stderr)
        return EXIT_USAGE if getattr(error, "code", None) in _OF_OPTIONS else EXIT_FAILED
    except KeyboardInterrupt as interrupt:
        print(f"learner {argv[0]}: interrupted{': ' * bool(interrupt.args)}{interrupt}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Stopped as stopped:
        print(f"learner {argv[0]}: stopped by {stopped}", file=sys.stderr)
        return EXIT_STOPPED


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: learner COMMAND [options]   (learner COMMAND --help)\n\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
