"""`learner up --cluster`: what nodes are asked to run, what is refused, and how it ends; over a Ray that pretends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from learner.cli import main
from learner.cluster.hosted import Command, Report, place
from learner.commands import training, up_on_cluster
from learner.run_dir.lock import check_unused
from shared.placement import PLACEMENT_VARIABLE
from tests.support.fake_ray import FakeRay
from tests.unit.learner.run_dir.test_lock import held

TOKEN = "a-token-of-the-user-s-own"
DONE = Report("life", "10.0.0.1", lines=("step 1",), seen=1, starts=1, ended=1, status=0, over=True)


@pytest.fixture(autouse=True)
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay(**{"10_0_0_1": {"CPU": 4.0, "GPU": 4.0}, "10_0_0_2": {"CPU": 4.0, "GPU": 4.0}})
    fake.script["learner"] = [DONE]
    monkeypatch.setattr(up_on_cluster, "connect", lambda address: fake)
    monkeypatch.setattr(training, "check", lambda argv: None)
    monkeypatch.delenv("LOCKSTEP_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()  # a model that is not looked for on the hub
    Path("tiny/config.json").write_text("{}")
    Path("mine.yaml").write_text("model_name_or_path: tiny\nserver:\n  max-num-seqs: 8\n")
    return fake


def run(*flags: str) -> int:
    return main(["up", "--config", "mine.yaml", "--cluster", "auto", *flags])


def commands(ray: FakeRay) -> tuple[Command, Command]:
    """Return the commands of the first server and of the learner."""
    return ray.hosted["server-1"][0].command, ray.hosted["learner"][0].command


def follows(command: Command, flag: str) -> str:
    return command.arguments[command.arguments.index(flag) + 1]


def test_servers_and_learner_are_given_what_they_share(ray: FakeRay, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--servers", "2", "--max_steps", "3") == 0
    server, learner = commands(ray)
    assert server.arguments[0] == "tiny"
    assert follows(server, "--host") == place("host")
    assert follows(server, "--max-num-seqs") == "8"
    assert follows(learner, "--max_steps") == "3"
    name = follows(learner, "--rollout_url").removeprefix("ray:")
    assert "directory:" + name in ray.named
    assert follows(learner, "--output_dir") == str(Path("runs/mine").resolve())
    assert server.again
    assert not learner.again
    shown = capsys.readouterr().out
    assert "learner | step 1\n" in shown
    assert f"listed as ray:{name}" in shown
    assert Path("runs/mine/learner.log").read_text() == "step 1\n"


def test_rewards_on_the_cluster_are_the_learners_to_start(ray: FakeRay) -> None:
    assert run("--reward_backend", "ray", "--reward_workers", "8", "--reward_resources", '{"sandbox": 1}') == 0
    server, learner = commands(ray)
    assert follows(learner, "--reward_backend") == "ray"
    assert follows(learner, "--reward_workers") == "8"
    assert follows(learner, "--reward_resources") == '{"sandbox": 1}'
    assert not any("reward" in word for word in server.arguments)


def test_a_job_without_a_token_makes_one_and_one_that_has_one_sends_it(ray: FakeRay) -> None:
    assert run() == 0
    made = [command.secrets["token"] for command in commands(ray)]
    assert made[0] == made[1]
    assert len(made[0]) == 64
    ray.hosted.clear()
    Path("token").write_text(TOKEN)
    assert run("--token_file", "token") == 0
    for command in commands(ray):
        assert command.secrets["token"] == TOKEN.encode()
        assert TOKEN not in " ".join(command.arguments)
        assert TOKEN not in repr(command)


def test_certificates_are_sent_and_make_the_addresses_https(ray: FakeRay) -> None:
    for name in ("cert", "key", "ca"):
        Path(name).write_text(name)
    Path("mine.yaml").write_text("model_name_or_path: tiny\nserver:\n  ssl-certfile: cert\n  ssl-keyfile: key\n")
    assert run("--ca_file", "ca") == 0
    server, learner = commands(ray)
    assert server.url.startswith("https://")
    assert follows(server, "--ssl-keyfile") == place("ssl_keyfile")
    assert server.secrets["ssl_keyfile"] == b"key"
    assert learner.secrets["ca"] == b"ca"
    assert learner.arguments[-1] != "ca"


@pytest.mark.parametrize(
    ("flags", "needs", "learner_needs"),
    [
        ((), {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}),
        (("--use_cpu", "true", "--cpus-per-server", "2"), {"CPU": 2}, {"CPU": 1}),
        (("--gpus_per_server", "2", "--learner_gpus", "4"), {"CPU": 1, "GPU": 2}, {"CPU": 4, "GPU": 4}),
    ],
)
def test_what_each_takes(ray: FakeRay, flags: tuple[str, ...], needs: Any, learner_needs: Any) -> None:
    assert run(*flags) == 0
    assert ray.reserved == [([{**learner_needs, "node:10.0.0.1": 0.001}, needs], "SPREAD", "")]


@pytest.mark.parametrize(
    ("flags", "bundles"),
    [
        (("--gpus_per_server", "6", "--cpus-per-server", "3"), [{"CPU": 0.5, "GPU": 1}] * 6),  # no node has six
        (
            ("--gpus_per_server", "2", "--server-flags", "--distributed-executor-backend ray"),
            [{"CPU": 0.5, "GPU": 1}] * 2,
        ),
        (
            ("--server-flags", "--distributed-executor-backend ray"),
            [{"CPU": 1, "GPU": 1}],
        ),  # vLLM takes a group for one
        (
            ("--server-flags", "-tp 2 --distributed-executor-backend=ray", "--cpus-per-server", "3"),
            [{"CPU": 1.5, "GPU": 1}] * 2,
        ),
        (
            ("--use_cpu", "true", "--server-flags", "--tensor-parallel-size 2 --distributed-executor-backend ray"),
            [{"CPU": 1}] * 2,
        ),
    ],
)
def test_the_workers_of_a_server_may_be_on_several_nodes(ray: FakeRay, flags: tuple[str, ...], bundles: Any) -> None:
    assert run(*flags) == 0
    (_, _, nothing), (found, strategy, name) = ray.reserved
    assert (found, strategy, nothing) == (bundles, "PACK", "")
    server = ray.hosted["server-1"][0]
    assert server.command.environment[PLACEMENT_VARIABLE] == f"lockstep/{name}"
    assert " ".join(server.command.arguments).count("distributed-executor-backend") == 1
    assert len(bundles) == 1 or {"-tp", "--tensor-parallel-size"} & set(server.command.arguments)
    # The GPU of its bundle is for the first worker.
    assert (server.options["num_cpus"], server.options["num_gpus"]) == (bundles[0]["CPU"], 0)


def test_several_gpus_are_used(ray: FakeRay) -> None:
    assert run("--gpus_per_server", "2", "--learner_gpus", "4") == 0
    server, learner = commands(ray)
    assert follows(server, "--tensor-parallel-size") == "2"
    assert learner.module == "torch.distributed.run"
    assert follows(learner, "--nproc-per-node") == "4"
    assert learner.arguments[learner.arguments.index("-m") + 1] == "learner.cli"


@pytest.mark.parametrize(
    ("flags", "bundles", "ranks"),
    [
        (("--learner_gpus", "6"), [{"CPU": 3, "GPU": 3}] * 2, 3),  # no node has six
        (("--learner_gpus", "4", "--learner-nodes", "2"), [{"CPU": 2, "GPU": 2}] * 2, 2),
        (("--learner_gpus", "4", "--learner-nodes", "2", "--learner-cpus", "3"), [{"CPU": 1.5, "GPU": 2}] * 2, 2),
        (("--use_cpu", "true", "--learner-nodes", "3"), [{"CPU": 1}] * 3, 1),
    ],
)
def test_the_ranks_of_the_learner_may_be_on_several_nodes(
    ray: FakeRay, flags: tuple[str, ...], bundles: list[dict[str, float]], ranks: int
) -> None:
    ray.script = {"learner": [Report("life", "10.0.0.1", starts=1, port=77), DONE]}
    ray.script |= {f"learner-{number}": [DONE] for number in (2, 3)}
    assert run(*flags, "--max_steps", "3") == 0
    (first, *others, _), strategy, _ = ray.reserved[0]
    assert first == bundles[0] | {"node:10.0.0.1": 0.001}
    assert (others, strategy) == (bundles[1:], "SPREAD")
    commands = [ray.hosted[name][0].command for name in ("learner", "learner-2", "learner-3")[: len(bundles)]]
    for number, (command, meeting) in enumerate(
        zip(commands, [(place("host"), place("port")), *[("10.0.0.1", "77")] * 2], strict=False)
    ):
        assert command.module == "torch.distributed.run"
        assert follows(command, "--nnodes") == str(len(bundles))
        assert follows(command, "--node-rank") == str(number)
        assert follows(command, "--nproc-per-node") == str(ranks)
        assert (follows(command, "--master-addr"), follows(command, "--master-port")) == meeting
        assert command.arguments[command.arguments.index("-m") + 1 :][:2] == ("learner.cli", "train")
        assert follows(command, "--max_steps") == "3"
        assert command.secrets.keys() == {"token"}


def test_servers_that_say_how_they_use_their_gpus_are_believed(ray: FakeRay) -> None:
    assert run("--gpus_per_server", "2", "--server-flags", "--data-parallel-size 2") == 0
    assert "--tensor-parallel-size" not in commands(ray)[0].arguments


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--server-flags", "--port 8000"), "server: port: on a cluster each server has its node's"),
        (("--server-flags", "--token-file x"), "write token_file below `server:` in the recipe"),
        (("--share_gpu", "true"), "share_gpu: the learner has its own GPUs there"),
        (("--deterministic",), "deterministic: which server completes a prompt"),
        (("--split-cores",), "--split-cores is for one machine"),
        (("--cluster", "ray://head:10001"), "give an absolute path"),
        (("--token_file", "missing"), "token_file missing cannot be read: No such file"),
        (("--servers", "0"), "at least 1"),
        (("--servers", "8..2"), "no more at least than at most"),
        (("--servers", "many"), "neither a number nor LEAST..MOST"),
        (("--gpus-per-server", "8"), "1 server of 8 x 1 GPU and 0.125 CPU and a learner of 1 GPU and 1 CPU do not fit"),
        (("--gpus-per-server", "6", "--server-flags", "-dp 2 -tp 3"), "a server needs 6 GPUs and 1 CPU, and no node"),
        (("--gpus-per-server", "6", "--server-flags", "-tp 3"), "tensor_parallel_size 3 and --gpus-per-server 6: on"),
        (("--gpus-per-server", "2", "--cpus-per-server", "8"), "a server needs 2 GPUs and 8 CPUs, and no node"),
        (
            ("--learner-gpus", "4", "--learner-nodes", "3"),
            "on --learner-nodes 3: each node has as many",
        ),
        (("--learner-gpus", "9"), "the learner needs 9 GPUs and 9 CPUs, and no node"),
        (("--learner-nodes", "9", "--use_cpu", "true"), "and a learner of 9 x 1 CPU do not fit"),
        (("--server-flags", "-tp two"), "server: tensor_parallel_size 'two': give a whole number"),
        (("--servers", "8"), "8 servers of 1 GPU and 1 CPU and a learner of 1 GPU and 1 CPU do not fit"),
    ],
)
def test_what_cannot_work_is_one_line(ray: FakeRay, flags: tuple[str, ...], words: str, capsys) -> None:
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not ray.hosted


def test_flags_of_a_cluster_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--config", "mine.yaml", "--servers", "2"]) == 2
    assert "--servers is for a Ray cluster: give --cluster auto as well" in capsys.readouterr().err


def test_a_server_that_cannot_start_ends_all_with_its_reason(ray: FakeRay, capsys: pytest.CaptureFixture[str]) -> None:
    ray.script = {
        "learner": [],
        "server-1": [
            Report("life", "10.0.0.1", starts=1, ended=1, status=2, reason="rollout-server: there is no --wrong")
        ],
    }
    assert run() == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "up      | server-1 on 10.0.0.1 ended with status 2: rollout-server: there is no --wrong"
    assert ray.ended == ["learner", "server-1"]


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was saved."""
    saved: list[Path] = []
    monkeypatch.setattr(up_on_cluster, "last_checkpoint", lambda out: saved[-1] if saved else None)
    return saved


def test_a_learner_that_is_gone_may_still_save(
    checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(tmp_path) as holder:
        has_come_further = up_on_cluster._has_come_further(tmp_path)

        def save_and_end(text: str) -> None:
            assert "waiting for its end" in text
            checkpoints.append(tmp_path / "checkpoint-3")
            holder.kill()

        monkeypatch.setattr(up_on_cluster, "say", save_and_end)
        assert has_come_further()
        check_unused(tmp_path)
    assert not has_come_further(), "nothing newer"


def test_a_learner_that_does_not_end_is_not_waited_for_without_end(
    checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up_on_cluster, "LEARNER_PATIENCE_S", 0.0)
    with held(tmp_path):
        assert not up_on_cluster._has_come_further(tmp_path)()
