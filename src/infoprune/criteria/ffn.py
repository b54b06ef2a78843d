"""Training-free low-rank approximation of FFN linears, seen from the input or from the output side.

A linear y = W x, W (out, in), is replaced by y = W_r x + b' of rank r. With S a moment of x and F a metric on y the loss of a
change is tr(F (W - W_r) S (W - W_r)^T); the best W_r comes from the SVD of R^T W L, where S = L L^T and F = R R^T are Cholesky
factorisations, and its loss is the discarded tail of squared singular values. Both sides of that SVD are d x d eigenproblems, never m x m:

* input linears (up, or gate and up stacked): K = L^T W^T F W L, W_r = W L V_r V_r^T L^(-1). W^T F W is the second moment of W^T g,
  the gradient at the FFN's input: F itself (m x m) is never formed. Gate and up share the r-dimensional input map.
* down projection: K = R^T W S W^T R, W_r = R^(-T) U_r U_r^T R^T W, where W S W^T is the moment of y itself.

Centred moments with b' = b + (W - W_r) mean(x) are never worse on calibration data than uncentred ones.

Calibration shows some of the inputs that will come. A direction that it hardly showed costs nothing to drop, and L^(-1) makes the map
read much of it into the directions kept. ``shrinkage`` s takes S_s = (1 - s) S + s tr(S)/d I in place of S, the linear shrinkage of
Ledoit & Wolf ("A well-conditioned estimator for large-dimensional covariance matrices", J. Multivariate Analysis 88, 2004): of the
inputs that will come a share s has energy in every direction alike. At the down projection this is the z behind y = W z whose energy
is alike, W S_s W^T = (1 - s) W S W^T + s tr(W S W^T) / tr(W W^T) W W^T. Theirs minimises the estimator's error; ours is chosen by what
models keep on data unlike calibration's (``benchmarks/selection.py``).

What S is makes the methods (``whitening``): the moment that calibration saw, E[x x^T] or Cov(x); its diagonal stand-in
diag(E|x|)^(2 alpha) of ASVD (Yuan et al., arXiv 2312.05821); or I, the plain SVD of W, which needs no data. With F = I and uncentred
uniform moments without shrinkage the first is SVD-LLM (Wang et al., arXiv 2403.07378), which whitens on the input side, and Swift-SVD
(arXiv 2604.01609), which projects on the output side: both have the same optimum, which is what is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from infoprune.architecture import FFNSite
from infoprune.linalg import cholesky_factor, descending_eigh, row_products, with_ridge
from infoprune.moments import Moments
from infoprune.site_statistics import SiteStatistics

Metric = Literal["task", "identity"]
Whitening = Literal["full", "diagonal", "none"]
Branch = Literal["joint", "gate", "up", "down"]
METRIC_RIDGE = 0.05
MAGNITUDE_POWER = 0.5  # alpha of ASVD, the default of its public code


@dataclass(frozen=True)
class FFNOptions:
    """A method of factorising FFNs: rows of parameters of one procedure.

    Attributes:
        metric: ``task``: output gradients; ``identity``: plain squared error.
        centred: Covariances with a bias correction, or raw second moments.
        structure: Gate and up share their input map (``joint``), have one each (``separate``), or whichever loses less at equal cost
            (``best``).
        whitening: Moment of the inputs: as measured (``full``), of mean magnitudes per channel (``diagonal``), or the identity (``none``).
        shrinkage: s of a measured moment, from 0, all as measured, to 1, nothing of it.
    """

    metric: Metric = "task"
    centred: bool = True
    structure: Literal["joint", "separate", "best"] = "joint"
    whitening: Whitening = "full"
    shrinkage: float = 0.0


@dataclass(frozen=True)
class Factorization:
    """Everything about one factorised linear (or stacked pair) at any rank.

    Attributes:
        weight: (out, in) in the precision it came in; gate above up when stacked.
        basis: (in, in) orthonormal columns V for an input-side, (out, out) columns U for an output-side factorisation.
        root: Lower Cholesky factor L of S (input side) or R of F (output side).
        energies: Squared singular values, descending, in the metric's unit per token.
        mean: Mean of x (input side) or of W x (output side); zeros without centring.
        side: Which of the two.
    """

    weight: torch.Tensor
    basis: torch.Tensor
    root: torch.Tensor
    energies: torch.Tensor
    mean: torch.Tensor
    side: Literal["input", "output"]

    @cached_property
    def tails(self) -> torch.Tensor:
        """(n + 1,) discarded energy at ranks 0..n."""
        tails = torch.zeros(len(self.energies) + 1, dtype=torch.float64)
        tails[:-1] = self.energies.flip(0).cumsum(0).flip(0)
        return tails

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Down-map A (rank, in), up-map B (out, rank) and bias correction (out,), W_r = B A, in float64."""
        a, b, seen = self.directions(rank)
        return a, b, (self.weight.double() @ self.mean if self.side == "input" else self.mean) - b @ seen

    def directions(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first ``rank`` directions: A and B of :meth:`factors`, and the mean of A x (rank,), zeros without centring."""
        kept, weight = self.basis[:, :rank], self.weight.double()
        if self.side == "input":
            a, b = _solved(self.root.T, kept).T, weight @ (self.root @ kept)
            seen = a @ self.mean
        else:
            right = kept.T @ self.root.T
            a, b, seen = right @ weight, _solved(self.root.T, kept), right @ self.mean
        # Equal norms on both sides: neither factor over- or underflows in a low-precision format.
        scale = (b.norm(dim=0) / a.norm(dim=1).clamp_min(1e-300)).sqrt().clamp(1e-12, 1e12)
        return a * scale[:, None], b / scale, seen * scale


def _solved(upper: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve_triangular(upper, right, upper=True)


def _moment(moments: Moments, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return (moments.covariance, moments.mean) if centred else (moments.second_moment, torch.zeros_like(moments.mean))


def shrunk(moment: torch.Tensor, shape: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """(1 - s) moment + s * (their traces' ratio) * shape, (n, n): of the same total energy; for the identity as shape, Ledoit & Wolf's."""
    if not shrinkage:
        return moment
    total = float(shape.diagonal().sum())
    scale = float(moment.diagonal().sum()) / total if total > 0 else 0.0
    return (1 - shrinkage) * moment + shrinkage * scale * shape


def _stand_in(statistics: SiteStatistics, tap: str, size: int, whitening: Whitening) -> torch.Tensor:
    """(size,) diagonal of an input moment that is not the measured one: diag(E|x|)^(2 alpha), or ones."""
    return statistics.mean_magnitude(tap).pow(2 * MAGNITUDE_POWER) if whitening == "diagonal" else torch.ones(size, dtype=torch.float64)


def factorize_inputs(site: FFNSite, statistics: SiteStatistics, weight: torch.Tensor, branch: Branch, options: FFNOptions) -> Factorization:
    """Factorisation of the linears that read the FFN's input.

    Args:
        site: The FFN.
        statistics: Its moments; ``task`` needs gradients (``branch_gradients`` unless ``branch`` covers all input linears), diagonal
            whitening needs magnitudes.
        weight: (out, hidden) the linear, or gate stacked above up.
        branch: What ``weight`` is.
        options: The method.
    """
    moment, mean = _moment(statistics.pooled("input"), options.centred)
    if options.whitening == "full":
        moment = shrunk(moment, torch.eye(len(moment), dtype=torch.float64), options.shrinkage)
    else:
        moment = torch.diag(_stand_in(statistics, "input", len(moment), options.whitening))
    if options.metric == "task":
        gradient = statistics.input_gradient if branch == "joint" or not site.gated else statistics.branch_gradients[branch]
        assert gradient is not None
        tokens = max(gradient.count, 1)
        ridge = METRIC_RIDGE * statistics.intermediate_gradient_energy / tokens / (site.num_inputs * site.intermediate_size)
        # Where no gradient ever arrives both terms are zero: whatever happens here is free.
        gram = gradient.second_moment + ridge * row_products(weight.T)
    else:
        gram = weight.double().T @ weight.double()
    root = cholesky_factor(moment)
    energies, basis = descending_eigh(root.T @ gram @ root)
    # Where the factor has a floor added, the discarded energy counts what was really there.
    whitened = _solved(root.T, basis)
    present = (whitened * (moment @ whitened)).sum(0).clamp(0, 1)
    return Factorization(weight, basis, root, energies * present, mean, "input")


def factorize_down(statistics: SiteStatistics, weight: torch.Tensor, bias: torch.Tensor | None, options: FFNOptions) -> Factorization:
    """Factorisation of the down projection from its output side.

    Args:
        statistics: Moments of the FFN; ``output`` includes the bias. Diagonal whitening needs magnitudes.
        weight: (hidden, intermediate).
        bias: (hidden,) or ``None``.
        options: The method.
    """
    outputs = statistics.pooled("output")
    offset = torch.zeros_like(outputs.mean) if bias is None else bias.double()
    mean = outputs.mean - offset  # of W x, without the bias
    if options.whitening == "full":
        moment = outputs.covariance if options.centred else outputs.covariance + torch.outer(mean, mean)
        moment = shrunk(moment, row_products(weight), options.shrinkage)
    else:
        moment = weight.double() * _stand_in(statistics, "intermediate", weight.shape[1], options.whitening) @ weight.double().T
    metric, free = torch.eye(len(moment), dtype=torch.float64), False
    if options.metric == "task":
        assert statistics.output_gradient is not None
        free = float(statistics.output_gradient.second_moment.diagonal().sum()) <= 0
        metric = with_ridge(statistics.output_gradient.second_moment, METRIC_RIDGE)
    root = cholesky_factor(metric)
    energies, basis = descending_eigh(root.T @ moment @ root)
    return Factorization(
        weight,
        basis,
        root,
        energies * (0.0 if free else 1.0),
        mean if options.centred else torch.zeros_like(mean),
        "output",
    )
