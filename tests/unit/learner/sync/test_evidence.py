"""What can be known of the served version from blurred logprobs, against drawn numbers."""

from __future__ import annotations

import numpy as np
import pytest

from learner.sync.evidence import Evidence, Suspicion, closest, share, without

ROWS = np.repeat(np.arange(8), 88)
NOISE = 0.08
#: Rms in nats by which one step of AdamW moves SmolLM2's logprobs, at learning rates 1e-5 and 1e-6.
STEPS = {1e-5: 0.05, 1e-6: 0.005}


def movement(rng, size):
    return rng.normal(size=len(ROWS)) * size


def test_share_of_what_arrived():
    rng = np.random.default_rng(0)
    moved, noise = movement(rng, 0.05), movement(rng, NOISE)
    for arrived in (1.0, 0.4, 0.0, -3.0):
        found = share(noise + (arrived - 1) * moved, moved, ROWS)
        assert abs(found.value - arrived) < 4 * found.error
        assert 0.03 < found.error < 0.12
    assert share(noise, 0 * moved, ROWS) is None


def test_the_error_is_that_of_sequences_and_of_unequal_tokens():
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(300):
        moved = movement(rng, 0.05) * np.exp(rng.normal(size=len(ROWS)))
        noise = movement(rng, NOISE) * np.exp(rng.normal(size=len(ROWS)))
        drifts = rng.normal(size=8)[ROWS] * 0.5 * moved  # tokens of one sequence err together
        found = share(noise + drifts, moved, ROWS)
        values.append(found.value)
        errors.append(found.error)
    assert np.mean(values) == pytest.approx(1.0, abs=0.05)
    assert np.std(values) < 1.2 * np.mean(errors)


def proofs_until_alarm(rng, size, proofs, arrived=0.0):
    suspicion = Suspicion()
    for proof in range(1, proofs + 1):
        moved = movement(rng, size)
        if suspicion.add(Evidence.of(movement(rng, NOISE) + (arrived - 1) * moved, moved, ROWS, NOISE / 4)):
            return proof
    return None


@pytest.mark.parametrize(("rate", "within"), [(1e-5, 3), (1e-6, 40)])
def test_a_server_one_step_behind_is_accused(rate, within):
    rng = np.random.default_rng(0)
    delays = [proofs_until_alarm(rng, STEPS[rate], 80) for _ in range(50)]
    assert all(delay is not None and delay <= within for delay in delays), delays


def test_a_server_that_stopped_is_accused_within_20_steps_at_a_small_learning_rate():
    """What is missing adds up, since AdamW's steps point the same way for a while: five times the last one here."""
    rng = np.random.default_rng(0)
    delays = [proofs_until_alarm(rng, STEPS[1e-6], 20, arrived=-4.0) for _ in range(50)]
    assert all(delay is not None and delay <= 5 for delay in delays), delays


@pytest.mark.parametrize("rate", STEPS)
def test_a_healthy_server_is_never_accused(rate):
    rng = np.random.default_rng(1)
    assert not any(proofs_until_alarm(rng, STEPS[rate], 2000, arrived=1.0) for _ in range(2))


@pytest.mark.parametrize("turn", [0.0, 0.1, 0.5], ids="the direction turns by {}".format)
@pytest.mark.parametrize("fresh", [0.0, 0.1, 0.5], ids="{} of the noise is new".format)
def test_steps_that_meet_the_same_noise_again_are_no_further_evidence(turn, fresh):
    """Of a reward that no longer differs only momentum is left: steps shrink, their direction and the noise stay."""
    rng = np.random.default_rng(2)
    assert not any(alarm_in_a_training_that_stands_still(rng, turn, fresh) for _ in range(200))


def alarm_in_a_training_that_stands_still(rng, turn, fresh, arrived=1.0):
    suspicion, size = Suspicion(), 0.02
    direction, noise = movement(rng, 1.0), movement(rng, NOISE)
    for _ in range(150):
        direction = np.sqrt(1 - turn**2) * direction + turn * movement(rng, 1.0)
        noise = np.sqrt(1 - fresh**2) * noise + fresh * movement(rng, NOISE)
        moved = size * direction
        if suspicion.add(Evidence.of(noise + (arrived - 1) * moved, moved, ROWS, NOISE / 4)):
            return True
        size *= 0.95
    return False


def test_it_is_accused_even_where_steps_meet_the_same_noise():
    rng = np.random.default_rng(3)
    found = [alarm_in_a_training_that_stands_still(rng, 0.5, 0.5, arrived=0.0) for _ in range(50)]
    assert sum(found) >= 45


@pytest.mark.parametrize(("lasting", "same_way", "size"), [(0.05, 0.78, 1e-3), (0.3, 0.8, 3e-3), (0.5, 1.0, 2e-3)])
def test_noise_of_which_a_part_lasts_is_no_further_evidence(lasting, same_way, size):
    """In bfloat16, of steps of 0.002 times the noise: the next meets 0.2 of it again, the one 14 later still 0.05."""
    rng = np.random.default_rng(5)

    def accused():
        suspicion, noise, direction = Suspicion(), movement(rng, NOISE), movement(rng, 1.0)
        for _ in range(400):
            moved = size * (np.sqrt(same_way) * direction + np.sqrt(1 - same_way) * movement(rng, 1.0))
            residual = np.sqrt(lasting) * noise + np.sqrt(1 - lasting) * movement(rng, NOISE)
            if suspicion.add(Evidence.of(residual, moved, ROWS, NOISE / 4)):
                return True
        return False

    assert not any(accused() for _ in range(40))


def test_it_gets_stuck_late_and_is_accused_as_fast():
    rng, suspicion = np.random.default_rng(4), Suspicion()

    def found(value):
        moved = movement(rng, 0.05)
        return Evidence.of(movement(rng, NOISE) + (value - 1) * moved, moved, ROWS)

    for _ in range(1000):
        assert not suspicion.add(found(1.0))
    assert not suspicion.add(found(0.0)), "one proof is not enough"
    assert suspicion.add(found(0.0))


def test_what_one_proof_tells_too_loudly_is_not_made_up_for_later():
    rng, suspicion, moved = np.random.default_rng(6), Suspicion(), np.ones(len(ROWS))
    outlier = Evidence.of(movement(rng, NOISE) - 0.3 * moved, 0.3 * moved, ROWS)
    assert not suspicion.add(outlier)
    assert suspicion.total == pytest.approx(suspicion.limit / 2)
    nothing = Evidence.of(movement(rng, NOISE), 1e-6 * moved, ROWS)
    assert not any(suspicion.add(nothing) for _ in range(20))


def test_names_the_closest_version():
    rng = np.random.default_rng(0)
    base = movement(rng, 1.0)
    versions = {"r@0.3": base, "r@0.2": base + movement(rng, 0.05), "the base": base + movement(rng, 0.5)}
    assert closest(versions["r@0.2"] + movement(rng, NOISE), versions) == "r@0.2"


def test_a_lasting_mismatch_is_taken_out():
    rng = np.random.default_rng(0)
    lasting, noise = movement(rng, 0.5), movement(rng, 0.05)
    assert np.std(without(lasting + noise, lasting)) == pytest.approx(0.05, rel=0.1)
    assert np.array_equal(without(noise, 0 * lasting), noise)
