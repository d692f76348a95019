"""Ways to bring new weights to a server, ours and its peers': what they have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from peft import PeftModel

from bench.common.servers import Server, Setting


@dataclass(frozen=True)
class Moved:
    """Bytes of one push, and its seconds by parts, as far as the path itself knows them."""

    nbytes: int
    parts: dict[str, float] = field(default_factory=dict)


class SyncPath(ABC):
    """One way to bring the weights of a model to a server."""

    @abstractmethod
    def push(self, step: int) -> Moved:
        """Push the current weights; return when the server will sample from them."""

    @abstractmethod
    def first_token(self, prompt: list[int]) -> tuple[int, float]:
        """Return token and logprob of one greedy token by the weights pushed last."""

    def settle(self) -> None:  # noqa: B027
        """Remove what the push left behind; not measured."""


class Contender(ABC):
    """A server and the paths to it; its methods raise `Skip` where something is not possible here.

    Attributes:
        rows: names of the paths.
        needs_rank: whether the server is started for a highest rank.
        notes: row -> what to know about it.
    """

    rows: ClassVar[tuple[str, ...]]
    needs_rank: ClassVar[bool] = True
    notes: ClassVar[Mapping[str, str]] = {}

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def start(self, folder: Path, max_rank: int) -> Server:
        """Start the server; it need not be ready."""

    @abstractmethod
    def path(self, row: str, server: Server, model: PeftModel) -> AbstractContextManager[SyncPath]:
        """Open the path of a row."""
