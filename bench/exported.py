"""Greedy answers of exported adapters beside those of the served policy.

python -m bench.exported --model DIR --adapter runs/demo                  # on the CPU, some minutes
python -m bench.exported --model DIR --adapter runs/demo --device 0       # on a GPU

A rollout server serves the adapter, `vllm serve` the merged model, and another one the base with `--lora-modules`: one
after the other, with the same engine flags and the same questions as chat.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from bench.common.report import machine
from bench.common.servers import Server, environment, free_port
from bench.contenders.vllm_adapter_files import vllm_serve
from learner.adapters.stored import open_adapter
from learner.commands.export import export
from learner.evaluation.temporary_run import temporary_run
from learner.servers.client import RolloutClient
from learner.tasks import load_task
from learner.utils.processes import stop_on_signals

SERVED, MERGED, LORA = "rollout server", "vllm serve, merged", "vllm serve, --lora-modules"
START_S = 600.0
AT_A_TIME = 16
Answers = list[tuple[int, ...]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Answers the exit code."""
    options = _parser().parse_args(argv)
    rank = max(module.rank for module in open_adapter(options.adapter).modules.values())
    task = load_task(options.task, task_args=json.loads(options.task_args), eval_size=options.questions)
    questions = [task.eval[i]["prompt"] for i in range(len(task.eval))]
    lora = ["--max-lora-rank", str(next(size for size in (8, 16, 32, 64, 128, 256) if size >= rank))]
    flags = ["--dtype", options.dtype, "--max-model-len", "512", "--max-num-seqs", "64", "--enforce-eager"]
    with stop_on_signals(), tempfile.TemporaryDirectory(prefix="lockstep-exported-") as scratch:
        folder = Path(scratch)
        for name in ("merged", "adapter"):
            export(options.adapter, folder / name, merged=name == "merged", model=options.model, dtype=options.dtype)

        def run(row: str, command: list[str], model: str | None) -> Answers:
            port = free_port()
            server = Server(
                row,
                [*command, "--port", str(port), *flags],
                port,
                folder / f"{len(row)}.log",
                environment(options.device),
                ready="/health" if model else "/ready",
            )
            try:
                server.wait_ready(START_S)
                if model:
                    return ask(server.url, model, questions)
                with RolloutClient(server.url) as client, temporary_run(client, open_adapter(folder / "adapter")) as it:
                    return ask(server.url, f"policy:{it.run_id}", questions)
            finally:
                server.end()

        python = [sys.executable, "-m"]
        answers = {
            SERVED: run(SERVED, [*python, "rollout_server.cli", options.model, *lora], None),
            MERGED: run(MERGED, [*python, *vllm_serve(folder / "merged"), "--served-model-name", "merged"], "merged"),
            LORA: run(
                LORA,
                [
                    *python,
                    *vllm_serve(Path(options.model)),
                    "--enable-lora",
                    *lora,
                    "--lora-modules",
                    f"mine={folder / 'adapter'}",
                ],
                "mine",
            ),
        }
    print(
        json.dumps(
            {
                "machine": machine([options.device or "cpu"], " ".join(sys.argv)),
                "dtype": options.dtype,
                **compared(answers),
            },
            indent=1,
        )
    )
    return 0


def ask(url: str, model: str, questions: list[Any]) -> Answers:
    """Token ids of the greedy answer to each question."""

    def one(messages: list[dict[str, str]]) -> tuple[int, ...]:
        body = {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": 24, "return_token_ids": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300.0)
        answer.raise_for_status()
        return tuple(answer.json()["choices"][0]["token_ids"])

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(one, questions))


def compared(answers: dict[str, Answers]) -> dict[str, Any]:
    """How many answers, and how many tokens at the same place, are the rollout server's."""
    reference = answers[SERVED]
    return {
        row: {
            "questions": len(reference),
            "equal_answers": sum(a == b for a, b in zip(own, reference, strict=True)),
            "equal_first_tokens": sum(a[:1] == b[:1] for a, b in zip(own, reference, strict=True)),
            "different_answers": len(set(own)),
        }
        for row, own in answers.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.exported", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="the base model's directory")
    add("--adapter", required=True, help="a run's output_dir or a PEFT directory")
    add("--dtype", default="bfloat16", help="of all servers and of the merged model")
    add("--device", help="GPU (default: the CPU)")
    add("--questions", type=int, default=64)
    add("--task", default="reasoning_gym:chain_sum")
    add(
        "--task-args",
        help="as JSON; default: the demo's",
        default=json.dumps(
            {
                "min_terms": 2,
                "max_terms": 2,
                "min_digits": 1,
                "max_digits": 1,
                "partial_credit": False,
                "system_prompt": "Reply with the result only.",
            }
        ),
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
