"""What fits on the nodes of a cluster."""

from __future__ import annotations

import pytest

from learner.cluster.resources import Needs, Node, check_room, fewest_nodes, has_room
from shared.errors import LockstepError

GPUS = [Node(f"n{i}", f"10.0.0.{i}", {"GPU": 4.0, "CPU": 32.0}) for i in (1, 2)]
UNEQUAL = [Node("home", "10.0.0.1", {"GPU": 2.0}), Node("other", "10.0.0.2", {"GPU": 1.0})]


@pytest.mark.parametrize(
    ("found", "server", "servers", "learner", "fits"),
    [
        (GPUS, {"GPU": 2.0}, 3, {"GPU": 2.0}, True),
        (GPUS, {"GPU": 2.0}, 4, {"GPU": 2.0}, False),
        (GPUS, {"GPU": 3.0}, 2, {"GPU": 2.0}, False),
        (GPUS, {"GPU": 3.0}, 2, {"GPU": 1.0}, True),
        (UNEQUAL, {"GPU": 2.0}, 1, {"GPU": 1.0}, True),
        ([], {"CPU": 1.0}, 1, {"CPU": 1.0}, False),
    ],
)
def test_what_fits(found, server, servers, learner, fits) -> None:
    assert has_room(found, Needs(server), servers, Needs(learner)) == fits
    if not fits:
        with pytest.raises(LockstepError, match="this Ray cluster"):
            check_room(found, Needs(server), servers, Needs(learner))


@pytest.mark.parametrize(("workers", "fits"), [(3, True), (6, True), (7, False)])
def test_the_workers_of_a_server_may_be_on_several_nodes(workers, fits) -> None:
    assert has_room(GPUS, Needs({"GPU": 1.0}, workers), 1, Needs({"GPU": 2.0})) == fits


@pytest.mark.parametrize(
    ("found", "learner", "servers", "home", "fits"),
    [
        (GPUS, Needs({"GPU": 3.0}, 2), 2, None, True),  # one beside each
        (GPUS, Needs({"GPU": 3.0}, 2), 3, None, False),
        (GPUS, Needs({"GPU": 4.0}, 2), 0, GPUS[1], True),
        (GPUS, Needs({"GPU": 2.0}, 2), 4, None, True),
        (GPUS, Needs({"GPU": 1.0}, 9), 0, None, False),
        (UNEQUAL, Needs({"GPU": 1.0}, 2), 1, UNEQUAL[1], True),
        (UNEQUAL, Needs({"GPU": 1.0}, 2), 2, None, False),
        (UNEQUAL, Needs({"GPU": 2.0}), 1, UNEQUAL[1], False),
    ],
)
def test_the_learner_may_be_on_several_nodes(found, learner, servers, home, fits) -> None:
    assert has_room(found, Needs({"GPU": 1.0}), servers, learner, home) == fits


@pytest.mark.parametrize(
    ("found", "gpus", "count"), [(GPUS, 4, 1), (GPUS, 6, 2), (GPUS, 8, 2), (GPUS, 5, 5), (GPUS, 9, None), ([], 1, None)]
)
def test_the_fewest_nodes_with_so_many_gpus(found, gpus, count) -> None:
    assert fewest_nodes(found, gpus) == count


def test_a_learner_at_home_may_take_the_room_of_a_server() -> None:
    assert not has_room(UNEQUAL, Needs({"GPU": 2.0}), 1, Needs({"GPU": 1.0}), UNEQUAL[0])
