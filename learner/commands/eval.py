"""`learner eval`: score and compare policies on a task, over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence, Sized
from dataclasses import replace
from pathlib import Path

from learner.adapters.stored import StoredAdapter, open_adapter
from learner.agents.calls import agent_of
from learner.agents.rewards import agent_reward
from learner.commands.flags import Parser, either_spelling, number
from learner.config import json_object
from learner.evaluation.agents import evaluate_agent
from learner.evaluation.evaluate import evaluate
from learner.evaluation.results import EvalResult, comparison_document, comparison_table
from learner.evaluation.temporary_run import temporary_run
from learner.servers.client import RolloutClient
from learner.servers.credentials import read_token
from learner.utils.atomic import check_writable, write_atomically
from learner.utils.logs import show_messages
from learner.utils.processes import Stopped, stop_on_signals
from shared.errors import InvalidRequest
from shared.messages import one_line
from shared.rollouts import PolicySelector
from shared.sampling import SamplingParams
from shared.sessions import MOST_CALLS, MOST_TOKENS


def main(argv: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    options = make_parser().parse_args(argv)
    try:
        task_args = json_object(options.task_args, "--task-args")
        chat_kwargs = json_object(options.chat_template_kwargs, "--chat-template-kwargs")
        sampling = SamplingParams(
            n=options.n, temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens
        )
    except ValueError as error:
        raise InvalidRequest(one_line(error)) from error
    agent = agent_of(options.agent, options.agent_command)
    if agent and chat_kwargs:
        raise InvalidRequest("--chat-template-kwargs with an agent: set it in the agent's requests")
    policies = {name: None if name in ("base", "latest") else open_adapter(name) for name in options.policy}
    from learner.tasks import load_task

    task = load_task(
        options.task,
        task_args=task_args,
        eval_size=options.eval_size,
        train_size=options.train_size,
        seed=options.seed,
        reward_specs=options.reward_funcs,
        reward_weights=options.reward_weights,
        prompt_column=options.prompt_column,
        eval_dataset=options.eval_dataset,
        default_reward=agent_reward if agent else None,
    )
    if not task.reward_funcs:
        raise InvalidRequest(
            f"{task.name} has no reward functions to score completions with (an environment's reward needs its tools "
            "and TRL): name some with --reward-funcs, or another task"
        )

    held_out = len(task.eval) if isinstance(task.eval, Sized) else None
    if options.limit and held_out and held_out < options.limit:
        more = "a larger --eval-dataset" if options.eval_dataset else "--eval-size, as in training, or --eval-dataset"
        print(f"learner eval: --limit {options.limit}: {held_out} are there ({more} gives more)", file=sys.stderr)

    def ask(client: RolloutClient, name: str, stored: StoredAdapter | None) -> EvalResult:
        policy: PolicySelector = "base" if name == "base" else "latest"
        run_id = options.run_id
        with contextlib.ExitStack() as stack:
            if stored is not None:
                version = stack.enter_context(temporary_run(client, stored))
                policy, run_id = version, version.run_id
            if agent:
                result = evaluate_agent(
                    client,
                    task,
                    agent,
                    policy=policy,
                    run_id=run_id,
                    n_questions=options.limit,
                    sampling=sampling,
                    concurrency=options.agent_concurrency,
                    timeout_s=options.agent_timeout_s,
                    max_calls=options.agent_max_calls,
                    max_tokens=options.agent_max_tokens,
                    patience_s=options.ready_timeout_s,
                    ca_file=options.ca_file,
                    progress=_show,
                )
            else:
                result = evaluate(
                    client,
                    task,
                    policy=policy,
                    run_id=run_id,
                    n_questions=options.limit,
                    sampling=sampling,
                    chat_template_kwargs=chat_kwargs,
                    progress=_show,
                )
        return replace(result, policy=name)

    token = read_token(options.token_file)
    if options.json:
        check_writable(options.json, "--json")
    show_messages(is_main=True, stream=sys.stderr)
    try:
        with stop_on_signals(), RolloutClient(options.rollout_url, token, ca_file=options.ca_file) as client:
            client.wait_ready(options.ready_timeout_s)
            results = [ask(client, name, stored) for name, stored in policies.items()]
    except Stopped as stopped:  # the temporary run has ended by now
        raise KeyboardInterrupt from stopped
    print(f"{task.name}, {results[0].questions} questions, mean reward with 95% intervals")
    print("\n".join(comparison_table(results)))
    if options.json:
        document = json.dumps(comparison_document(results), indent=2, allow_nan=False)
        write_atomically(Path(options.json), document + "\n")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Flags of `learner eval`."""
    parser = Parser(prog="learner eval", description=__doc__)
    add = either_spelling(parser)
    add("--rollout-url", required=True, help="URL of the rollout server")
    add("--task", required=True, help="reasoning_gym:NAME, a JSONL file, a hub dataset, or module:object")
    add("--task-args", help="parameters of the task, as JSON")
    add("--eval-dataset", help="another task or file to evaluate on")
    add("--prompt-column", default="prompt", help="column that holds the prompt")
    add("--reward-funcs", nargs="+", help="reward functions by import path, module:function")
    add("--reward-weights", nargs="+", type=number(), help="one weight for each reward function")
    add(
        "--eval-size",
        type=number(int, 0),
        help="questions held out; as in training (default 128, or with --eval-dataset all that it has)",
    )
    add("--train-size", type=number(int, 1), help="training questions; as in training, where the split depends on it")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of the split; as in training (default %(default)s)")
    add("--limit", type=number(int, 1), help="ask only the first so many of these questions")
    add(
        "--policy",
        nargs="+",
        default=["latest"],
        metavar="POLICY",
        help="base, latest, or a stored adapter: a run's output_dir, a checkpoint, a PEFT directory, served in a run "
        "of its own meanwhile. Several are compared with the first (default latest)",
    )
    add("--run-id", help="which run, where the server serves several")
    add("--n", type=number(int, 1), default=1, help="completions per question (default %(default)s)")
    add("--temperature", type=number(float, 0), default=0.0, help="0 is greedy (default %(default)s)")
    add(
        "--top-p",
        type=number(float, above=0, most=1),
        default=1.0,
        help="share of the probability that is sampled from (default %(default)s)",
    )
    add("--max-tokens", type=number(int, 1), default=256, help="per completion (default %(default)s)")
    add("--agent", help="agent by import path, module:function, which returns its reward; see docs/agents.md")
    add("--agent-command", help="agent that is a program, a shell command that writes its reward")
    add("--agent-concurrency", type=number(int, 1), default=32, help="episodes at a time (default %(default)s)")
    add("--agent-timeout-s", type=number(float, above=0), default=600.0, help="of an episode (default %(default)s)")
    for name, default, most in (("calls", 256, MOST_CALLS), ("tokens", 2**17, MOST_TOKENS)):
        of_episode = "of an episode (default %(default)s)"
        add(f"--agent-max-{name}", type=number(int, 1, most), default=default, help=of_episode)
    add("--chat-template-kwargs", help="for the server's chat template, as JSON")
    add("--json", help="write results, differences, and every question and answer to this file")
    add("--token-file", help="bearer token for the server (default: $LOCKSTEP_TOKEN)")
    add("--ca-file", help="certificate (PEM) of the CA that the server's certificate is from")
    add(
        "--ready-timeout-s",
        type=number(float, 0),
        default=60.0,
        help="wait so long for the server (default %(default)s)",
    )
    return parser


def _show(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} questions", end="\n" if done == total else "", file=sys.stderr, flush=True)
