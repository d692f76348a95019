"""What bench.race makes of trainings that are done, and how it runs them; stand-ins take the learners' place."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bench.race.trainings
from bench.contenders.lockstep import end_run
from bench.race.__main__ import ROWS, RaceBench
from bench.race.figures import Band, against, mean_curve, reached, summary, target_accuracy
from bench.race.rates import RatesBench, ends
from bench.step.figures import ASYNCHRONOUS, TRL, Step, figures
from learner.run_dir.lease import Lease, save_lease
from learner.utils.processes import ProcessGroup
from shared.errors import UnknownRun

S1, S0 = "lockstep S=1", "lockstep S=0"


def points(*accuracies: float, seconds: float = 1.0) -> list[dict[str, float]]:
    """Evaluations every 5 steps of 32 samples, each step of so many seconds."""
    return [
        {"step": 5 * i, "samples": 160 * i, "seconds": 5 * i * seconds, "accuracy": accuracy}
        for i, accuracy in enumerate(accuracies)
    ]


def answer(*accuracies: float, seconds: float = 1.0) -> dict[str, Any]:
    """What a learner tells of its training."""
    curve = points(*accuracies, seconds=seconds)
    steps = [Step(seconds, seconds / 2, seconds / 10, seconds / 2, 100)] * 4
    return {"points": curve, "rewards": [0.25, 0.5], **figures(steps), "max_drift_kl": 0.01, "lags": {"0": 4}}


def row(name: str, seed: int, *accuracies: float, seconds: float = 1.0) -> dict[str, Any]:
    return {"ok": True, "row": name, "seed": seed, **answer(*accuracies, seconds=seconds)}


def test_an_accuracy_is_reached_on_the_line_between_two_evaluations() -> None:
    curve = points(0.2, 0.4, 0.8, 0.6, 0.9)
    assert reached(curve, "samples", 0.5) == 200
    assert reached(curve, "seconds", 0.8) == 10
    assert reached(curve, "step", 0.85) == pytest.approx(15 + 5 * 0.25 / 0.3)


def test_what_was_there_before_takes_nothing_and_what_never_comes_has_no_time() -> None:
    assert reached(points(0.2, 0.4), "seconds", 0.1) == 0
    assert reached(points(0.2, 0.4), "seconds", 0.5) is None
    assert reached([], "seconds", 0.5) is None


def test_a_band_is_the_mean_and_the_deviation_of_seeds_where_all_were_evaluated() -> None:
    curve = mean_curve([points(0.2, 0.4, 0.5, seconds=1.0), points(0.2, 0.6, seconds=2.0)])
    assert [band.step for band in curve] == [0, 5]
    assert asdict(curve[1]) == pytest.approx(asdict(Band(5, 160, 7.5, 0.5, 0.02**0.5)))
    assert mean_curve([points(0.2)])[0].deviation == 0.0
    assert mean_curve([]) == []


def test_the_target_is_the_peers_final_accuracy_less_its_spread_or_the_lowest() -> None:
    ours = [row(S1, 1, 0.2, 0.9), row(S0, 1, 0.2, 0.6)]
    peers = [row(TRL, 1, 0.2, 0.7), row(TRL, 2, 0.2, 0.8)]
    assert target_accuracy([*ours, *peers], TRL) == pytest.approx(0.75 - 0.005**0.5)
    assert target_accuracy([*ours, peers[0]], TRL) == 0.7
    assert target_accuracy(ours, TRL) == 0.6


def test_a_share_of_the_peers_seconds_counts_shared_seeds_up_to_where_the_peer_was_there_first() -> None:
    # Seed 3 has no peer: it must not count.
    ours = [row(S1, seed, 0.2, 0.8, 0.8) for seed in (1, 2)] + [row(S1, 3, 0.2, 0.2, 0.2)]
    # The peer has its final accuracy of 0.6 at step 5 already, after 20 seconds.
    peer = [row(TRL, seed, 0.2, 0.6, 0.6, seconds=4.0) for seed in (2, 1)]
    shares = against([*ours, *peer], S1, TRL)
    assert shares["seconds"] == pytest.approx((5 * 0.4 / 0.6) / 20)
    assert shares["samples"] == pytest.approx(0.4 / 0.6)
    assert shares["seconds_to_target"] == shares["seconds"]
    assert against(ours, S1, TRL) == {}
    assert against([row(S1, 1, 0.2, 0.3), row(TRL, 1, 0.2, 0.6)], S1, TRL) == {}


def test_a_summary_is_over_the_seeds_of_a_row() -> None:
    rows = [row(S1, 1, 0.2, 0.6), row(S1, 2, 0.3, 0.8), {"row": S0, "seed": 1, "skipped": "no time"}]
    [summed] = summary(rows, 0.5, "row")
    assert (summed["row"], summed["seeds"], summed["target"]) == (S1, 2, 0.5)
    assert summed["final"] == pytest.approx(0.7)
    assert summed["deviation"] == pytest.approx(0.02**0.5)
    assert summed["samples_to_target"] == pytest.approx(160 * 0.25 / 0.45)
    assert summed["learner_bubble"] == 0.5
    assert summary([rows[0]], 0.5, "row")[0]["deviation"] is None


def test_rows_become_a_file_tables_and_a_picture(tmp_path: Path) -> None:
    made = RaceBench(["--json", str(tmp_path / "race.json"), "--work-dir", str(tmp_path)])
    made.work = tmp_path
    for training in made.trainings():
        (tmp_path / training.name).mkdir()
        seconds = 4.0 if training.apply is None else 1.0
        made.add(training.about, made.kept(training, answer(0.2, 0.5 + training.about["seed"] / 1000, seconds=seconds)))
    document = json.loads((tmp_path / "race.json").read_text())
    assert document["reached"] == {name: True for name in ROWS if name not in (TRL, ASYNCHRONOUS)}
    assert document["of_trl"][ASYNCHRONOUS]["seconds"] == 1.0
    at = {"seconds": 0.25, "samples": 1.0, "seconds_to_target": 0.25, "samples_to_target": 1.0}
    assert document["of_trl"][S1] == pytest.approx(at)
    assert f"{S1} reaches TRL's final accuracy in 0.25 of its seconds and 1.00 of its samples" in document["headline"]
    assert len(document["rows"]) == 3 * len(ROWS)
    assert len(document["summary"]) == len(ROWS)
    lines = made.table().splitlines()
    assert lines[2].split()[:3] == ["lockstep", "S=1", "42"]
    assert "s to 0.542" in lines[-2 - len(ROWS)]
    made.plot(tmp_path / "race.png", made.measured())
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_whose_seeds_differ_has_two_shares() -> None:
    """Its seeds end at 0.4 and 0.8: it has 0.6 at its end, and less the spread of 0.28 long before."""
    peer = [row(TRL, 1, 0.2, 0.4, 0.4, seconds=4.0), row(TRL, 2, 0.2, 0.4, 0.8, seconds=4.0)]
    shares = against([*(row(S1, seed, 0.2, 0.7, 0.7) for seed in (1, 2)), *peer], S1, TRL)
    assert shares["seconds"] == pytest.approx(4 / 40)
    assert shares["seconds_to_target"] == pytest.approx((5 / 0.5) / (20 / 0.2))  # on the first of their lines


def test_nothing_measured_has_a_table_too() -> None:
    made = RaceBench([])
    made.add({"row": S1, "seed": 42}, {"skipped": "no time"})
    assert made.table().splitlines()[-1].endswith("skipped: no time")


def test_trainings_come_seed_by_seed_and_peers_have_servers_of_their_own() -> None:
    made = RaceBench(["--seeds", "2,1", "--only", f"{S1},{TRL}"])
    found = [(each.about["seed"], each.about["row"], each.server) for each in made.trainings()]
    assert found == [
        (1, S1, "columns"),
        (1, TRL, made.trainings()[1].name),
        (2, S1, "columns"),
        (2, TRL, made.trainings()[3].name),
    ]
    assert len({server for *_, server in found}) == 3


def test_every_training_is_of_our_trainer_or_of_one_of_trls() -> None:
    found = {each.about["row"]: each for each in RaceBench(["--seeds", "42"]).trainings()}
    assert {row: each.peer for row, each in found.items() if each.peer} == {TRL: TRL, ASYNCHRONOUS: ASYNCHRONOUS}
    assert found[ASYNCHRONOUS].server == found[ASYNCHRONOUS].name
    assert "AsyncGRPOTrainer" in found[ASYNCHRONOUS].about["note"]


def test_a_training_that_is_done_is_run_again_only_with_other_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bench_of(*flags: str) -> RaceBench:
        made = RaceBench(["--work-dir", str(tmp_path), *flags])
        made.work = tmp_path
        return made

    first, training = bench_of(), bench_of().trainings()[0]
    (tmp_path / training.name).mkdir()
    assert first.done(training) is None
    kept = first.kept(training, answer(0.2, 0.5))
    assert (kept["before"], kept["after"], kept["seconds"]) == (0.2, 0.5, 5.0)
    assert bench_of().done(training) == kept
    assert bench_of("--batch", "16").done(training) is None
    assert bench_of("--eval-size", "16").done(training) is None
    changed = tmp_path / "recipe.yaml"
    changed.write_text(Path(first.options.config).read_text().replace("lora_r: 16", "lora_r: 8"))
    other = bench_of("--config", str(changed))
    monkeypatch.setattr(other, "words", first.words)  # of the same file, before it was changed
    assert other.done(training) is None
    other = bench_of("--steps", "3")
    assert other.done(other.trainings()[0]) is None


@pytest.fixture
def learners(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Let snippets of Python take the place of learners: by the name of the training, "" for all others."""
    done = f"pathlib.Path(sys.argv[2]).write_text({json.dumps(answer(0.2, 0.5))!r})"
    scripts = {"": f"while not pathlib.Path(sys.argv[3]).exists(): time.sleep(0.01)\n{done}"}

    def group(command: list[str], env: Any, log: Path, **_: Any) -> ProcessGroup:
        script = "import pathlib, sys, time\n" + scripts.get(log.parent.name, scripts[""])
        return ProcessGroup([sys.executable, "-c", script, *command[3:]], {}, log)

    monkeypatch.setattr(bench.race.trainings, "ProcessGroup", group)
    return scripts


def raced(work: Path, *flags: str, device: str = "cpu", dead: str = "") -> RaceBench:
    """Run the race of a bench whose servers are none."""
    made = RaceBench(["--seeds", "42", "--only", f"{S1},{TRL},{S0}", *flags])
    made.work, made.model, made.cores, made.device = work, work, [], device
    waiting = made.trainings()
    names = [training.server for training in waiting]
    servers = {
        name: SimpleNamespace(
            url="http://127.0.0.1:1", tail=lambda: "log of the server", has_ended=lambda name=name: name == dead
        )
        for name in names
    }
    made.race(list(waiting), servers)  # type: ignore[misc]
    return made


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])  # where the next one waits meanwhile
def test_a_learner_that_fails_loses_no_other_row(tmp_path: Path, learners: dict[str, str], device: str) -> None:
    learners[RaceBench(["--seeds", "42"]).trainings()[1].name] = "raise SystemExit('no memory')"
    rows = {one["row"]: one for one in raced(tmp_path, device=device).rows}
    assert rows[S1]["after"] == rows[S0]["after"] == 0.5
    assert "the learner ended with status 1" in rows[TRL]["error"]
    assert "no memory" in rows[TRL]["error"]


def test_a_learner_that_takes_too_long_is_ended_and_leaves_its_place(
    tmp_path: Path, learners: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    monkeypatch.setattr(bench.race.trainings, "end_run", lambda url, output: ended.append((url, output.parent.name)))
    learners[RaceBench(["--seeds", "42"]).trainings()[0].name] = "time.sleep(600)"
    rows = {one["row"]: one for one in raced(tmp_path, "--row-limit-s", "0").rows}
    assert "was not done in time" in rows[S1]["error"]
    assert ("http://127.0.0.1:1", RaceBench([]).trainings()[0].name) in ended


def test_a_learner_whose_server_has_ended_waits_for_nothing(tmp_path: Path, learners: dict[str, str]) -> None:
    training = RaceBench(["--seeds", "42"]).trainings()[1]
    learners[training.name] = "time.sleep(600)"
    rows = {one["row"]: one for one in raced(tmp_path, dead=training.server).rows}
    assert "log of the server" in rows[TRL]["error"]
    assert rows[S0]["after"] == 0.5


def test_the_run_of_a_killed_learner_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted = []

    class Client:
        def __init__(self, url: str) -> None:
            self.url = url

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def delete_run(self, run_id: str, lease: str) -> None:
            deleted.append((self.url, run_id, lease))
            raise UnknownRun("it has none")

    monkeypatch.setattr("bench.contenders.lockstep.RolloutClient", Client)
    save_lease(tmp_path, Lease("run-1", "secret", 3))
    end_run("http://server", tmp_path)
    assert deleted == [("http://server", "run-1", "secret")]


def test_after_the_deadline_nothing_begins(tmp_path: Path, learners: dict[str, str]) -> None:
    rows = raced(tmp_path, "--deadline-s", "0").rows
    assert [one["skipped"] for one in rows] == ["the deadline had passed"] * 3


def test_only_the_first_begins_while_the_next_waits(tmp_path: Path, learners: dict[str, str]) -> None:
    names = [training.name for training in RaceBench(["--seeds", "42", "--only", f"{S1},{TRL}"]).trainings()]
    other = tmp_path / names[1] / "go"
    first = f"assert not pathlib.Path({str(other)!r}).exists()\n" + learners[""]
    learners[names[0]] = first + f"\nassert not pathlib.Path({str(other)!r}).exists()"
    assert [one["ok"] for one in raced(tmp_path, "--only", f"{S1},{TRL}", device="cuda:0").rows] == [True, True]


def test_words_of_a_training_are_those_of_the_recipe_and_the_row() -> None:
    made = RaceBench(["--task", "two-digit", "--batch", "64", "--train-flags", "--learning_rate 1e-4"])
    words = made.words(made.trainings()[0])
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert json.loads(given["--task_args"])["min_digits"] == 2
    assert json.loads(given["--task_args"])["partial_credit"] is False
    assert given["--per_device_train_batch_size"] == "64"
    assert given["--learning_rate"] == "1e-4"
    assert given["--max_staleness"] == "1"


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--task", "chess"], "unknown task"),
        (["--eval-every", "0"], "1 or more"),
        (["--only", "lockstep, S = 1"], "unknown row"),
    ],
)
def test_refused(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        RaceBench(flags)
    assert word in capsys.readouterr().err


def test_rates_are_trained_in_the_order_in_which_they_are_given() -> None:
    made = RatesBench(["--rates", "1e-4:20,1e-6:60", "--seeds", "1,2"])
    found = [(each.about["seed"], each.about["lr"], each.apply) for each in made.trainings()]
    assert found[:4] == [(1, 1e-4, "columns"), (1, 1e-4, "adapter"), (1, 1e-6, "columns"), (1, 1e-6, "adapter")]
    assert len({each.name for each in made.trainings()}) == 8
    words = made.trainings()[3].words
    assert words[:2] == ("--packed_passes", "false")
    assert words[words.index("--max_steps") + 1] == "60"
    assert float(words[words.index("--learning_rate") + 1]) == 1e-6


def test_rates_become_a_file_a_table_and_a_picture(tmp_path: Path) -> None:
    made = RatesBench(["--work-dir", str(tmp_path), "--rates", "1e-4:20,1e-6:60"])
    made.work = tmp_path
    for training in made.trainings():
        (tmp_path / training.name).mkdir()
        made.add(training.about, made.kept(training, answer(0.2, 0.5) | {"max_logprob_gap": 0.5}))
    assert len(made.document()["summary"]) == 4
    assert "lr 1e-06, two roundings: 0.200 -> 0.500 right (0.000), 3 seeds" in made.document()["headline"]
    assert made.table().splitlines()[-1].split()[:4] == ["1e-06", "two", "roundings", "3"]
    made.plot(tmp_path / "rates.png", made.measured())
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_ends_of_a_curve() -> None:
    assert ends([0.0, 0.2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6, 0.8]) == (0.1, 0.7)
    assert ends([0.25]) == (0.25, 0.25)
