"""Trainings of a recipe that benches compare: each in a process of its own, with the server of its row."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import sys
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig

from bench.common.harness import Bench, Flags
from bench.common.report import Row
from bench.common.servers import Server, environment, visible_device
from bench.contenders import trl_asynchronous
from bench.contenders.lockstep import Lockstep, end_run
from bench.contenders.trl_merged_weights import TrlMergedWeights
from bench.race.figures import mean_curve
from bench.step.figures import ASYNCHRONOUS, TRL
from learner.commands.config_file import read_config_file
from learner.commands.up_recipe import RECIPES
from learner.demo.model import ensure_demo_model
from learner.utils.ports import free_port
from learner.utils.processes import ProcessGroup
from shared.weights import served_rank

COLORS = ("#2f6fb0", "#c0392b", "#3a8f4d", "#e08a2c", "#8b5fbf", "#8c8c8c", "#17a2b8")
#: Tokens of a question.
PROMPT_TOKENS = 512
#: Arguments of the recipe's task, on top of its own.
TASKS: Mapping[str, Mapping[str, Any]] = {
    "recipe": {},
    "two-digit": {"min_digits": 2, "max_digits": 2},
    "three-terms": {"min_terms": 3, "max_terms": 3},
}


@dataclass(frozen=True)
class Training:
    """A row, and the training that it is of.

    Attributes:
        name: of its folder.
        apply: of our server; None: a trainer of TRL, with a server of its own.
        words: options of `learner train`, on top of the recipe's.
    """

    name: str
    about: Row
    apply: str | None
    words: tuple[str, ...]

    @property
    def server(self) -> str:
        """Name of its server. Each training of TRL has one of its own.

        That of its server mode joins an NCCL group once. Of the asynchronous trainer, the first adapters of all
        trainings have the same names, by which vLLM caches prefixes.
        """
        return self.apply or self.name

    @property
    def peer(self) -> str:
        """TRL's trainer that it is of; empty: it is ours."""
        return "" if self.apply else str(self.about["row"])


class Started:
    """A training whose process imports what it needs, and begins when it is told to."""

    def __init__(self, training: Training, folder: Path, asked: Row, env: Mapping[str, str], cores: list[int]) -> None:
        self.training, self.began = training, 0.0
        self._asked, self._answered, self._go = (folder / name for name in ("training.json", "answer.json", "go"))
        self.log = folder / "learner.log"
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self._answered, self._go):
            path.unlink(missing_ok=True)
        self._asked.write_text(json.dumps(asked))
        files = map(str, (self._asked, self._answered, self._go))
        command = [sys.executable, "-m", "bench.race.learner", *files]
        self.group = ProcessGroup(command, env, self.log, cores=cores or None)

    def go(self) -> None:
        """Let it begin."""
        if not self.began:
            self.began = time.monotonic()
            self._go.touch()

    def is_over(self, limit_s: float) -> bool:
        """Whether it has ended, or must be ended."""
        return self.group.process.poll() is not None or time.monotonic() > self.began + limit_s

    def answer(self) -> dict[str, Any]:
        """Return the figures; raises RuntimeError if there are none."""
        status = self.group.process.poll()
        self.group.end()
        if status != 0:
            how = "was not done in time" if status is None else f"ended with status {status}"
            raise RuntimeError(f"the learner {how}; log {self.log}: ...{self.log.read_text(errors='replace')[-600:]}")
        return dict(json.loads(self._answered.read_text()))


class TrainingsBench(Bench):
    """A row for every training.

    Attributes:
        recipe: options of `learner train` for all rows.
        batch: completions of a step.
        learners: at once, on the learner's device.
    """

    standard = "plot only learner-gpu server-gpu server-flags deadline-s"
    flags: ClassVar[Flags] = {
        "--config": (str(RECIPES / "demo-gpu.yaml"), "a recipe; its server's flags do not count"),
        "--model": ("", "its directory; without it the demo's model"),
        "--train-flags": ("", "further options of learner train for all rows, in one string"),
        "--task": ("recipe", f"one of {', '.join(TASKS)}: the recipe's task, or a variant of it"),
        "--batch": (0, "completions of a step; 0: the recipe's"),
        "--seeds": ("42,43,44", "each with every row"),
        "--eval-every": (5, "steps between two evaluations"),
        "--eval-size": (128, "held-out questions, greedy"),
        "--row-limit-s": (300.0, "end a training that takes longer"),
        "--work-dir": (Path, "keeps everything; trainings that are done there are not repeated"),
    }
    same = ("model", "config", "train_flags", "task", "batch", "eval_every", "eval_size")
    figure = "points"
    told = "{before:.3f} -> {after:.3f} right, {seconds:.0f} s"

    def check(self) -> None:
        super().check()
        self.numbers("seeds")
        self.at_least(1, "eval_every", "eval_size")
        if self.options.task not in TASKS:
            raise ValueError(f"unknown task {self.options.task!r}; there are {', '.join(TASKS)}")
        self.recipe = read_config_file(self.options.config)
        self.batch = self.options.batch or int(self.recipe["per_device_train_batch_size"])

    @property
    def model_name(self) -> str:
        """Name of the model."""
        return Path(self.options.model).name if self.options.model else "SmolLM2-135M-Instruct"

    @property
    def learners(self) -> int:
        """Trainings at once."""
        return 1

    @abstractmethod
    def trainings(self) -> list[Training]:
        """Return all trainings, the most important first."""

    def training(self, about: Row, apply: str | None, *words: str) -> Training:
        """Return the training of a row."""
        return Training(re.sub(r"[^\w.]+", "-", "-".join(map(str, self.key(about)))), about, apply, words)

    def run(self) -> None:
        """Run the trainings that are not done yet, in their order."""
        self.dtype = str(self.recipe.get("dtype") or "float32")
        self.model = Path(self.options.model).absolute() if self.options.model else ensure_demo_model(dtype=self.dtype)
        cores = sorted(os.sched_getaffinity(0)) if self.device == "cpu" else []
        self.cores = cores[len(cores) // 2 :]  # of the learner: on shared cores both would take time from each other
        waiting = []
        for training in self.trainings():
            done = self.done(training)
            if done:
                self.add(training.about, done)
            else:
                waiting.append(training)
        starts = {each.server: functools.partial(self.start, each, waiting) for each in reversed(waiting)}
        abouts = {name: [each.about for each in waiting if each.server == name] for name in starts}
        with self.servers(dict(reversed(starts.items())), lambda name: abouts[name]) as servers:
            self.race([training for training in waiting if training.server in servers], servers)

    def start(self, training: Training, waiting: Sequence[Training]) -> Server:
        """Start the server of a training, with room for all that it is asked for at once."""
        sequences = min(2 * self.learners * self.batch, 64 if self.device == "cpu" else 1024)
        rank = served_rank(int(self.recipe.get("lora_r") or 16))
        length = PROMPT_TOKENS + int(self.recipe.get("max_completion_length") or 256)
        # Room for all: vLLM 0.26's engine has ended where requests of proofs had to make room for others.
        setting = self.setting(length, sequences, sequences * length * kv_bytes(self.model))
        work = self.work / f"server-{training.server}"
        work.mkdir(parents=True, exist_ok=True)
        everyone = os.sched_getaffinity(0)
        os.sched_setaffinity(0, everyone - set(self.cores) or everyone)  # its processes have the same
        try:
            if training.peer == ASYNCHRONOUS:
                bound = int(training.about["max_staleness"])
                return trl_asynchronous.serve(replace(setting, work=work), self.model, rank, max_staleness=bound)
            if training.apply is None:
                return TrlMergedWeights(replace(setting, work=work)).start(self.model, rank)
            slots = 1 + max(int(each.about.get("max_staleness") or 0) for each in waiting)
            more = ["--apply", training.apply, "--slots-per-run", str(max(2, slots))]
            more += ["--max-runs", str(self.learners)] if training.apply != "merge" else []
            own = replace(setting, work=work, engine_flags=(*setting.engine_flags, *more))
            return Lockstep(own).start(self.model, rank)
        finally:
            os.sched_setaffinity(0, everyone)

    def race(self, waiting: list[Training], servers: Mapping[str, Server]) -> None:
        """Run trainings, `learners` at once, the next one ready to begin where that takes nobody's cores."""
        ahead, started = 0 if self.device == "cpu" else 1, list[Started]()
        try:
            while waiting or started:
                while waiting and len(started) < self.learners + ahead and not self.late():
                    training = waiting.pop(0)
                    with self.failure_kept(training.about):
                        started.append(self.begin(training, servers[training.server]))
                if self.late():
                    for idle in [one for one in started if not one.began]:
                        idle.group.end()
                        started.remove(idle)
                        waiting.append(idle.training)
                    for training in waiting:
                        with self.failure_kept(training.about):
                            self.in_time()
                    waiting = []
                for one in started[: self.learners]:
                    one.go()
                for one in [one for one in started if one.began]:
                    server = servers[one.training.server]
                    # A learner would wait for a server that has ended to come back.
                    if not (one.is_over(self.options.row_limit_s) or server.has_ended()):
                        continue
                    started.remove(one)
                    with self.failure_kept(one.training.about, server=server):
                        if server.has_ended():
                            one.group.end()
                            raise RuntimeError("its server has ended")
                        try:
                            self.add(one.training.about, self.kept(one.training, one.answer()))
                        except RuntimeError:
                            if one.training.apply:
                                end_run(server.url, self.output(one.training))
                            raise
                time.sleep(0.05)
        finally:
            for one in started:
                one.group.end()

    def begin(self, training: Training, server: Server) -> Started:
        """Start the process of a training."""
        words = [*self.words(training), "--model_name_or_path", str(self.model)]
        words += ["--output_dir", str(self.output(training))]
        if training.peer == TRL:
            words += ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", server.url]
            words += ["--vllm_group_port", str(free_port())]
        words += ["--rollout_url", server.url]
        asked = {"words": words, "peer": training.peer}
        asked |= {name: getattr(self.options, name) for name in ("eval_every", "eval_size")}
        device = None if self.device == "cpu" else visible_device(int(self.device.removeprefix("cuda:")))
        threads = len(self.cores) or max(1, (os.cpu_count() or 1) // (2 * (self.learners + 1)))
        env = environment(device, {"OMP_NUM_THREADS": str(threads)})
        return Started(training, self.work / training.name, asked, env, self.cores)

    def output(self, training: Training) -> Path:
        """Return the folder of a training's lease and logs."""
        return self.work / training.name / "trainer"

    def words(self, training: Training) -> list[str]:
        """Return the options of a training that do not differ between machines and runs."""
        options, task_args = self.options, self.recipe.get("task_args") or {}
        words = ["--config", options.config, "--task_args", json.dumps({**task_args, **TASKS[options.task]})]
        settings = {"eval_strategy": "no", "eval_on_start": "false", "save_strategy": "no", "report_to": "none"}
        settings |= {"logging_steps": "1", "disable_tqdm": "true", "proof_canary": "false"}
        settings |= {"per_device_train_batch_size": str(self.batch)}
        words += [word for name, value in settings.items() for word in (f"--{name}", value)]
        words += ["--use_cpu", "true"] if self.device == "cpu" else []
        return [*words, *training.words, *shlex.split(options.train_flags)]

    def done(self, training: Training) -> dict[str, Any] | None:
        """Return the figures of a training that was run with the same options; None: there are none."""
        path = self.work / training.name / "row.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        return dict(kept["row"]) if kept.get("settings") == self.settings(training) else None

    def settings(self, training: Training) -> dict[str, Any]:
        """Return what figures of a training depend on, as JSON holds it."""
        sizes = [self.options.eval_every, self.options.eval_size]
        found = {
            "recipe": self.recipe,
            "words": self.words(training),
            "eval": sizes,
            "devices": self.machine["devices"],
            "versions": self.machine["versions"],
            "model": self.options.model or self.model_name,
            "server": [training.apply, self.options.server_flags],
        }
        return dict(json.loads(json.dumps(found)))

    def kept(self, training: Training, answer: dict[str, Any]) -> dict[str, Any]:
        """Return an answer as a row's figures, after keeping them."""
        first, last = answer["points"][0], answer["points"][-1]
        row = answer | {"before": first["accuracy"], "after": last["accuracy"], "seconds": last["seconds"]}
        kept = {"settings": self.settings(training), "row": row}
        (self.work / training.name / "row.json").write_text(json.dumps(kept))
        return row


def kv_bytes(model: Path) -> int:
    """Return the bytes that a model holds of a token in its key-value cache, in 16 bits."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_hidden_layers * config.num_key_value_heads * size)


def draw_band(axes: Any, rows: Sequence[Row], key: str, color: str, label: str) -> None:
    """Draw the mean curve of rows, with a standard deviation above and below it."""
    curve = [asdict(band) for band in mean_curve([row["points"] for row in rows])]
    x, y, spread = ([band[name] for band in curve] for name in (key, "accuracy", "deviation"))
    low, high = ([a + sign * b for a, b in zip(y, spread, strict=True)] for sign in (-1, 1))
    axes.plot(x, y, color=color, linewidth=1.6, marker=".", markersize=4, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
