"""How messages name an option: as a flag on the command line, as an argument in a script."""

from __future__ import annotations

_on_command_line = False


def speak_of_flags() -> None:
    """Name options as flags from now on: this process was started from a command line of ours."""
    global _on_command_line
    _on_command_line = True


def option(name: str, value: object = None) -> str:
    """Return what to write for an option of the learner, with its value if there is one.

    Example:
        >>> option("takeover", True)
        'takeover=True'
    """
    if not _on_command_line:
        return name if value is None else f"{name}={value!r}"
    return f"--{name}" if value is None else f"--{name} {str(value).lower() if isinstance(value, bool) else value}"
