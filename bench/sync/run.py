"""Which servers are started and which rows are measured on them; a failure stays within its row."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common.measure import Contender, Setting, Skip, measure
from bench.common.policy import Policy
from bench.common.report import LATE, Report, describe
from bench.common.servers import Server
from bench.common.shapes import Shape, served_rank
from bench.contenders.lockstep import OurPath, Ours, under_load
from bench.contenders.trl_merged_weights import PeerMerged
from bench.contenders.vllm_adapter_files import PeerFile
from bench.sync.watchdog import Watchdog

# Merged weights come last: their collective operations know no deadline.
CONTENDERS: tuple[Callable[[], Contender], ...] = (Ours, PeerFile, PeerMerged)
ROWS = tuple(row for make in CONTENDERS for row in make().rows)


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    shapes: Sequence[Shape]
    ranks: Sequence[int]
    rows: Sequence[str]
    adapter_dtype: str
    share_server: bool
    parallel_start: bool
    deadline_s: float | None
    row_limit_s: float


@dataclass
class Block:
    """One server and the rows measured on it."""

    contender: Contender
    shape: Shape
    folder: Path
    max_rank: int
    ranks: list[int]
    rows: list[str]
    server: Server | None = None
    failed: str | None = None  # the server did not start


class Run:
    """All blocks of all shapes, one after the other."""

    def __init__(self, setting: Setting, plan: Plan, report: Report, finish: Callable[[], Any]) -> None:
        self.setting, self.plan, self.report, self.finish = setting, plan, report, finish
        self.deadline = time.monotonic() + plan.deadline_s if plan.deadline_s else None
        self.watchdog = Watchdog(plan.row_limit_s, give_up=self._give_up)
        self.running: list[Block] = []

    def all_shapes(self) -> None:
        for shape in self.plan.shapes:
            folder = shape.write(self.setting.work / shape.name, self.setting.dtype)
            blocks = self.blocks(shape, folder)
            if not blocks:
                continue
            if self.late():
                self.skip_all(blocks, LATE)
                continue
            try:
                for block in blocks if self.plan.parallel_start else blocks[:1]:
                    self.start(block)
                policy = Policy(folder, torch.device(self.setting.device), self.setting.dtype)
                for block in blocks:
                    self.measure_block(block, policy)
            except Exception as error:  # the learner's model, say: no row of this shape can be measured
                self.skip_all(blocks, None, describe(error))
            finally:
                for block in blocks:
                    self.end(block)

    def blocks(self, shape: Shape, folder: Path) -> list[Block]:
        """What to measure on which server; rows that cannot be measured here are written down at once."""
        blocks = []
        for contender in (make() for make in CONTENDERS):
            rows = [row for row in contender.rows if row in self.plan.rows]
            if not rows:
                continue
            together = self.plan.share_server or not contender.needs_rank
            for ranks in [list(self.plan.ranks)] if together else [[rank] for rank in self.plan.ranks]:
                block = Block(contender, shape, folder, served_rank(max(ranks)), ranks, rows)
                if why := contender.unable(self.setting):
                    self.skip_all([block], why)
                else:
                    blocks.append(block)
        return blocks

    def measure_block(self, block: Block, policy: Policy) -> None:
        """Start the block's server if need be, measure its rows, end it."""
        if self.late():
            self.skip_all([block], LATE)
            return
        self.start(block)
        if block.server is not None and block.failed is None:
            try:
                block.server.wait_ready(self.setting.start_timeout_s)
                print(f"bench: {block.server.name} ready after {block.server.start_s:.0f} s", flush=True)
            except Exception as error:
                block.failed = describe(error)
        if block.failed is not None:
            self.skip_all([block], None, block.failed)
        else:
            for rank in block.ranks:
                with policy.adapter(rank, self.plan.adapter_dtype) as model:
                    for row in block.rows:
                        self.measure_row(block, row, rank, model)
        self.end(block)

    def measure_row(self, block: Block, row: str, rank: int, model: Any) -> None:
        """One row, and for ours the same under load."""
        assert block.server is not None
        if self.late():
            self.add(block, row, rank, {"ok": True, "skipped": LATE})
            return
        with self.watchdog.over(block.server, lambda error: self.add(block, row, rank, error)):
            try:
                with block.contender.path(row, block.server, model) as path:
                    self.add(block, row, rank, measure(path, model, self.setting.pushes, block.shape.vocab))
                    if self.setting.under_load and isinstance(path, OurPath):
                        loaded = f"{row}, {self.setting.under_load} requests decoding"
                        with self.failure_kept(block, loaded, rank):
                            figures = under_load(path, block.server, model, self.setting, block.shape.vocab)
                            self.add(block, loaded, rank, figures)
            except Skip as skip:
                self.add(block, row, rank, {"ok": True, "skipped": str(skip)})
            except Exception as error:
                self.add(block, row, rank, {"ok": False, "error": f"{describe(error)}; {block.server.tail()}"})

    @contextlib.contextmanager
    def failure_kept(self, block: Block, row: str, rank: int) -> Iterator[None]:
        """A failure becomes a row."""
        try:
            yield
        except Exception as error:
            self.add(block, row, rank, {"ok": False, "error": describe(error)})

    def add(self, block: Block, row: str, rank: int, figures: dict[str, Any]) -> None:
        """Complete a row and keep it."""
        about = {
            "row": row,
            "shape": block.shape.name,
            "rank": rank,
            "parameters": block.shape.parameters,
            "server_max_lora_rank": block.max_rank if block.contender.needs_rank else None,
            "server_start_s": block.server.start_s if block.server else None,
            "servers_side_by_side": bool(self.plan.parallel_start),
        }
        note = block.contender.notes.get(row)
        self.report.add({**about, "ok": True, **({"note": note} if note else {}), **figures})

    def skip_all(self, blocks: Sequence[Block], why: str | None, error: str | None = None) -> None:
        """The same reason, or error, for every row of these blocks that has none yet."""
        have = {(row["shape"], row["rank"], row["row"]) for row in self.report.rows}
        for block in blocks:
            for rank in block.ranks:
                for row in block.rows:
                    if (block.shape.name, rank, row) not in have:
                        self.add(
                            block, row, rank, {"ok": True, "skipped": why} if why else {"ok": False, "error": error}
                        )

    def start(self, block: Block) -> None:
        if block.server is None and block.failed is None:
            try:
                block.server = block.contender.start(self.setting, block.folder, block.max_rank)
                self.running.append(block)
            except Exception as error:
                block.failed = describe(error)

    def end(self, block: Block) -> None:
        if block.server is not None:
            block.server.end()
            block.server = None

    def late(self) -> bool:
        """No new row is started."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def _give_up(self) -> None:
        self.finish()
        for block in self.running:
            self.end(block)
        os._exit(3)
