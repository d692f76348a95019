"""Wrong flags and files of every command: exit code 2, and one line that names the option."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

import learner.commands.train
from learner.cli import main
from learner.cluster import connection
from learner.commands.config_file import read_config_file
from learner.commands.train import parse
from learner.demo.__main__ import main as demo
from learner.demo.__main__ import parse as parse_demo
from tests.unit.learner.commands.test_train import TASK

REWARD = "learner.tasks.rewards:exact_match"
EVAL = ["eval", "--rollout-url", "http://127.0.0.1:9", "--task", TASK]


@pytest.fixture
def run_yaml(model_dir, tmp_path, monkeypatch):
    """Write a run that could begin, with more lines, and start it; no server is ever awaited."""

    def awaited(config):
        raise AssertionError("servers were awaited")

    monkeypatch.setattr(learner.commands.train, "meet", awaited)
    options = {
        "rollout_url": "http://127.0.0.1:9",
        "task": TASK,
        "model_name_or_path": str(model_dir),
        "output_dir": str(tmp_path / "out"),
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "lora_target_modules": "all-linear",
    }

    def run(text, *flags):
        replaced = {line.partition(":")[0].replace("-", "_") for line in text.splitlines()}
        lines = [f"{name}: {value}" for name, value in options.items() if name not in replaced]
        file = tmp_path / "run.yaml"
        file.write_text("\n".join([*lines, text]))
        return main(["train", "--config", str(file), *flags])

    return run


def the_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # types
        ("lora_r: 8.0", "lora_r: '8.0' is not a whole number"),
        ("lora_r: eight", "lora_r: 'eight' is not a whole number"),
        ("lora_r: true", "lora_r: 'true' is not a whole number"),
        ("lora_r:", "lora_r: has no value"),
        ("lora_r: null", "lora_r: has no value"),
        ("lora_r: [8, 16]", "lora_r: takes one value, not a list"),
        ("lora_r: {q_proj: 8}", "lora_r: takes one value, not nested keys"),
        ("learning_rate: 1e-6x", "learning_rate: '1e-6x' is not a number"),
        ("learning_rate: .nan", "learning_rate"),
        ("learning_rate: nan", "learning_rate: 'nan' is not a number"),
        ("learning_rate: inf", "learning_rate: 'inf' is not a finite number"),
        ("learning_rate: -1e999", "learning_rate: '-1e999' is not a finite number"),
        ("beta: .inf", "beta"),
        ("max_grad_norm: nan", "max_grad_norm: 'nan' is not a number"),
        ("reward_weights: [1.0, nan]", "reward_weights"),
        ("reward_weights: [.inf, 1.0]", "reward_weights"),
        ("generation_kwargs: {repetition_penalty: .nan}", "repetition_penalty"),
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: '{\"min_lr\": Infinity}'",
            "lr_scheduler_kwargs inf",
        ),
        ("optim: rmsprop\noptim_args: eps=nan", "optim_args.*nan"),
        ('lora_kwargs: \'{"alpha_pattern": {"q_proj": NaN}}\'', "q_proj nan: give a finite number"),
        ("bf16: maybe", "bf16"),
        ("task: [a, b]", "task: takes one value, not a list"),
        ("task: {name: a}", "task: takes one value, not nested keys"),
        ("reward_funcs: {a: b}", "reward_funcs: takes a list, not nested keys"),
        ("reward_funcs: [[a:b], c:d]", "reward_funcs: each item"),
        ("reward_weights: [1.0, one]", "reward_weights: 'one' is not a number"),
        ("task_args: 5", "task_args must be a JSON object"),
        ("task_args: [1]", "task_args"),
        ("task_args: '{\"a\":'", "task_args is not valid JSON"),
        ("generation_kwargs: '{\"a\":'", "generation_kwargs: not valid JSON"),
        ("generation_kwargs: '[1]'", "generation_kwargs: must be a JSON object"),
        ("model_init_kwargs: text", "model_init_kwargs: not valid JSON"),
        ("generation_kwargs: {ignore_eos: no}", "no may be text or a boolean"),
        ("generation_kwargs: {temprature: 1}", "temprature"),
        ("generation_kwargs: {top_k: many}", "top_k"),
        ("env: [A, B]", "env must hold one"),
        ("env: {A: [1, 2]}", "line .*: env: A must be text"),
        ("env:\n  A:", "env: A must be text: write one value, or"),
        ("env: {[A]: b}", "env: .*'A'.* cannot be set"),
        ("task_args: {1: 2, true: 3}", "the name true must be text"),
        ("task_args: {1: 2, +1: 3}", "the name [+]1 must be text"),
        ('env: {"A=B": 1}', "env: 'A=B' cannot be set"),
        ('env: {"": 1}', "env: '' cannot be set"),
        ('env: {A: "x\\0"}', "env: 'A' cannot be set"),
        # words
        ("eval_strategy: off", "eval_strategy: 'off' is not one of no, steps, epoch"),
        ("eval_strategy: false", "eval_strategy: 'false' is not one of no, steps, epoch"),
        ("dtype: bfloat61", "dtype: 'bfloat61' is not one of auto, bfloat16"),
        ("dtype: int8", "dtype"),
        ("lr_scheduler_type: linaer", "lr_scheduler_type"),
        ("optim: adam", "optim: 'adam' is not one of"),
        ("transport: carrier_pigeon", "transport: 'carrier_pigeon' is not one of auto, http"),
        ("loss_type: gpro", "loss_type: 'gpro' is not one of grpo"),
        ("scale_rewards: sometimes", "scale_rewards: 'sometimes' is not one of group, batch, none"),
        ("importance_sampling_level: word", "importance_sampling_level"),
        ("attn_implementation: fast", "attn_implementation"),
        # names
        ("lerning_rate: 1", "there is no option lerning_rate: did you mean learning_rate?"),
        ("lora-rr: 1", "there is no option lora_rr: did you mean lora_r?"),
        ("nothing_of_the_kind: 1", "there is no option nothing_of_the_kind\\b"),
        ("training: {learning_rate: 1}", "there is no option training"),
        ("1: 2", "there is no option 1"),
        ("? [a, b]\n: 2", "the name of an option must be text"),
        ("lora_r: 8\nlora_r: 16", "lora_r is there twice"),
        ("lora_r: 8\nlora-r: 16", "lora_r is there twice"),
        ("task_args: {a: 1, a: 2}", "a is there twice"),
        ("lora_kwargs: {rank_patern: {}}", "lora_kwargs: peft.LoraConfig has no rank_patern"),
        ("lora_kwargs: {rank_pattern: 5}", "LoRA settings"),
        (
            "lora_kwargs: {rank_pattern: {q_proj: 4, q_prj: 8}}",
            "lora_kwargs.rank_pattern: no adapted layer is called 'q_prj'; there are q_proj, k_proj",
        ),
        (
            "lora_target_modules: [k_proj]\nlora_kwargs: {alpha_pattern: {'layers.[01].*q_proj': 8}}",
            "alpha_pattern: no adapted layer is called 'layers.*; there are k_proj",
        ),
        ("lora_kwargs: {layers_pattern: 5}", "LoRA settings .*layers_pattern"),
        ("lora_kwargs: {task_type: 5}", "LoRA settings"),
        ("lora_task_type: X", "lora_task_type"),
        ("lr_scheduler_kwargs: {nope: 1}", "lr_scheduler_kwargs.*nope"),
        ("lr_scheduler_type: cosine_with_min_lr", "lr_scheduler_kwargs"),
        (
            "lr_scheduler_type: constant\nlr_scheduler_kwargs: {min_lr: 1e-7}",
            "min_lr has no effect",
        ),
        (
            "lr_scheduler_type: constant_with_warmup\nlr_scheduler_kwargs: {a: 1}",
            "kwargs.* a has no effect",
        ),
        ("seed: 99999999999999999999", "seed"),
        ("lora_target_modules: q_prj", "lora_target_modules: the model has no q_prj; its linear layers are q_proj"),
        ("lora_target_modules: [q_proj, nope]", "lora_target_modules: the model has no nope; .*, up_proj"),
        ("lora_target_modules: q_proj,v_proj", "lora_target_modules: the model has no q_proj,v_proj"),
        ("lora_target_modules: '(q_proj'", "lora_target_modules: .* no regular expression"),
        ("lora_target_modules: '.*nope'", "lora_target_modules: the model has no"),
        ("task_args:\nper_device_train_batch_size: 128", "8 prompts, and one generation batch takes 16"),
        # range
        ("lora_r: 0", "lora_r: 0 is out of range: must be at least 1"),
        ("lora_r: -4", "lora_r"),
        ("lora_alpha: 0", "lora_alpha"),
        ("lora_dropout: 1.5", "lora_dropout"),
        ("temperature: -1", "temperature"),
        ("top_entropy_quantile: 20", "top_entropy_quantile"),
        ("temperature: 0", "temperature=0"),
        ("top_p: 1.5", "top_p"),
        ("top_p: 0", "top_p"),
        ("num_generations: 1", "num_generations"),
        ("num_generations: 0", "num_generations"),
        ("num_generations: 7", "num_generations"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size"),
        ("gradient_accumulation_steps: 0", "gradient_accumulation_steps"),
        ("max_completion_length: 0", "max_completion_length"),
        ("max_steps: -2", "max_steps"),
        ("max_steps: 0", "max_steps=0.*at least one step"),
        ("num_train_epochs: 0", "num_train_epochs=0.*at least one step"),
        ("save_steps: 0", "save_steps"),
        ("logging_steps: -1", "logging_steps"),
        ("learning_rate: -1", "learning_rate"),
        ("seed: -1", "seed"),
        ("metrics_port: 70000", "metrics_port"),
        ("max_staleness: -1", "max_staleness"),
        ("proof_tolerance: -1", "proof_tolerance"),
        ("proof_every: -1", "proof_every"),
        ("eval_size: -1", "eval_size"),
        ("train_size: 0", "train_size"),
        ("ready_timeout_s: inf", "ready_timeout_s"),
        ("push_timeout_s: 0", "push_timeout_s"),
        ("reward_workers: -1", "reward_workers"),
        ("agent_backend: slurm", "agent_backend"),
        ("agent_backend: ray", "agent_backend ray: there is no agent"),
        ("agent_resources: {CPU: 4}", "set agent_backend to ray"),
        ("agent_backend: ray\nagent_resources: {CPU: many}", "agent_resources: CPU is 'many'"),
        ("reward_backend: slurm", "reward_backend"),
        ("reward_backend: ray\nreward_workers: 0", "reward_backend ray: reward_workers 0"),
        ("reward_resources: {CPU: 4}", "set reward_backend to ray"),
        ("reward_backend: ray\nreward_resources: {CPU: many}", "reward_resources: CPU is 'many'"),
        ("degenerate_rounds: 0", "degenerate_rounds"),
        ("run_id: a/b", "run_id"),
        # what is on this machine, before servers are awaited
        ("task: nowhere.jsonl\nreward_funcs: tests.support.rewards:reward_odd", "no file nowhere.jsonl"),
        ("task: reasoning_gym:chain_sum\nreward_funcs: tests.support.rewards:odd", "tests.support.rewards"),
        ("num_generations: none", "num_generations"),
        ("task: reasoning_gym:chain_smu", "chain_smu"),
        ("task: tests.unit.learner.commands.test_train:tsak", "tsak"),
        ("rollout_url: 127.0.0.1:9", "rollout_url"),
        ("rollout_url: file:/nowhere", "rollout_url"),
        ("rollout_url: []", "--rollout_url"),
        ("model_name_or_path: /nowhere/at/all", "model_name_or_path"),
        ("model_name_or_path:", "model_name_or_path"),
        ("tools: no.such:tool", "no.such:tool"),
        ("environment: no.such:Class", "no.such:Class"),
        ("token_file: /nowhere", "token_file"),
        ("ca_file: /nowhere", "ca_file"),
        ("init_adapter: /nowhere", "init_adapter"),
        ("resume_from_checkpoint: /nowhere", "resume_from_checkpoint"),
        ("output_dir: /dev/null/x", "output_dir"),
        ("push_to_hub: true", "push_to_hub"),
        ("optim: lomo", "optim lomo.*install `lomo_optim`"),
        ("optim_args: nope", "optim_args"),
        ("optim_args: eps=1e-6,foo=1", "transformers ignores eps, foo in optim_args; .* reads nothing from there"),
        (
            "optim: sgd\noptim_args: momentum=0.9,momentun=0.9",
            "ignores momentun in optim_args; .* reads momentum, dampening, weight_decay, nesterov ",
        ),
        ("optim: adamw_anyprecision", "optim adamw_anyprecision.*torchdistx"),
        ("optim: sgd\noptim_args: momentum=abc", "optim sgd.*optim_args.*abc"),
        ("adam_beta1: 2", "adam_beta1.*beta parameter at index 0: 2"),
        ("adam_epsilon: -1", "adam_epsilon.*epsilon value: -1"),
        ("dataloader_persistent_workers: true", "dataloader_num_workers.*persistent_workers"),
        ("accelerator_config: {dispatch_batches: true}", "dispatch_batches: .*text.*leave it out"),
        ("gradient_checkpointing_kwargs: {foo: 1}", "gradient_checkpointing_kwargs: .*foo"),
        (
            'lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: \'{"num_cycles": "x"}\'',
            "lr_scheduler_type cosine_with_restarts: .*'x'",
        ),
        (
            "eval_on_start: true\ntask: reasoning_gym:chain_sum\neval_size: 0",
            "eval_on_start: there are no rows to evaluate on",
        ),
        (
            "eval_strategy: steps\neval_steps: 1\ntask: reasoning_gym:chain_sum\neval_size: 0",
            "eval_strategy: there are no rows",
        ),
        (
            "eval_strategy: steps\neval_steps: 1\nsave_strategy: best\nmetric_for_best_model: eval_rewardd",
            "metric_for_best_model eval_rewardd: no evaluation measures it; did you mean eval_reward?",
        ),
        ("report_to: neptune", "report_to neptune: it is not installed"),
        ("cast_lm_head_to_fp32: true", "cast_lm_head_to_fp32"),
    ],
)
def test_train_with_a_file(run_yaml, capsys, text, words):
    assert run_yaml(text) == 2
    line = the_line(capsys)
    assert line.startswith("learner train: ")
    assert re.search(words, line), line


@pytest.mark.parametrize(
    ("kind", "text"), [("reward", "reward_backend: ray"), ("agent", "agent_backend: ray\nagent_command: my-agent")]
)
def test_a_cluster_that_is_not_there_is_refused_before_servers_are_awaited(
    run_yaml, capsys, monkeypatch, kind, text
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(connection, "import_ray", lambda: SimpleNamespace(is_initialized=lambda: False))
    assert run_yaml(text) == 2
    assert f"{kind}_backend ray: no Ray cluster at 127.0.0.1:9: " in the_line(capsys)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# nothing\n",
        b"- a\n- b\n",
        b"just text",
        b"task: [unfinished",
        b"task: a\n\tb: c",
        b"task: a: b",
        b"a: 1\n---\nb: 2\n",
        b"task: !!python/object:os.system {}\n",
        b"task: !secret x\n",
        b"task: \xff\xfe",
        bytes(range(256)),
        b"task: *nobody",
        b"[" * 100_000,
    ],
)
def test_files_that_are_no_options(tmp_path, capsys, content):
    file = tmp_path / "wrong.yaml"
    file.write_bytes(content)
    assert main(["train", "--config", str(file)]) == 2
    assert f"--config {file}" in the_line(capsys)


@pytest.mark.parametrize("path", ["/nowhere.yaml", "/", "/dev/null/x"])
def test_files_that_cannot_be_read(capsys, path):
    assert main(["train", "--config", path]) == 2
    assert f"--config {path}" in the_line(capsys)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--config"], "--config"),
        (["train", "--lora_rr", "8"], "there is no --lora_rr: did you mean --lora_r?"),
        (["train", "--lora-rr=8"], "there is no --lora-rr: did you mean --lora-r?"),
        (["train", "stray"], "stray belongs to no option: write --NAME stray"),
        (["train", "gsm8k.yaml"], "gsm8k.yaml belongs to no option: write --config gsm8k.yaml"),
        (["up", "gsm8k.yaml", "--lora_r", "8"], "write --config gsm8k.yaml"),
        (["doctor", "gsm8k.yaml"], "write --config gsm8k.yaml"),
        (["init", "gsm8k.yaml"], "gsm8k.yaml belongs to no option: write --NAME gsm8k.yaml"),
        (["train", "-x"], "there is no -x"),
        (["train", "--lora_r"], "--lora_r: expected one argument"),
        (["train", "--lora_r", "8.0"], "--lora_r: '8.0' is not a whole number"),
        (["train", "--transport", "x"], "--transport"),
        (["train", "--reward_funcs"], "--reward_funcs"),
        (["train", "--dtype", "int3"], "--dtype"),
        ([*EVAL, "--limit", "0"], "--limit: 0 is out of range: must be at least 1"),
        ([*EVAL, "--limit", "few"], "--limit: 'few' is not a whole number"),
        ([*EVAL, "--n", "0"], "--n:"),
        ([*EVAL, "--max-tokens", "-5"], "--max-tokens"),
        ([*EVAL, "--temperature", "-1"], "--temperature"),
        ([*EVAL, "--temperature", "nan"], "--temperature"),
        ([*EVAL, "--top-p", "0"], "--top-p"),
        ([*EVAL, "--eval-size", "-1"], "--eval-size"),
        ([*EVAL, "--train-size", "0"], "--train-size"),
        ([*EVAL, "--reward-weights", "one"], "--reward-weights"),
        ([*EVAL, "--policy", "/nowhere"], "/nowhere"),
        ([*EVAL, "--policy"], "--policy"),
        ([*EVAL, "--json", "/dev/null/x.json"], "--json"),
        ([*EVAL, "--json", "/"], "--json"),
        ([*EVAL, "--token-file", "/nowhere"], "token_file"),
        ([*EVAL, "--ca-file", "/nowhere"], "ca_file"),
        ([*EVAL, "--task-args", "[]"], "--task-args"),
        ([*EVAL, "--ready-timeout-s", "-1"], "--ready-timeout-s"),
        ([*EVAL, "--lmit", "1"], "there is no --lmit: did you mean --limit?"),
        (["eval", "--task", TASK], "--rollout-url"),
        (["eval", "--rollout-url", "127.0.0.1:9", "--task", TASK], "rollout_url"),
        (["export"], "source"),
        (["export", "/nowhere", "--out", "x"], "/nowhere"),
        (["export", "x", "--out", "y", "--dtype", "int8"], "--dtype"),
        ([*EVAL, "--seed", "-1"], "--seed: -1 is out of range"),
        (["status", "--run-dir", "m" * 300], "'mmm"),
        (["export", "m" * 300, "--out", "x"], "mmm... is too long for a file's name"),
        ([*EVAL, "--task", "m" * 300 + ":f", "--reward-funcs", REWARD], "mmm... is too long for a file's name"),
        (["status"], "--rollout-url"),
        (["status", "--run-dir", "/nowhere"], "run_dir"),
        (["status", "--rollout-url", "x"], "rollout_url"),
        (["status", "--watch", "0", "--run-dir", "."], "--watch"),
        (["status", "--watch", "often", "--run-dir", "."], "--watch"),
        (["four-bit-base", "x"], "--out"),
        (["trian"], "no command 'trian': did you mean train?"),
    ],
)
def test_flags(capsys, argv, words):
    assert main(argv) == 2
    assert words in the_line(capsys)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seed", "x"], "--seed"),
        (["--sede", "1"], "there is no --sede: did you mean --seed?"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml"),
        (["--output-dir", "/dev/null/x"], "--output-dir"),
        (["--server-flags", "'unfinished"], "--server-flags"),
        (["--server-flags"], "--server-flags"),
    ],
)
def test_flags_of_the_demo(capsys, argv, words):
    assert demo(argv) == 2
    assert words in the_line(capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dtype: float23", "float23"),
        ("dtype: float32\nserver: fast", "server: write one"),
        ("dtype: float32\nrollout_url: http://a:1", "rollout_url"),
        ("dtype: float32\nlora_r: many", "lora_r"),
    ],
)
def test_recipes_of_the_demo(capsys, tmp_path, text, words, monkeypatch):
    """The learner checks its own options itself."""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{text}\nuse_cpu: true\n")
    (tmp_path / "config.json").write_text("{}")
    if "float23" not in text:
        monkeypatch.setattr("learner.demo.__main__.ensure_demo_model", lambda *_, **__: tmp_path)
    assert demo(["--config", str(file), "--output-dir", str(tmp_path / "out")]) == 2
    assert words in the_line(capsys)


def test_several_flags_pass_through_the_demo():
    options = parse_demo(["--server-flags", "--seed 3 --x 'a b'", "--train-flags", "--share_gpu", "--seed", "4"])
    assert options.server_flags == ["--seed", "3", "--x", "a b"]
    assert options.train_flags == ["--share_gpu"]
    assert options.seed == 4
    options = parse_demo(["--server-flags=--a", "--server-flags", "--b 1"])
    assert options.server_flags == ["--a", "--b", "1"]


def test_what_is_meant_is_taken(tmp_path):
    """Spellings that YAML 1.1, argparse or TRL would take for something else."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "rollout-url: http://a:1\n--task: x.jsonl\nreward_funcs: mod:f\nrun_id: 007\nlearning-rate: 1e-6\n"
        "eval_strategy: no\nsave_strategy: no\ndtype: bf16\nuse_cpu: yes\nbf16: no\n"
        "lora_target_modules: q_proj\nreward_weights: 0.5\nreport_to: [none]\nscale_rewards: false\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-7}\n"
        "task_args: {since: 2024-01-01, digits: 007, share: 1e-3, on_time: true, none: null}\n"
        'generation_kwargs: \'{"stop": ["x"]}\'\ninit_adapter: null\n'
    )
    config, args, model_args = parse(["--config", str(file)])
    assert config.rollout_url == ["http://a:1"]
    assert config.task == "x.jsonl"
    assert config.reward_funcs == ["mod:f"]
    assert config.run_id == "007"
    assert config.init_adapter is None
    assert config.task_args == {
        "since": "2024-01-01",
        "digits": "007",
        "share": 1e-3,
        "on_time": True,
        "none": None,
    }
    assert args.learning_rate == 1e-6
    assert args.eval_strategy == "no"
    assert args.scale_rewards == "none"
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-7}
    assert args.reward_weights == [0.5]
    assert args.generation_kwargs == {"stop": ["x"]}
    assert model_args.dtype == "bfloat16"
    assert model_args.lora_target_modules == ["q_proj"]


def test_a_flag_goes_before_the_file_and_a_later_file_before_an_earlier_one(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("use_cpu: true\nbf16: false\nlora_r: 4\nlora_alpha: 4\nrollout_url: [http://a:1, http://b:1]\n")
    second.write_text("lora_r: 8\nlora_alpha: 8\n")
    flags = ["--config", str(first), f"--config={second}", "--lora_alpha", "16", "--rollout_url", "http://c:1"]
    config, _, model_args = parse(flags)
    assert config.rollout_url == ["http://c:1"]
    assert model_args.lora_r == 8
    assert model_args.lora_alpha == 16


@pytest.mark.parametrize("word", ["none", "null"])
def test_a_flag_undoes_a_line_of_a_file(tmp_path, word):
    file = tmp_path / "run.yaml"
    file.write_text("use_cpu: true\nbf16: false\nagent: mod:f\ntask_args: {a: 1}\nddp_backend: gloo\nrun_id: mine\n")
    names = ["agent", "task_args", "ddp_backend", "run_id", "generation_kwargs", "hub_model_id"]
    undone = [text for name in names for text in (f"--{name}", word)]
    config, args, _ = parse(["--config", str(file), *undone, "--agent_command", "mine"])
    assert (config.agent, config.agent_command, config.task_args, config.run_id) == (None, "mine", {}, None)
    assert (args.ddp_backend, args.generation_kwargs, args.hub_model_id) == (None, None, None)


def test_options_of_text_or_a_list_take_one_or_several(tmp_path):
    cpu = ["--use_cpu", "true", "--bf16", "false"]
    several = ["--report_to", "tensorboard", "wandb", "--optim_target_modules", "a", "b"]
    _, args, _ = parse([*cpu, *several, "--fsdp", "full_shard", "auto_wrap"])
    assert args.report_to == ["tensorboard", "wandb"]
    assert args.optim_target_modules == ["a", "b"]
    assert args.fsdp
    assert args.fsdp_plugin_args["auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    _, args, _ = parse([*cpu, "--report_to", "none", "--optim_target_modules", "all-linear", "--fsdp"])
    assert (args.report_to, args.optim_target_modules, args.fsdp) == ([], "all-linear", True)
    (tmp_path / "run.yaml").write_text("optim_target_modules: all-linear\nreport_to: [tensorboard, wandb]\n")
    _, args, _ = parse([*cpu, "--config", str(tmp_path / "run.yaml")])
    assert (args.report_to, args.optim_target_modules) == (["tensorboard", "wandb"], "all-linear")


def test_merged_keys(tmp_path):
    file = tmp_path / "run.yaml"
    base = json.dumps({"lora_r": 4, "lora_alpha": 4})
    file.write_text(f"env: &base {base}\nuse_cpu: true\nbf16: false\n<<: *base\nlora_r: 8\n")
    _, _, model_args = parse(["--config", str(file)])
    assert model_args.lora_r == 8
    assert model_args.lora_alpha == 4


def test_numbers_name_gpus_and_tokens(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("generation_kwargs: {logit_bias: {50256: -100, 0: 1}}\n")
    assert read_config_file(file) == {"generation_kwargs": {"logit_bias": {50256: -100, 0: 1}}}


def test_variables_are_the_text_that_is_written(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("env: {A: true, B: 0.10, C: 1e5, D: no, E: 007, F: '', G: 2024-01-01, 8: x}\n")
    written = {"A": "true", "B": "0.10", "C": "1e5", "D": "no", "E": "007", "F": "", "G": "2024-01-01", "8": "x"}
    assert read_config_file(file) == {"env": written}
