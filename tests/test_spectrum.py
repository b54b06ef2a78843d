from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune import InfoPruneError
from infoprune.spectrum import (
    effective_rank,
    entropy_bound,
    gaussian_rate,
    information_loss_bound,
    ks_distance,
    ks_truncation,
    normalize,
    rank_for_ks,
)

spectra = st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=40).map(lambda v: torch.tensor(sorted(v, reverse=True), dtype=torch.float64))


@given(spectra, st.floats(1e-3, 1e3))
def test_effective_rank_is_bounded_and_scale_free(energies, scale):
    rank = effective_rank(energies)
    assert 1 - 1e-9 <= rank <= len(energies) + 1e-9
    assert effective_rank(scale * energies) == pytest.approx(rank, rel=1e-9)


def test_effective_rank_of_a_flat_spectrum_is_its_length():
    assert effective_rank(torch.ones(17)) == pytest.approx(17)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(5)) == 1


def test_effective_rank_is_invariant_to_orthogonal_maps():
    torch.manual_seed(0)
    w = torch.randn(12, 9, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    assert effective_rank(torch.linalg.svdvals(q @ w) ** 2) == pytest.approx(effective_rank(torch.linalg.svdvals(w) ** 2), rel=1e-10)


@given(spectra)
def test_effective_rank_never_decreases_with_the_truncation_rank(energies):
    ranks = [effective_rank(energies[:r]) for r in range(1, len(energies) + 1)]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(ranks))


@given(spectra)
def test_ks_of_truncation_is_one_minus_the_kept_mass_and_the_total_variation(energies):
    p, ks = normalize(energies), ks_truncation(energies)
    for r in (1, len(p) // 2 + 1, len(p)):
        q = torch.where(torch.arange(len(p)) < r, p, torch.zeros_like(p))
        q = q / q.sum()
        assert float(ks[r - 1]) == pytest.approx(1 - float(p[:r].sum()), abs=1e-12)
        assert float(ks[r - 1]) == pytest.approx(0.5 * float((p - q).abs().sum()), abs=1e-9)
        assert ks_distance(p, q) == pytest.approx(float(ks[r - 1]), abs=1e-9)
        kl = float(torch.special.xlogy(q[:r], q[:r] / p[:r]).sum())
        assert kl == pytest.approx(-math.log(1 - float(ks[r - 1])), abs=1e-8)


def test_ks_with_energies_is_the_relative_squared_error():
    torch.manual_seed(1)
    w = torch.randn(10, 7, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    truncated = (u[:, :3] * s[:3]) @ vh[:3]
    assert float(ks_truncation(s**2)[2]) == pytest.approx(float((w - truncated).norm() ** 2 / w.norm() ** 2), rel=1e-10)


@given(spectra)
def test_entropy_bound_holds(energies):
    n = len(energies)
    for r in range(1, n + 1):
        gap = abs(math.log(effective_rank(energies)) - math.log(effective_rank(energies[:r])))
        assert gap <= entropy_bound(float(ks_truncation(energies)[r - 1]), n) + 1e-9


@given(spectra, st.floats(1e-3, 1e3))
def test_information_bound_holds(energies, noise):
    bound = information_loss_bound(energies, noise)
    for r in range(1, len(energies) + 1):
        loss = 0.5 * float(torch.log1p(energies[r:] / noise).sum())
        assert loss <= float(bound[r - 1]) * (1 + 1e-9) + 1e-9


@given(spectra, st.floats(1e-3, 1e3))
def test_rate_is_zero_for_nothing_and_grows_with_energy(energies, noise):
    assert gaussian_rate(torch.zeros(4), noise) == 0
    assert gaussian_rate(1.5 * energies, noise) > gaussian_rate(energies, noise) > 0


@settings(max_examples=50)
@given(spectra, st.floats(0.001, 0.9))
def test_rank_for_ks_is_the_smallest_that_fits(energies, tolerance):
    rank, ks = rank_for_ks(energies, tolerance), ks_truncation(energies)
    assert ks[rank - 1] <= tolerance
    assert rank == 1 or ks[rank - 2] > tolerance


@pytest.mark.parametrize("bad", [torch.tensor([]), torch.tensor([1.0, math.nan]), torch.tensor([math.inf])])
def test_bad_spectra_are_refused(bad):
    with pytest.raises(InfoPruneError):
        normalize(bad)


def test_spectra_of_unequal_length_are_refused():
    with pytest.raises(InfoPruneError, match="lengths"):
        ks_distance(torch.ones(2), torch.ones(3))
