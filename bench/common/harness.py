"""The harness of all benches: flags, deadline, rows, JSON, table, picture, servers. A bench adds rows and columns."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from bench.common.models import pick_shapes, served_rank
from bench.common.report import LATE, Row, Template, cpu_name, describe, fill, machine, table, why
from bench.common.servers import Server, Setting, visible_device
from learner.utils.atomic import write_atomically
from learner.utils.processes import Stopped, stop_on_signals

Name = TypeVar("Name", bound=Hashable)
#: Flag -> default, or type of a flag without one, and help.
Flags = Mapping[str, tuple[Any, str]]

STANDARD: Flags = {
    "--json": (Path, "written after every row"),
    "--plot": (Path, "a PNG"),
    "--shape": ("qwen3-4b", ""),
    "--shapes": ("qwen3-4b", "comma-separated"),
    "--rank": (32, "of the adapter"),
    "--load": ("", "sizes that go together, which further flags change: "),
    "--only": (str, "rows to measure, by the beginnings of their names, comma-separated: "),
    "--learner-gpu": (0, ""),
    "--server-gpu": (1, "the first GPU of a server"),
    "--server-gpus": (1, "GPUs of a server; more than one need --server-flags '--tensor-parallel-size N' or the like"),
    "--server-flags": ("", "further vLLM flags for every server, in one string"),
    "--deadline-s": (math.inf, "start nothing new after this many seconds"),
    "--work-dir": (Path, "keeps the servers' logs"),
}


class Skip(Exception):
    """This row cannot be measured here; the message says why."""


class Bench:
    """One bench, `python -m bench.NAME`.

    Attributes:
        standard: which of the standard flags it has, without dashes.
        flags: further flags; they win over the standard ones.
        quick: further flags with `--quick`.
        row_names: of all rows, for `--only`.
        loads: name -> flags, for `--load`.
        same: options that all rows share.
        notes: row name -> a note that its rows carry.
        figure: key that measured rows have, and no others.
        about: head of a column -> key; together the values identify a row.
        columns: head of a column -> figures of a measured row.
        what, told: the start of a row's line, and its end if it was measured.
        rows: all rows so far.
        work, scratch: folders for logs, and for what is deleted afterwards.
        device, dtype: the learner's device; the dtype of learner and servers.
        server_device: CUDA_VISIBLE_DEVICES of every server; None on a CPU.
    """

    name: ClassVar[str]
    standard: ClassVar[str] = ""
    flags: ClassVar[Flags] = {}
    quick: ClassVar[str] = ""
    row_names: ClassVar[Sequence[str]] = ()
    loads: ClassVar[Mapping[str, str]] = {}
    same: ClassVar[Sequence[str]] = ()
    notes: ClassVar[Mapping[str, str]] = {}
    figure: ClassVar[str]
    about: ClassVar[Mapping[str, str]]
    columns: ClassVar[Mapping[str, Template]]
    what: ClassVar[Template]
    told: ClassVar[Template]

    def __init__(self, argv: Sequence[str] | None = None) -> None:
        argv = sys.argv[1:] if argv is None else argv
        parser = self._parser()
        self.options = parser.parse_args(argv)
        try:
            chosen = pick_load(getattr(self.options, "load", ""), self.loads)
            quick = shlex.split(self.quick) if self.options.quick else []
            self.options = parser.parse_args([*chosen, *argv, *quick])
            self.check()
        except ValueError as error:
            parser.error(str(error))
        self.rows: list[Row] = []
        self.work = self.scratch = Path()
        self.running: list[Server] = []
        self._of_this_run: set[tuple[Any, ...]] = set()
        self.deadline = time.monotonic() + getattr(self.options, "deadline_s", math.inf)
        devices = self.pick_devices()
        self.dtype = "float32" if self.device == "cpu" else "bfloat16"
        self.machine = machine(devices, shlex.join(["python", "-m", f"bench.{self.name}", *argv]))

    def _parser(self) -> argparse.ArgumentParser:
        doc = sys.modules[type(self).__module__].__doc__ or ""
        parser = argparse.ArgumentParser(prog=f"python -m bench.{self.name}", description=doc.split("\n", 1)[0])
        parser.add_argument("--quick", action="store_true", help=f"small: {self.quick}")
        names = ["--json", *(f"--{name}" for name in self.standard.split()), "--work-dir"]
        for flag, (default, text) in {**{name: STANDARD[name] for name in names}, **self.flags}.items():
            text += "; ".join({"--only": self.row_names, "--load": self.loads}.get(flag, ()))
            if default is False:
                parser.add_argument(flag, action="store_true", help=text)
            elif isinstance(default, type):
                parser.add_argument(flag, type=default, help=text)
            else:
                parser.add_argument(flag, type=type(default), default=default, help=text)
        return parser

    def check(self) -> None:
        """Check and convert the options.

        Raises:
            ValueError: naming those that cannot be.
        """
        options = self.options
        if "shapes" in options:
            self.shapes = pick_shapes(options.shapes)
        if "shape" in options:
            [self.shape] = pick_shapes(options.shape)
        if "rank" in options:
            served_rank(options.rank)
        gpus, asked = torch.cuda.device_count(), getattr(options, "server_gpus", 1)
        if not 1 <= asked <= max(gpus, 1):
            raise ValueError(f"--server-gpus {asked}: there are {gpus} GPUs")
        if "only" in options:
            options.only = pick_rows(options.only, self.row_names)

    def numbers(self, *names: str) -> None:
        """Convert comma-separated options to the sorted lists of their numbers."""
        for name in names:
            setattr(self.options, name, sorted({int(part) for part in getattr(self.options, name).split(",")}))

    def at_least(self, least: int, *names: str) -> None:
        """Raise ValueError if one of these options, or an item of it, is less."""
        for name in names:
            value = getattr(self.options, name)
            if any(number < least for number in (value if isinstance(value, list) else [value])):
                raise ValueError(f"--{name.replace('_', '-')} must be {least} or more")

    def pick_devices(self) -> list[str]:
        """Set where learner and servers run; return the devices' names."""
        self.device, self.server_device = "cpu", None
        if not torch.cuda.is_available():
            return [cpu_name()]
        last, options = torch.cuda.device_count() - 1, self.options
        if "server_gpu" not in options:  # servers use all that the learner does not
            self.device = "cuda:0"
            return [torch.cuda.get_device_name(i) for i in range(last + 1)]
        count = getattr(options, "server_gpus", 1)
        server = min(options.server_gpu, last + 1 - count)
        servers = range(server, server + count)
        learner = min(getattr(options, "learner_gpu", server), last)
        torch.cuda.set_device(learner)
        self.device, self.server_device = f"cuda:{learner}", ",".join(map(visible_device, servers))
        names = [torch.cuda.get_device_name(i) for i in servers]
        return [f"{torch.cuda.get_device_name(learner)} (learner)", *(f"{name} (server)" for name in names)]

    def setting(self, length: int, sequences: int, kv_cache_bytes: float, *more: str) -> Setting:
        """Return where servers run that have room for so many sequences of so many tokens.

        Args:
            kv_cache_bytes: on a GPU; fixed and not profiled, for servers side by side would count each other's memory.
            more: further flags of vLLM; the user's follow them.
        """
        flags = ["--max-model-len", str(length), "--max-num-seqs", str(max(2, sequences)), "--dtype", self.dtype]
        if self.device == "cpu":
            flags.append("--enforce-eager")
        else:  # a tenth is free at least
            flags += ["--kv-cache-memory-bytes", str(math.ceil(kv_cache_bytes)), "--gpu-memory-utilization", "0.1"]
        flags += [*more, *shlex.split(self.options.server_flags)]
        return Setting(self.work, self.device, self.server_device, self.dtype, tuple(flags))

    def run(self) -> None:
        """Measure all rows."""
        raise NotImplementedError

    def main(self) -> int:
        """Measure. Return the exit code: 0 if something was measured and no row failed."""
        logging.basicConfig(format="bench: %(message)s")
        logging.getLogger("lockstep").setLevel(logging.INFO)
        stopped = False
        with tempfile.TemporaryDirectory(prefix=f"bench-{self.name}-") as scratch:
            self.scratch = Path(scratch)
            self.work = self.options.work_dir or self.scratch
            self.work.mkdir(parents=True, exist_ok=True)
            try:
                with stop_on_signals():
                    self.run()
            except Stopped as signal:
                print(f"bench: stopped by {signal}", file=sys.stderr)
                stopped = True
        return self.finish() or int(stopped)

    def finish(self) -> int:
        """Write the file and the picture, print the table, return the exit code."""
        self._write()
        if (path := getattr(self.options, "plot", None)) and (done := self.measured()):
            self.plot(path, done)
        document = self.document()
        print(f"\n{self.table()}\n\n{document['headline']}", flush=True)
        return 0 if document["ok"] else 1

    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def in_time(self) -> None:
        """Raise `Skip` after the deadline."""
        if self.late():
            raise Skip(LATE)

    def about_row(self, row: str, **more: Any) -> dict[str, Any]:
        """Return what a row is about: its name, `more`, and the options that all rows share."""
        return {"row": row, **more, **{name: getattr(self.options, name) for name in self.same}}

    @contextlib.contextmanager
    def failure_kept(self, *abouts: Row, server: Server | None = None) -> Iterator[None]:
        """Turn a failure of the block, or its `Skip`, into rows: `abouts` without a row of this run.

        A skipped row does not replace one that an earlier run has measured.
        """
        try:
            yield
        except Skip as skip:
            there = {self.key(row) for row in self.rows}
            for about in abouts:
                if self.key(about) not in there:
                    self.add(about, {"skipped": str(skip)})
        except Exception as error:
            text = describe(error) + (f"; {server.tail()}" if server else "")
            missing = [about for about in abouts if self.key(about) not in self._of_this_run]
            for about in missing:
                self.add(about, {"ok": False, "error": text})
            if not missing:
                print(f"bench: ERROR after the rows were measured: {text}", file=sys.stderr)

    @contextlib.contextmanager
    def servers(
        self, starts: Mapping[Name, Callable[[], Server]], abouts: Callable[[Name], Sequence[Row]]
    ) -> Iterator[dict[Name, Server]]:
        """Start servers side by side; yield those that are ready once all have started or failed, and end them.

        Args:
            abouts: the rows of a server, written down if it does not start.
        """
        started: dict[Name, Server] = {}
        ready: dict[Name, Server] = {}
        patience_s = getattr(self.options, "start_timeout_s", 600.0)
        try:
            for name, start in starts.items():
                with self.failure_kept(*abouts(name)):
                    self.in_time()
                    started[name] = start()
                    self.running.append(started[name])
            for name, server in started.items():
                with self.failure_kept(*abouts(name)):
                    server.wait_ready(min(patience_s, self.deadline - server.started))
                    print(f"bench: {abouts(name)[0]['row']}: server ready after {server.start_s:.0f} s", flush=True)
                    ready[name] = server
            yield ready
        finally:
            for server in started.values():
                server.end()
                self.running.remove(server)

    def take_turns(
        self,
        targets: Sequence[Any],
        rounds: int,
        turn: Callable[[Any, int], Any],
        about: Callable[[Any], Row],
        figures: Callable[[int, Sequence[list[Any]]], Row],
    ) -> None:
        """Run rounds in which targets take turns, another one first in every round, and add a row for each target.

        Round 0 is not counted. A round counts completely or not at all: none begins after the deadline, one that is
        interrupted is forgotten. A target that fails gets no further turn.

        Args:
            targets: objects with a `server`.
            turn: measures a target in a round.
            figures: number of a target, and of all targets what their turns returned -> the figures of its row.
        """
        results: list[list[Any]] = [[] for _ in targets]
        failed: dict[int, str] = {}
        try:
            for number in range(rounds + 1):
                if number != 1 and self.late():
                    break
                found = {}
                for i in ((number + shift) % len(targets) for shift in range(len(targets))):
                    if i not in failed:
                        try:
                            found[i] = turn(targets[i], number)
                        except Exception as error:
                            failed[i] = f"{describe(error)}; {targets[i].server.tail()}"
                for i, result in found.items() if number else ():
                    results[i].append(result)
        finally:  # also when it is stopped
            for i, target in enumerate(targets):
                measured = figures(i, results) if results[i] else {"skipped": LATE}
                self.add(about(target), {"ok": False, "error": failed[i]} if i in failed else measured)

    def key(self, row: Row) -> tuple[Any, ...]:
        """Return what identifies a row."""
        return tuple(row.get(key) for key in self.about.values())

    def add(self, about: Row, figures: Row) -> None:
        """Keep a row in place of an older one about the same, print its line, and write the file."""
        note = {"note": self.notes[about["row"]]} if about.get("row") in self.notes else {}
        row = {"ok": True, **about, **note, **figures}
        self.rows = [old for old in self.rows if self.key(old) != self.key(row)] + [row]
        self._of_this_run.add(self.key(row))
        print(f"bench: {self.line(row)}", flush=True)
        self._write()

    def measured(self) -> list[Row]:
        """Return the rows that have figures."""
        return [row for row in self.rows if self.figure in row]

    def line(self, row: Row) -> str:
        """Return a row in one line."""
        bench = type(self)  # where a function is no method
        text = fill(bench.told, row) if self.figure in row else why(row).replace("error: ", "ERROR ", 1)
        return f"{fill(bench.what, row)}: {text}"

    def table(self) -> str:
        """Return all rows as a table."""
        return table(self.rows, self.about, self.columns, self.figure)

    @property
    def where(self) -> str:
        """The devices, each once."""
        return ", ".join(dict.fromkeys(self.machine["devices"]))

    def headline(self, done: Sequence[Row]) -> str:
        """Return one sentence with the figures of the measured rows, of which there are some."""
        return f"on {self.where}: {'; '.join(map(self.line, done))}"

    def document(self) -> dict[str, Any]:
        """Return what the file says."""
        done = self.measured()
        return {
            "headline": self.headline(done) if done else "nothing was measured",
            "ok": all(row["ok"] for row in self.rows) and bool(done),
            "machine": self.machine,
            "rows": self.rows,
        }

    def _write(self) -> None:
        if self.options.json:
            write_atomically(self.options.json, json.dumps(self.document(), indent=1))

    def plot(self, path: Path, done: Sequence[Row]) -> None:
        """Draw the measured rows."""
        raise NotImplementedError


def pick_load(name: str, loads: Mapping[str, str]) -> list[str]:
    """Return the flags of a load; none without a name.

    Raises:
        ValueError: there is no such load.
    """
    if name and name not in loads:
        raise ValueError(f"unknown load {name!r}; there are {', '.join(loads)}")
    return shlex.split(loads[name]) if name else []


def pick_rows(names: str | None, there: Sequence[str]) -> list[str]:
    """Return the rows whose names begin with one of a comma-separated list; all of them without one.

    Raises:
        ValueError: a name that no row begins with.
    """
    asked = [name.strip() for name in (names or "").split(",") if name.strip()]
    for name in asked:
        if not any(row.startswith(name) for row in there):
            raise ValueError(f"unknown row {name!r}; there are {'; '.join(there)} (their beginnings are enough)")
    return [row for row in there if not asked or row.startswith(tuple(asked))]
