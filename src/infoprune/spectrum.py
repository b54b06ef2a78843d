"""Spectra and what follows from them; knows nothing of models.

For singular values s_1 >= s_2 >= ... the normalised spectrum is p_i = s_i^q / sum_j s_j^q; C(k) = p_1 + ... + p_k.
"""

from __future__ import annotations

import math

import torch

from infoprune.errors import InfoPruneError


def normalize(energies: torch.Tensor) -> torch.Tensor:
    """Spectrum as a probability mass over indices, in descending order.

    Args:
        energies: (n,) non-negative values, s_i^q; tiny negative values from an eigensolver count as zero.

    Returns:
        (n,) float64, summing to 1. A spectrum without energy gives all mass to the first index, so that its effective rank is 1.

    Raises:
        InfoPruneError: Not finite, or empty.
    """
    values = energies.double().clamp_min(0).sort(descending=True).values
    if values.numel() == 0 or not torch.isfinite(values).all():
        raise InfoPruneError("A spectrum must have at least one value, all finite.")
    total = values.sum()
    if total <= 0:
        return torch.zeros_like(values).index_fill_(0, torch.tensor([0]), 1.0)
    return values / total


def effective_rank(energies: torch.Tensor) -> float:
    """ERank = exp(-sum_i p_i ln p_i).

    Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007 (theirs: q = 1). Between 1 and the
    rank; equals n for a flat spectrum; blind to scale.

    Args:
        energies: (n,) s_i^q.
    """
    p = normalize(energies)
    return math.exp(float(-torch.special.xlogy(p, p).sum()))


def ks_truncation(energies: torch.Tensor) -> torch.Tensor:
    """KS distance between a spectrum and its renormalised rank-r truncation, KS(r) = 1 - C(r), for r = 1..n.

    Equals the total variation distance; KL(truncated || full) = -ln C(r). With q = 2 it is ||W - W_r||_F^2 / ||W||_F^2.

    Args:
        energies: (n,) s_i^q.

    Returns:
        (n,) float64, not increasing; the last is 0.
    """
    p = normalize(energies)
    from_here = p.flip(0).cumsum(0).flip(0)  # summed from the small end: 1 - C(r) would lose small tails to rounding
    return torch.cat([from_here[1:], torch.zeros(1, dtype=p.dtype)])


def ks_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """KS distance max_k |C_a(k) - C_b(k)| between two spectra of equal length, over index mass.

    Args:
        a, b: (n,) s_i^q each.

    Raises:
        InfoPruneError: Lengths differ.
    """
    if a.shape != b.shape:
        raise InfoPruneError(f"Spectra of lengths {tuple(a.shape)} and {tuple(b.shape)} can't be compared.")
    return float((normalize(a).cumsum(0) - normalize(b).cumsum(0)).abs().max())


def entropy_bound(ks: float, n: int) -> float:
    """Upper bound on |ln eRank(full) - ln eRank(truncated)| in nats: d ln(n-1) + h_b(d), d = KS (Fannes-Audenaert form)."""
    if n < 2 or ks <= 0:
        return 0.0
    d = min(ks, 1 - 1 / n)  # beyond its maximum at 1 - 1/n the bound is ln n
    binary = -(d * math.log(d) + (1 - d) * math.log1p(-d))
    return d * math.log(n - 1) + binary


def gaussian_rate(energies: torch.Tensor, noise: float) -> float:
    """Information rate of a Gaussian channel, R = 1/2 sum_i ln(1 + lambda_i / s^2), in nats.

    Cover & Thomas, Elements of Information Theory, ch. 9.

    Args:
        energies: (n,) variances lambda_i.
        noise: s^2 > 0.
    """
    return float(0.5 * torch.log1p(energies.double().clamp_min(0) / noise).sum())


def information_loss_bound(energies: torch.Tensor, noise: float) -> torch.Tensor:
    """Bound (sum_i a_i^2 / 2 s^2) KS(r) on the mutual information lost by rank-r truncation of y = W x + N(0, s^2 I), r = 1..n.

    The loss itself is 1/2 sum_{i>r} ln(1 + a_i^2 / s^2), a = svdvals(W S^(1/2)). In nats.

    Args:
        energies: (n,) a_i^2.
        noise: s^2 > 0.
    """
    return energies.double().clamp_min(0).sum() / (2 * noise) * ks_truncation(energies)


def rank_for_ks(energies: torch.Tensor, tolerance: float) -> int:
    """Smallest r with KS(r) <= tolerance: the adaptive rule, one tolerance for many sites (cf. PGSVD, arXiv 2510.05544)."""
    below = (ks_truncation(energies) <= tolerance).nonzero()
    return int(below[0]) + 1 if len(below) else energies.numel()
