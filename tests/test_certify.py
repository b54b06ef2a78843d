from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from infoprune.errors import DataError
from infoprune.evaluation.certify import (
    ByImage,
    bets,
    betting_evidence,
    betting_upper,
    bootstrap_draws,
    by_image,
    empirical_bernstein_upper,
    fixed_sequence,
    mcnemar,
    p_value,
    rate_interval,
    stakes,
    upper_bounds,
)
from infoprune.evaluation.sample_size import Expectation, chance, images_needed, least_images, perfect_evidence

CLUSTERS = st.lists(
    st.integers(1, 6).flatmap(lambda m: st.tuples(st.integers(-m, m), st.just(m))), min_size=2, max_size=40
)  # (sum of differences, questions) of each image


def clusters(pairs) -> ByImage:
    sums, sizes = np.array(pairs, dtype=float).T
    return ByImage(sums, sizes)


def equal(images: int, per_image: int, *, lost: int = 0) -> ByImage:
    sums = np.zeros(images)
    sums[:lost] = per_image
    return ByImage(sums, np.full(images, float(per_image)))


def test_questions_are_summed_by_image():
    data = by_image(np.array([1, 0, -1, 1.0, 0.5]), ["a", "b", "a", "b", "b"])
    assert data.sums.tolist() == [0, 1.5]
    assert data.sizes.tolist() == [2, 3]
    assert data.mean == pytest.approx(0.3)


@pytest.mark.parametrize("bad", [[], [1.5], [float("nan")]])
def test_what_is_no_difference_of_scores_is_refused(bad):
    with pytest.raises(DataError):
        by_image(np.array(bad), ["a"] * len(bad))


@settings(max_examples=60, deadline=None)
@given(CLUSTERS, st.sampled_from([0.8, 0.95, 0.99]))
def test_bounds_are_above_the_measured_drop_grow_with_confidence_and_ignore_order(pairs, confidence):
    data = clusters(pairs)
    turned = ByImage(data.sums[::-1], data.sizes[::-1])
    for bound in (betting_upper, empirical_bernstein_upper):
        found = bound(data, confidence)
        assert data.mean - 1e-9 <= found <= 1
        assert found <= bound(data, (1 + confidence) / 2) + 1e-9
        assert bound(turned, confidence) == pytest.approx(found, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(CLUSTERS, st.floats(0.01, 0.9), st.sampled_from([None, 0.05]))
def test_evidence_grows_with_the_drop_and_decides_as_the_bound_does(pairs, drop, target):
    data = clusters(pairs)
    evidence = [betting_evidence(data, d, 0.95, target=target) for d in (drop / 2, drop, (1 + drop) / 2)]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(evidence))
    bound = betting_upper(data, 0.95, target=target)
    if abs(bound - drop) > 1e-6:
        assert (evidence[1] >= math.log(20)) == (bound <= drop)


def test_an_image_that_lost_everything_refutes_the_largest_bet_at_every_drop():
    data = clusters([(0, 1), (3, 3)])
    assert {betting_evidence(data, drop, 0.95) for drop in (0.0107, 0.0216, 0.3, 0.51, 0.9)} == {-math.inf}


@settings(max_examples=60, deadline=None)
@given(CLUSTERS)
def test_losing_more_never_lowers_a_bound(pairs):
    data = clusters(pairs)
    worse = ByImage(np.minimum(data.sums + 1, data.sizes), data.sizes)
    assert betting_upper(worse, 0.95) >= betting_upper(data, 0.95) - 1e-9
    assert p_value(worse, 0.1, 0.95) >= p_value(data, 0.1, 0.95) - 1e-12


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 4), (5, 5)])
@pytest.mark.parametrize("drop", [0.05, 0.3])
def test_expected_capital_is_at_most_one_at_the_hypothesis(sizes, drop):
    """By enumeration: independent images that are not alike, with a mean drop of exactly ``drop``, worst or mixed within an image."""
    m = np.array(sizes, dtype=float)
    tilt = np.linspace(0.5, 1.5, len(m))
    lost = drop * m.sum() * tilt / (tilt @ m)  # probabilities of losing a whole image; sum lost * m = drop * sum m
    assert lost @ m == pytest.approx(drop * m.sum())
    fractions, weights = bets(np.tile(m, 50), 0.95, None)
    for outcome in range(2):
        value = m if outcome == 0 else np.maximum(m - 1, 1)  # in the second case an image loses all but one, more often
        p = np.minimum(lost * m / value, 1)
        if (p >= 1).any():
            continue
        stake_lost, stake_kept = stakes(value, m, m.max(), drop), stakes(np.zeros_like(m), m, m.max(), drop)
        per_image = p * (1 - fractions[:, None] * stake_lost) + (1 - p) * (1 - fractions[:, None] * stake_kept)
        assert (stake_lost <= 1).all()
        assert weights @ per_image.prod(1) <= 1 + 1e-12
        assert weights.sum() == pytest.approx(1)


def test_a_perfect_outcome_needs_as_many_images_as_an_exact_test():
    for max_drop in (0.005, 0.01, 0.05):
        least = least_images(max_drop, 0.95)
        exact = math.ceil(math.log(0.05) / math.log(1 - max_drop))
        assert exact <= least <= 1.01 * exact + 1
        for per_image in (1, 10):
            assert p_value(equal(least, per_image), max_drop, 0.95) <= 0.05
            assert p_value(equal(least - 1, per_image), max_drop, 0.95) > 0.05
            assert betting_upper(equal(least, per_image), 0.95, target=max_drop) <= max_drop


def test_whole_images_count_as_one_whatever_their_size():
    assert betting_upper(equal(300, 1, lost=3), 0.95) == pytest.approx(betting_upper(equal(300, 10, lost=3), 0.95))


def test_betting_is_near_the_exact_binomial_bound_and_far_below_empirical_bernstein():
    data = equal(2000, 1, lost=4)
    exact = beta.ppf(0.95, 5, 1996)  # Clopper-Pearson
    assert exact <= betting_upper(data, 0.95) <= 1.6 * exact
    assert betting_upper(data, 0.95) < 0.6 * empirical_bernstein_upper(data, 0.95)


def test_one_large_image_loosens_the_bound():
    even, uneven = equal(600, 4), equal(600, 4)
    uneven.sizes[0] = 60
    assert betting_upper(uneven, 0.95) > 3 * betting_upper(even, 0.95)


def test_bootstrap_draws_have_the_mean_and_spread_of_images():
    data = equal(400, 5, lost=40)
    draws = bootstrap_draws(data)
    assert draws.mean() == pytest.approx(0.1, abs=0.001)
    assert draws.std() == pytest.approx(math.sqrt(0.1 * 0.9 / 400), rel=0.05)
    assert upper_bounds(data, 0.95).bootstrap == pytest.approx(0.1 + 1.645 * math.sqrt(0.09 / 400), abs=0.003)


def test_rate_interval_covers_and_knows_certainty():
    assert rate_interval(equal(500, 2), 0.95)[0] == 0
    assert rate_interval(equal(500, 2), 0.95)[1] < 0.02
    assert rate_interval(equal(500, 2, lost=500), 0.95)[1] == 1
    low, high = rate_interval(equal(500, 2, lost=50), 0.95)
    assert 0.04 < low < 0.1 < high < 0.18


def test_mcnemar_is_the_exact_binomial_test():
    dense, compressed = np.array([True] * 9 + [False]), np.array([False] * 8 + [True] + [True])
    found = mcnemar(dense, compressed)
    assert (found.dense_only, found.compressed_only) == (8, 1)
    assert found.p_value == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(dense, dense).p_value == 1


def test_fixed_sequence_stops_at_the_first_failure():
    assert fixed_sequence([0.01, 0.05, 0.2, 0.001], 0.95) == 2
    assert fixed_sequence([0.06, 0.0], 0.95) == 0
    assert fixed_sequence([float("nan")], 0.95) == 0
    assert fixed_sequence([0.0, 0.0], 0.95) == 2


SETTINGS: list[Any] = [
    (300, 1, Expectation(0.02, 0.02, 0)), (120, 5, Expectation(0.05, 0.1, 0.5)), (150, 10, Expectation(0.02, 0.02, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("images", "per_image", "true"), SETTINGS)
def test_coverage_by_simulation(images, per_image, true):
    """At the true drop the test rejects in at most 5% of the draws, binomial error allowed for."""
    violated = chance(images, per_image, true.drop, 0.95, true, draws=2000)
    assert violated <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_planning_keeps_its_promise():
    expected = Expectation.within(0.02)
    needed = images_needed(5, 0.02, 0.95, expected)
    assert needed is not None
    assert needed >= least_images(0.02, 0.95)
    assert chance(needed, 5, 0.02, 0.95, expected, seed=9, draws=4000) >= 0.75
    assert chance(needed // 2, 5, 0.02, 0.95, expected, seed=9, draws=4000) < 0.8
    assert images_needed(5, 0.02, 0.95, Expectation(0.02, 0.05)) is None
    assert perfect_evidence(np.full(needed, 5), 0.02, 0.95) > 1
