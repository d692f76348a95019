"""Agents over a fake server: what TRL trains on, rewards, forks, failures, and reading ahead."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from learner.agents.calls import FunctionAgent
from learner.agents.episodes import AgentError
from learner.agents.rewards import agent_reward
from learner.cluster import workers
from learner.rewards.calls import RewardError
from learner.servers.client import RolloutClient
from learner.trainer import agent_hooks
from learner.trainer.attach import attach
from learner.trainer.hooks import record_samples
from learner.trainer.prompt_order import TrlPrompts
from learner.trainer.reward_hooks import Unscored
from shared.errors import ErrorCode, InvalidRequest, LockstepError
from tests.support.fake_ray import ActorDiedError, FakeRay
from tests.support.fake_sessions import FakeSessions, ask


@pytest.fixture
def server(model_dir, server_state) -> FakeSessions:
    server = FakeSessions(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), server_state)
    server.log_kept_mass = 0.0
    return server


@pytest.fixture
def client(server) -> RolloutClient:
    return RolloutClient("http://fake", transport=server.transport)


def ids_of(row: dict) -> list[int]:
    """The ids of a prompt of the tiny tokenizer: word wN is N + 3."""
    return [int(word[1:]) + 3 for word in row["prompt"].split()]


def talks(server: FakeSessions, turns: int = 2) -> Callable:
    """An agent of several turns, which answers every one with a word of its own."""

    def agent(session, row):
        history = ids_of(row)
        for _ in range(turns):
            history += ask(server, session, history)
            history += [5, 6]
        return float(len(history) % 3)

    return agent


def forks(server: FakeSessions) -> Callable:
    """An agent that rewrites its history, and asks a helper."""

    def agent(session, row):
        first = ids_of(row)
        answer = ask(server, session, first)
        ask(server, session, [*first, 9, 9, *answer[:1]])
        ask(server, session, [7, 8])
        ask(server, session, [*first, *answer, 5])
        return float(len(answer))

    return agent


def batches_of(trainer: GRPOTrainer) -> list[dict]:
    """What is generated, as it comes."""
    generate, batches = trainer._generate_and_score_completions, []

    def generate_and_keep(inputs):
        batches.append(generate(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = generate_and_keep
    return batches


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("make_agent", [talks, forks])
def test_trains_on_what_the_agent_sampled_and_nothing_else(make_trainer, server, client, make_agent):
    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward})
    session = attach(trainer, client=client, agent=make_agent(server))
    batches = batches_of(trainer)
    trainer.train()
    assert session.metrics.mismatch.delta < 1e-4, "every logprob is the learner's own"
    for batch in batches:
        sampled_BT = batch["tool_mask"].bool() & batch["completion_mask"].bool()
        between_BT = ~batch["tool_mask"].bool() & batch["completion_mask"].bool()
        served_BT, own_BT = batch["sampling_per_token_logps"], batch["old_per_token_logps"]
        assert between_BT.any()
        assert torch.allclose(served_BT[sampled_BT], own_BT[sampled_BT], atol=1e-4)
        assert (served_BT[between_BT] == 0).all()
    assert session.rollouts.stats.completions == 24
    assert dict(session.rollouts.stats.staleness) == {0: 24}
    assert sorted(server.closed) == sorted(f"s{i}" for i in range(24))
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert len(logged(trainer, "rewards/agent/mean")) == 3
    assert logged(trainer, "agents/trajectories")[0] == (3 if make_agent is forks else 1)
    assert [request.policy.step for request in server.opened] == [0] * 8 + [1] * 8 + [2] * 8
    assert not any(request.follow for request in server.opened)
    assert {request.sampling.max_tokens for request in server.opened} == {6}


def test_each_trajectory_is_scored_as_a_sequence_of_its_own(make_trainer, server, client):
    """TRL's loss sees one row for each episode, packed or not, with the logprobs that its sequences have alone."""
    settings = {"max_steps": 1, "beta": 0.1, "vllm_importance_sampling_mode": "token_truncate"}
    norms = {}
    for packed in (True, False):
        server.drawn.manual_seed(0)
        trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward}, **settings)
        attach(trainer, client=client, agent=forks(server), run_id=f"r{packed}", packed_passes=packed, **ONE_AT_A_TIME)
        batches = batches_of(trainer)
        trainer.train()
        (batch,) = batches
        assert len(batch["completion_ids"]) == 8, "one row for each episode"
        assert (batch["lockstep_parts"][..., 0] > 0).sum() == 16, "and two more trajectories in each"
        sampled, logps = batch["tool_mask"].bool() & batch["completion_mask"].bool(), batch["old_per_token_logps"]
        assert torch.allclose(logps[sampled], _scored_alone(server, batch)[sampled], atol=1e-4)
        norms[packed] = logged(trainer, "grad_norm")[0]
    assert norms[True] == pytest.approx(norms[False], rel=1e-3)
    assert norms[True] > 0


ONE_AT_A_TIME = {"agent_concurrency": 1}


@torch.no_grad()
def _scored_alone(server: FakeSessions, batch: dict) -> torch.Tensor:
    """Logprobs [B, T] of the base, which is step 0, of a forward pass for each sequence."""
    for name, parameter in server.model.named_parameters():
        parameter.copy_(server.base[name])
    found = torch.zeros_like(batch["old_per_token_logps"])
    for row in range(len(found)):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        parts = [(start, length) for start, length in batch["lockstep_parts"][row].tolist() if start >= 0]
        ends = [*(start for start, _ in parts), len(completion)]
        sequences = [(0, 0, torch.cat([prompt, completion[: ends[0]]]))]
        sequences += [(s, n, completion[s:end]) for (s, n), end in zip(parts, ends[1:], strict=True)]
        for (start, prompted, ids), end in zip(sequences, ends, strict=True):
            logits = server.model(input_ids=ids[None]).logits[0, :-1].float()
            scored = torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0]
            found[row, start + prompted : end] = scored[-(end - start - prompted) :]
    return found


def test_an_episode_was_cut_off_where_its_last_call_was(make_trainer, server, client):
    """Not where the row's last token, which is that of the trajectory that began last, ends no sequence."""
    server.spoil = lambda t: t.model_copy(
        update={"finish_reasons": ["length" if 3 in t.calls else "stop"] * len(t.calls)}
    )
    for agent, cut in ((forks(server), 1.0), (talks(server), 0.0)):
        trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward}, max_steps=1)
        attach(trainer, client=client, agent=agent, run_id=f"r{cut:g}")
        trainer.train()
        assert logged(trainer, "completions/clipped_ratio") == [cut]
        for name in ("mean", "min", "max"):
            whole = logged(trainer, f"completions/{name}_length")
            assert logged(trainer, f"completions/{name}_terminated_length") == ([0.0] if cut else whole)


def test_an_async_agent_runs_side_by_side(make_trainer, server, client):
    met = threading.Barrier(8)

    async def agent(session, row):
        await asyncio.to_thread(met.wait, 60)
        return float(len(ask(server, session, ids_of(row))))

    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward}, max_steps=1)
    attach(trainer, client=client, agent=agent, agent_max_calls=3, agent_max_tokens=77)
    trainer.train()
    assert len(server.opened) == 8
    assert {(request.max_calls, request.max_tokens) for request in server.opened} == {(3, 77)}


def test_reward_functions_score_the_conversations_that_agents_leave_open(make_trainer, server, client):
    seen = []

    def length(prompts, completions, completion_ids, **_):
        seen.append((prompts, completions, completion_ids))
        return [float(len(completion)) for completion in completions]

    def agent(session, row):
        history = ids_of(row)
        first = ask(server, session, history)
        ask(server, session, [*history, *first, 5])
        return None if len(first) % 2 else 0.5

    trainer = make_trainer(trainer_kwargs={"reward_funcs": length}, max_steps=2, save_strategy="no")
    session = attach(trainer, client=client, agent=agent, reward_workers=0)
    trainer.train()
    assert seen
    for prompts, completions, completion_ids in seen:
        assert len(prompts) == len(completions) == len(completion_ids)
        assert all(" w2 " in f" {completion} " for completion in completions), "what the agent said is in between"
    scored = sum(len(prompts) for prompts, *_ in seen)
    assert 0 < scored < 16
    assert {"rewards/length/mean", "rewards/agent/mean"} <= set().union(*trainer.state.log_history)
    assert session.rollouts.agents.counts.failed == 0


def test_agents_that_nobody_scores_end_the_training(make_trainer, server, client):
    def unsure(completions, **_):
        return [None] * len(completions)

    def agent(session, row):
        ask(server, session, ids_of(row))

    trainer = make_trainer(trainer_kwargs={"reward_funcs": unsure}, max_steps=1)
    attach(trainer, client=client, agent=agent)
    with pytest.raises(RewardError, match="none of 8 completions has a reward: unsure, agent returned None"):
        trainer.train()


def test_reward_workers_score_conversations(make_trainer, server, client):
    def agent(session, row):
        ask(server, session, ids_of(row))

    trainer = make_trainer(max_steps=1)
    attach(trainer, client=client, agent=agent, reward_workers=1)
    trainer.train()
    assert len(logged(trainer, "rewards/reward_odd/mean")) == 1
    assert not logged(trainer, "rewards/agent/mean"), "no agent gave one"


def test_an_episode_that_fails_is_run_again_and_said_once(make_trainer, server, client, caplog):
    failed, lock = set(), threading.Lock()

    def agent(session, row):
        with lock:
            first = row["prompt"] not in failed
            failed.add(row["prompt"])
        if first:
            raise RuntimeError("the tool broke")
        return float(len(ask(server, session, ids_of(row))))

    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward}, max_steps=1)
    session = attach(trainer, client=client, agent=agent)
    with caplog.at_level(logging.WARNING, "lockstep.agents"):
        trainer.train()
    counts = session.rollouts.agents.counts
    assert (counts.failed, counts.left_out) == (2, 0)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "lockstep.agents"]
    assert "the tool broke" in said
    assert "in agent" in said, "the agent's own traceback"
    assert logged(trainer, "agents/failed_runs") == [2.0]


SERVED: list[FakeSessions] = []


def talks_there(session, row):
    """An agent that comes to an actor by its name, as most do."""
    return talks(SERVED[0])(session, row)


@pytest.fixture
def ray(server, monkeypatch) -> FakeRay:
    fake = FakeRay(**{"10_0_0_1": {"CPU": 2.0}})
    monkeypatch.setattr(workers, "connect", lambda: fake)
    monkeypatch.setattr(workers, "_LOOK_S", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(f"{__name__}.SERVED", [server])
    return fake


def test_episodes_run_on_a_cluster(make_trainer, server, client, ray):
    died = []

    def before(actor, method, args):
        if method == "call" and not died:
            died.append(actor)
            raise ActorDiedError("out of memory")

    ray.before = before
    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward})
    session = attach(trainer, client=client, agent=talks_there, agent_backend="ray", agent_concurrency=2)
    trainer.train()
    assert session.rollouts.stats.completions == 24
    counts = session.rollouts.agents.counts
    assert (counts.run, counts.failed, counts.left_out) == (24, 1, 0)
    assert not server.open
    assert ray.killed == died
    assert len(ray.workers) == 3
    session.close()
    assert set(ray.killed) == set(ray.workers)


def test_an_agent_that_ends_its_process_again_and_again_ends_the_training(make_trainer, server, client, ray):
    def before(actor, method, args):
        if method == "call":
            raise ActorDiedError("killed")

    ray.before = before
    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward}, max_steps=1)
    session = attach(trainer, client=client, agent=talks_there, agent_backend="ray")
    with pytest.raises(AgentError, match=r"every one of 8 episodes, each run 3 times: its process on the Ray"):
        trainer.train()
    assert len(server.closed) == 24
    session.close()


def test_a_place_comes_before_the_session(make_trainer, server, client):
    open_then = []

    class Placed(FunctionAgent):
        def place(self):
            open_then.append(len(server.open))
            return super().place()

    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward}, max_steps=1)
    session = attach(trainer, client=client, agent=talks(server), **ONE_AT_A_TIME)
    session.rollouts.agents.agent = Placed(talks(server))
    trainer.train()
    assert open_then == [0] * 8


def test_without_an_agent_there_is_nothing_to_run_on_a_cluster(make_trainer, client):
    with pytest.raises(InvalidRequest, match="agent_backend ray: there is no agent"):
        attach(make_trainer(), client=client, agent_backend="ray")


def test_an_episode_that_fails_every_time_is_left_out_of_its_group(make_trainer, server, client):
    broken, lock = [], threading.Lock()

    def agent(session, row):
        with lock:
            if len(broken) < 3:
                broken.append(1)
                raise RuntimeError("broken")
        return float(len(ask(server, session, ids_of(row))))

    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward}, max_steps=1)
    session = attach(trainer, client=client, agent=agent, **ONE_AT_A_TIME)
    batches = batches_of(trainer)
    trainer.train()
    (batch,) = batches
    out = (batch["tool_mask"] * batch["completion_mask"]).sum(1) == 0
    assert out.tolist() == [True] + [False] * 7
    rewards = torch.tensor([float(len(r.nonzero())) for r in batch["tool_mask"] * batch["completion_mask"]])[1:4]
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert torch.allclose(batch["advantages"][1:4], expected, atol=1e-5), "of the rest of its group"
    assert batch["advantages"][0] == 0
    assert session.summary()["agent_left_out"] == 1
    assert logged(trainer, "agents/left_out") == [1.0]
    assert math.isfinite(logged(trainer, "loss")[0])


def test_an_agent_that_always_fails_ends_the_training_with_its_own_error(make_trainer, server, client):
    def agent(session, row):
        raise KeyError("no such column")

    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward})
    attach(trainer, client=client, agent=agent)
    with pytest.raises(AgentError, match=r"every one of 8 episodes.*no such column"):
        trainer.train()


def test_an_agent_whose_reward_nobody_gives_ends_the_training(make_trainer, server, client):
    """TRL would go on to the end, with advantages of 0."""

    def agent(session, row):
        ask(server, session, ids_of(row))

    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward})
    attach(trainer, client=client, agent=agent)
    with pytest.raises(AgentError, match=r"none of 8 episodes has a reward: .*returned None.*reward_funcs"):
        trainer.train()


def test_a_batch_goes_on_where_another_rank_has_episodes_left(make_trainer, server, client, monkeypatch):
    others: list[list[str | None]] = [["broken", None], ["broken", "broken"]]
    monkeypatch.setattr(agent_hooks, "gather_object", lambda own: [*own, *others.pop(0)])
    monkeypatch.setattr(Unscored, "saw", lambda *_: None)  # of the other rank's rewards, which are not here

    def agent(session, row):
        raise KeyError("no such column")

    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward}, max_steps=2)
    session = attach(trainer, client=client, agent=agent)
    batches = batches_of(trainer)
    with pytest.raises(AgentError, match="every one of 10 episodes"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert session.rollouts.agents.counts.left_out == 16
    assert (batches[0]["advantages"] == 0).all()


def test_an_agent_that_makes_no_call_is_told_where_to_make_them(make_trainer, server, client):
    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward})
    attach(trainer, client=client, agent=lambda session, row: 1.0)
    with pytest.raises(AgentError, match=r"made no call.*session\.base_url"):
        trainer.train()


def test_a_record_that_does_not_fit_together_is_refused(make_trainer, server, client):
    server.spoil = lambda t: t.model_copy(update={"logprobs": t.logprobs[:-1]})
    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward})
    attach(trainer, client=client, agent=talks(server))
    with pytest.raises(LockstepError, match="logprobs for") as caught:
        trainer.train()
    assert caught.value.code is ErrorCode.PROTOCOL_MISMATCH


def test_a_restart_costs_the_episodes_under_way_only(make_trainer, server, client):
    restarted, lock = [], threading.Lock()

    def agent(session, row):
        answer = ask(server, session, ids_of(row))
        with lock:
            again = len(server.opened) == 5 and not restarted
            if again:
                restarted.append(True)
        if again:
            server.open.clear()  # the sessions are gone; what is served comes back with the same state
            ask(server, session, ids_of(row))
        return float(len(answer))

    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward}, max_steps=1)
    session = attach(trainer, client=client, agent=agent, **ONE_AT_A_TIME)
    trainer.train()
    counts = session.rollouts.agents.counts
    assert (counts.lost, counts.failed, counts.left_out) == (1, 0, 0)


def test_episodes_of_coming_batches_run_ahead(make_trainer, server, client):
    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward}, max_steps=6)
    session = attach(trainer, client=client, agent=talks(server), max_staleness=1)
    trainer.train()
    stats, follows = session.rollouts.stats, [request.follow for request in server.opened]
    assert any(follows)
    assert stats.completions == 48
    assert max(stats.staleness) <= 1
    assert session.rollouts.prefetcher.mismatches == 0


def test_episodes_of_other_rows_are_not_taken_for_those_of_the_same_prompt(make_trainer, server, client):
    ran = []

    def agent(session, row):
        ran.append(row["task"])
        return float(len(ask(server, session, ids_of(row))))

    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward}, max_steps=2, save_strategy="no")
    rows = [{"prompt": "w1 w2", "task": task} for task in range(64)]
    trainer.train_dataset = Dataset.from_list(rows)
    session = attach(trainer, client=client, agent=agent, max_staleness=1)
    trained, generate = [], trainer._generate_and_score_completions
    right = TrlPrompts.rows

    def generate_noted(inputs):
        trained.append({row["task"] for row in inputs})
        return generate(inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrlPrompts, "rows", lambda self, batch: right(self, 1 - batch))  # another order than TRL's
        trainer._generate_and_score_completions = generate_noted
        trainer.train()
    assert session.rollouts.prefetcher.mismatches == 2
    assert set(ran) == trained[0] | trained[1]


def test_the_page_shows_all_trajectories(make_trainer, server, client, monkeypatch):
    shown: list = []
    monkeypatch.setattr(
        "learner.trainer.attach.record_samples",
        lambda trainer, session, add: record_samples(trainer, session, lambda step, kind, groups: shown.extend(groups)),
    )
    trainer = make_trainer(trainer_kwargs={"reward_funcs": agent_reward}, max_steps=1)
    attach(trainer, client=client, agent=forks(server))
    trainer.train()
    turns = shown[0].samples[0].turns
    headings = [text for sampled, text in turns if not sampled and text.startswith("[")]
    assert headings == [f"[conversation {i} of 3]" for i in (1, 2, 3)]
    assert sum(sampled for sampled, _ in turns) == 4, "one for each call"
    fork = turns.index((False, "[conversation 2 of 3]"))
    rewritten = trainer.processing_class.decode([7, 8], skip_special_tokens=True).strip()
    prompts = [text for _, text in (turns[fork + 1], turns[turns.index((False, "[conversation 3 of 3]")) + 1])]
    assert rewritten in prompts


def test_evaluation_runs_the_agent(make_trainer, server, client):
    trainer = make_trainer(
        trainer_kwargs={"reward_funcs": agent_reward, "eval_dataset": None}, max_steps=1, per_device_eval_batch_size=4
    )
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    attach(trainer, client=client, agent=talks(server))
    trainer.train()
    assert trainer.evaluate()["eval_rewards/agent/mean"] >= 0


def test_resumes_within_a_batch_of_forked_episodes(make_trainer, server, client):
    settings = {"steps_per_generation": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    kwargs = {"trainer_kwargs": {"reward_funcs": agent_reward}, **settings}
    trainer = make_trainer(max_steps=2, **kwargs)
    attach(trainer, client=client, agent=forks(server))
    trainer.train()
    opened = len(server.opened)
    again = make_trainer(max_steps=3, **kwargs)
    attach(again, client=client, agent=forks(server))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert len(server.opened) == opened, "the batch under way is the saved one"


@pytest.mark.parametrize(
    ("options", "settings", "match"),
    [
        ({"deterministic": True}, {"full_determinism": True}, "deterministic with an agent"),
        ({"drop_degenerate_groups": True}, {}, "drop_degenerate_groups with an agent"),
        ({"agent_command": "true"}, {}, r"agent and agent_command.*give one of them"),
        ({}, {"generation_kwargs": {"stop": ["x"]}}, "stop with an agent"),
        ({}, {"mask_truncated_completions": True}, "mask_truncated_completions with an agent.*finish_reason"),
    ],
)
def test_what_means_nothing_with_an_agent_is_refused(make_trainer, client, options, settings, match):
    trainer = make_trainer(**settings)
    before = list(trainer.reward_funcs)
    with pytest.raises(LockstepError, match=match):
        attach(trainer, client=client, agent=lambda session, row: 1.0, **options)
    assert trainer.reward_funcs == before
