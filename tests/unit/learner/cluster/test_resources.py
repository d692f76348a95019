"""What fits on the nodes of a cluster."""

from __future__ import annotations

import pytest

from learner.cluster.resources import Node, ServerNeeds, check_room, has_room
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
    assert has_room(found, ServerNeeds(server), servers, learner) == fits
    if not fits:
        with pytest.raises(LockstepError, match="this Ray cluster"):
            check_room(found, ServerNeeds(server), servers, learner)


@pytest.mark.parametrize(("workers", "fits"), [(3, True), (6, True), (7, False)])
def test_the_workers_of_a_server_may_be_on_several_nodes(workers, fits) -> None:
    assert has_room(GPUS, ServerNeeds({"GPU": 1.0}, workers), 1, {"GPU": 2.0}) == fits


def test_a_learner_at_home_may_take_the_room_of_a_server() -> None:
    assert not has_room(UNEQUAL, ServerNeeds({"GPU": 2.0}), 1, {"GPU": 1.0}, UNEQUAL[0])
