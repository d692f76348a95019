"""`in_flight` = `keep` and `carried`: running requests go on with the new version, and spans name each token's."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.servers.client import RolloutClient
from shared.weights import PushReceipt
from tests.integration.support import policy as P
from tests.integration.support.in_flight import check_every_span, generate_across_pushes
from tests.integration.support.policy import FP32, PROBE
from tests.integration.support.server import ServerProcess


@pytest.mark.parametrize("in_flight", ["keep", "carried"])
def test_every_token_is_of_the_version_its_span_names(
    client: RolloutClient, server: ServerProcess, model: Path, in_flight: str
) -> None:
    policies = [P.make_policy(model) for _ in range(4)]
    for seed, policy in enumerate(policies):
        P.randomize(policy, seed=300 + seed)

    def new_requests_have_the_new_version(receipt: PushReceipt) -> None:
        afterwards = P.generate(client, [PROBE], max_tokens=4)
        assert P.largest_gap(policies[receipt.version.step], afterwards) < FP32

    answer = generate_across_pushes(client, server, policies, in_flight, after_push=new_requests_have_the_new_version)
    check_every_span(answer, policies, in_flight)
