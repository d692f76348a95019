"""The recorder of a TRL training against a fake server: metrics, page and files."""

from __future__ import annotations

import errno
import json
import re
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from datasets import Dataset
from prometheus_client.parser import text_string_to_metric_families

from learner.config import LearnerConfig
from learner.monitors import recorder
from learner.monitors.page_server import CHOSEN_PORT
from learner.monitors.progress import show_progress
from learner.run_dir.files import JsonLines, read_lines
from learner.trainer.attach import attach
from learner.utils.ports import free_port
from shared.errors import InstallFailed, InvalidRequest, LockstepError, NotFinite
from tests.unit.learner.monitors.test_page_server import stream


def _scrape(port: int) -> dict[str, float]:
    """Every series as `name{label=value}`."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {s.name + "".join(f"{{{k}={v}}}" for k, v in s.labels.items()): s.value for s in samples}


def _page(run: Path) -> dict[str, Any]:
    """The data in a run's page."""
    text = (run / "run.html").read_text()
    return json.loads(text.split('id="data">')[1].split("</script>")[0])["messages"][0]


def test_metrics_of_a_training(make_trainer, client):
    port = free_port()
    held_out = Dataset.from_list([{"prompt": f"w{i}"} for i in range(4)])
    trainer = make_trainer(eval_strategy="steps", eval_steps=3, trainer_kwargs={"eval_dataset": held_out})
    session = attach(trainer, client=client, run_id="r", metrics_port=port)
    before = _scrape(port)
    assert before[f"lockstep_learner_run_info{{model={session.model.config._name_or_path}}}{{run_id=r}}"] == 1
    assert before["lockstep_learner_server_up{server=http://fake}"] == 1
    assert "lockstep_learner_eval_reward" not in before
    assert "lockstep_learner_reward" not in before
    trainer.train()
    after = _scrape(port)
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert after["lockstep_learner_step"] == after["lockstep_learner_max_steps"] == 3
    assert after["lockstep_learner_reward"] == pytest.approx(logs[-1]["reward"])
    assert after["lockstep_learner_reward_std"] == pytest.approx(logs[-1]["reward_std"])
    assert after["lockstep_learner_reward_function{function=reward_odd}"] == pytest.approx(logs[-1]["reward"])
    assert after["lockstep_learner_loss"] == pytest.approx(logs[-1]["loss"])
    assert "lockstep_learner_kl_nats" not in after, "without beta TRL knows none"
    assert "lockstep_learner_eval_reward" in after
    assert after["lockstep_learner_entropy_nats"] > 0
    assert after["lockstep_learner_lag_batches_count"] == session.rollouts.stats.completions == 24
    assert after["lockstep_learner_lag_batches_bucket{le=0.0}"] == 24
    assert after["lockstep_learner_completion_tokens_total"] == session.rollouts.stats.completion_tokens
    assert after["lockstep_learner_push_seconds_count"] == after["lockstep_learner_step_seconds_count"] == 3
    assert after["lockstep_learner_push_bytes_total"] == sum(r.push_bytes for r in session.metrics.reports)
    assert after["lockstep_learner_wait_seconds_total"] == pytest.approx(session.rollouts.stats.wait_seconds)
    reports = session.metrics.reports
    assert after["lockstep_learner_train_tokens_per_second"] == reports[-1].train_tokens_per_second
    # A step trains on a generation batch: 8 rows with prompts of 3 tokens.
    waiting = [r.wait_seconds + (r.reward_wait_seconds or 0.0) + r.push_seconds for r in reports]
    trained = sum(r.train_tokens_per_second * (r.seconds - w) for r, w in zip(reports, waiting, strict=True))
    assert trained == pytest.approx(session.rollouts.stats.completion_tokens + 24 * 3)
    assert "lockstep_learner_flops_utilisation_ratio" not in after, "a CPU has no peak"
    assert after["lockstep_learner_drift_nats"] == session.metrics.mismatch.delta
    assert after["lockstep_learner_server_step{server=http://fake}"] == 3


@pytest.mark.parametrize("option", ["metrics_port", "page_port"])
def test_a_port_that_is_taken(make_trainer, client, server, option):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LockstepError, match=f"{option} {port}: cannot listen on 127.0.0.1:{port}"):
            attach(make_trainer(), client=client, run_id="r", **{option: port})
    assert server.pushed == []


def test_the_page_of_a_training_that_is_resumed(make_trainer, client, server, tmp_path):
    run = Path(tmp_path / "run")
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    attach(trainer := make_trainer(**settings), client=client, run_id="r").close()
    trainer.train()
    first = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert [batch["step"] for batch in first] == [1, 2, 3]
    assert first[0]["completions"] == 8
    assert [len(group["samples"]) for group in first[0]["groups"]] == [4, 4], "all completions of every group"
    group = first[0]["groups"][0]
    sample = group["samples"][0]
    assert sample["spans"] == [[0, 0, sample["tokens"], "fresh"]]
    assert sample["lag"] == 0
    assert re.fullmatch(r"w\d+ w\d+ w\d+", group["prompt"])
    assert _page(run)["head"]["state"] == "finished"

    attach(trainer := make_trainer(**{**settings, "max_steps": 4}), client=client, run_id="r")
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    again = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert again[:2] == first[:2]
    assert [batch["step"] for batch in again] == [1, 2, 3, 4]
    logged = [json.loads(line) for line in (run / "logs.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "reward" in row] == [1, 2, 3, 4]
    page = _page(run)
    assert (page["head"]["last"]["step"], page["head"]["last"]["max_steps"]) == (4, 4)
    assert [batch["step"] for batch in page["batches"]["new"]] == [1, 2, 3, 4]
    assert page["table"]["columns"][0] == "reward"
    assert [row[0] for row in page["table"]["rows"]] == [1, 2, 3, 4]
    assert "learning_rate" in page["head"]["settings"]["TRL and transformers"]


def test_a_page_that_is_not_wanted_or_cannot_be_written(make_trainer, client, tmp_path, caplog):
    trainer = make_trainer(max_steps=1)
    attach(trainer, client=client, run_id="r", run_page=False)
    trainer.train()
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"metrics.jsonl", "logs.jsonl"}
    assert not (tmp_path / "run" / "run.html").exists()
    assert not (tmp_path / "run" / "completions.jsonl").exists()

    (tmp_path / "run" / "run.html").mkdir()
    trainer = make_trainer(max_steps=2)
    attach(trainer, client=client, run_id="r")
    trainer.train()
    assert trainer.state.global_step == 2
    assert caplog.text.count("is not up to date") == 1


def test_a_full_disk_does_not_end_a_training(make_trainer, client, monkeypatch, caplog):
    def add(self: JsonLines, entry: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonLines, "add", add)
    trainer = make_trainer(max_steps=2)
    attach(trainer, client=client, run_id="r")
    trainer.train()
    assert trainer.state.global_step == 2
    assert caplog.text.count("No space left on device") == 1


@pytest.mark.parametrize("options", [{}, {"reward_workers": 0}, {"drop_degenerate_groups": True}])
def test_completions_beside_their_answers_and_over_time(make_trainer, client, tmp_path, options):
    rows = [{"prompt": f"w{i} w{i + 7}", "answer": f"of w{i} w{i + 7}"} for i in range(16)]
    data = {"train_dataset": Dataset.from_list(rows[:12]), "eval_dataset": Dataset.from_list(rows[12:])}
    settings = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2, "per_device_eval_batch_size": 4}
    attach(trainer := make_trainer(**settings, trainer_kwargs=data), client=client, run_id="r", **options)
    trainer.train()
    batches = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    groups = [(batch["kind"], group) for batch in batches for group in batch["groups"]]
    assert all(group["columns"]["answer"] == f"of {group['prompt']}" for _, group in groups)
    assert {(kind, len(group["samples"])) for kind, group in groups} == {("training", 4), ("evaluation", 2)}
    assert all(sample["tokens"] for _, group in groups for sample in group["samples"])
    evaluations = [[group["key"] for group in batch["groups"]] for batch in batches if batch["kind"] == "evaluation"]
    assert len(evaluations) == 3
    assert evaluations[0] == evaluations[1] == evaluations[2], "one prompt can be followed over the evaluations"


def test_a_step_that_is_not_proven_is_recorded_with_the_reason(make_trainer, client, server, tmp_path):
    trainer = make_trainer(learning_rate=0.5, max_steps=1)
    session = attach(trainer, client=client)
    server.ignore_pushes = True
    with pytest.raises(InstallFailed, match="proof of sync failed"):
        trainer.train()
    (row,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert row["step"] == 1
    assert row["reward"] is not None
    assert row["push_bytes"] > 0
    assert row["logprob_gap"] == session.proof.last.max_mismatch > session.proof.last.tolerance
    assert row["error"].startswith("proof of sync failed")
    head = _page(tmp_path / "run")["head"]
    assert head["state"] == "failed"
    assert head["error"].startswith("proof of sync failed")
    server.ignore_pushes = False
    again = make_trainer(max_steps=1)
    attach(again, client=client)
    again.train()
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (state["state"], state["error"]) == ("finished", None)


def test_a_step_that_is_not_pushed_is_recorded_with_the_reason(make_trainer, client, server, tmp_path):
    trainer = make_trainer()
    session = attach(trainer, client=client)
    push = session.publisher.push

    def push_once(step):
        if step:
            raise NotFinite("the adapter holds NaN")
        return push(step)

    session.publisher.push = push_once
    with pytest.raises(NotFinite):
        trainer.train()
    (row,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert (row["step"], row["push_bytes"], row["error"]) == (1, 0, "the adapter holds NaN [not_finite]")
    assert session.metrics.pushes == 0


def test_a_training_that_fails_within_a_step_says_why_on_its_page(make_trainer, client, tmp_path):
    def broken(completions, **_):
        raise KeyError("gold")

    trainer = make_trainer(trainer_kwargs={"reward_funcs": broken})
    attach(trainer, client=client)
    with pytest.raises(LockstepError):
        trainer.train()
    head = _page(tmp_path / "run")["head"]
    assert head["state"] == "failed"
    assert head["error"].startswith("the reward 'broken' raised KeyError")


def test_a_training_that_is_refused_leaves_the_page_of_the_one_before(make_trainer, client, tmp_path):
    trainer = make_trainer(max_steps=1)
    attach(trainer, client=client)
    trainer.train()
    files = [tmp_path / "run" / name for name in ("run.json", "run.html", "completions.jsonl")]
    before = [file.read_bytes() for file in files]
    again = make_trainer(max_steps=1)
    attach(again, client=client)
    with pytest.raises(InvalidRequest, match="no such directory"):
        again.train(resume_from_checkpoint=str(tmp_path / "away"))
    assert [file.read_bytes() for file in files] == before


def test_an_evaluation_after_the_end(make_trainer, client, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "_PAGE_SHARE", 1e9)  # write the page at every log
    data = {"eval_dataset": Dataset.from_list([{"prompt": f"w{i}"} for i in range(4)])}
    attach(trainer := make_trainer(max_steps=1, trainer_kwargs=data), client=client, run_id="r")
    trainer.train()
    trainer.evaluate()
    page = _page(tmp_path / "run")
    assert "eval_reward" in page["head"]["last"]
    assert page["head"]["state"] == "finished"


def test_an_evaluation_larger_than_a_training_batch(make_trainer, client, tmp_path):
    """TRL's logs hold no more rows than a training batch has: the last ones."""
    rows = [{"prompt": f"w{i} w{i + 7}", "answer": f"of w{i} w{i + 7}"} for i in range(20)]
    data = {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(rows)}
    settings = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 4, "per_device_eval_batch_size": 20}
    attach(trainer := make_trainer(max_steps=1, **settings, trainer_kwargs=data), client=client, run_id="r").close()
    trainer.train()
    batches = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    (evaluation,) = [batch for batch in batches if batch["kind"] == "evaluation"]
    assert [len(group["samples"]) for group in evaluation["groups"]] == [4, 4]
    assert all(group["columns"]["answer"] == f"of {group['prompt']}" for group in evaluation["groups"])


@pytest.mark.parametrize("kind", ["served", "file", "none"])
def test_where_the_page_is_is_said_once(make_trainer, client, tmp_path, capsys, kind):
    port = free_port() if kind == "served" else None
    session = attach(trainer := make_trainer(), client=client, run_id="r", page_port=port, run_page=kind != "none")
    show_progress(trainer, session)
    trainer.train()
    places = {"served": f"http://127.0.0.1:{port}/", "file": (tmp_path / "run" / "run.html").as_uri()}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("open the page")]
    assert said == [f"open the page: {place}" for name, place in places.items() if name == kind]


def test_a_page_goes_elsewhere_where_nobody_asked_for_its_port(make_trainer, client, capsys, monkeypatch):
    """`learner up` chooses a free one; until the learner listens on it, another training may have taken it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv(CHOSEN_PORT, str(port))
        session = attach(trainer := make_trainer(), client=client, run_id="r", page_port=port)
        show_progress(trainer, session)
        trainer.train()
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("open the page")]
    assert re.fullmatch(r"open the page: http://127\.0\.0\.1:\d+/", said)
    assert f":{port}/" not in said


def test_the_live_page_of_a_training(make_trainer, client):
    port, came, finished = free_port(), [], threading.Event()
    attach(trainer := make_trainer(), client=client, run_id="r", page_port=port)

    def watch() -> None:
        with stream(port) as events:
            while not finished.is_set():
                message = events.next_run()
                came.extend(row[0] for row in message.get("table", {}).get("rows", ()))
                if message.get("head", {}).get("state") == "finished":
                    finished.set()

    threading.Thread(target=watch, daemon=True).start()
    trainer.train()
    assert finished.wait(60)
    assert set(came) == {1, 2, 3}


def test_a_page_of_a_run_that_records_nothing_is_refused():
    with pytest.raises(ValueError, match="page_port: run_page false records nothing"):
        LearnerConfig(page_port=8700, run_page=False)
