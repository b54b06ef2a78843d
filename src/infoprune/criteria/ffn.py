"""Training-free low-rank approximation of FFN linears, seen from the input or from the output side.

A linear y = W x, W (out, in), is replaced by y = W_r x + b' of rank r. With S a moment of x and F a metric on y the loss of a
change is tr(F (W - W_r) S (W - W_r)^T); the best W_r comes from the SVD of F^(1/2) W S^(1/2), and its loss is the discarded
tail of squared singular values. Both sides of that SVD are d x d eigenproblems, never m x m:

* input linears (up, or gate and up stacked): K = S^(1/2) W^T F W S^(1/2), W_r = W S^(1/2) V_r V_r^T S^(-1/2). W^T F W is the second
  moment of W^T g, the gradient at the FFN's input: F itself (m x m) is never formed. Gate and up share the r-dimensional input map.
* down projection: K = F^(1/2) W S W^T F^(1/2), W_r = F^(-1/2) U_r U_r^T F^(1/2) W, where W S W^T is the moment of y itself.

Centred moments with b' = b + (W - W_r) mean(x) are never worse on calibration data than uncentred ones.

What S is makes the methods (``whitening``): the moment that calibration saw, E[x x^T] or Cov(x); its diagonal stand-in
diag(E|x|)^(2 alpha) of ASVD (Yuan et al., arXiv 2312.05821); or I, the plain SVD of W, which needs no data. With F = I and uncentred
uniform moments the first is SVD-LLM (Wang et al., arXiv 2403.07378), which whitens on the input side by a Cholesky factor, and Swift-SVD
(arXiv 2604.01609), which projects on the output side: both have the same optimum, which is what is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from infoprune.architecture import FFNSite
from infoprune.calibrate import Moments, SiteStatistics
from infoprune.linalg import RELATIVE_FLOOR, descending_eigh, root_and_inverse, with_ridge

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
    """

    metric: Metric = "task"
    centred: bool = True
    structure: Literal["joint", "separate", "best"] = "joint"
    whitening: Whitening = "full"


@dataclass(frozen=True)
class Factorization:
    """Everything about one factorised linear (or stacked pair) at any rank.

    Attributes:
        weight: (out, in) float64; gate above up when stacked.
        basis: (in, in) orthonormal columns V for an input-side, (out, out) columns U for an output-side factorisation.
        root, inverse_root: Square root of S (input side) or F (output side), and its inverse.
        energies: Squared singular values, descending, in the metric's unit per token.
        mean: Mean of x (input side) or of W x (output side); zeros without centring.
        side: Which of the two.
    """

    weight: torch.Tensor
    basis: torch.Tensor
    root: torch.Tensor
    inverse_root: torch.Tensor
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
        kept = self.basis[:, :rank]
        if self.side == "input":
            a, b = kept.T @ self.inverse_root, self.weight @ (self.root @ kept)
            correction = self.weight @ self.mean - b @ (a @ self.mean)
        else:
            left = self.inverse_root @ kept
            a, b = (kept.T @ self.root) @ self.weight, left
            correction = self.mean - left @ (kept.T @ (self.root @ self.mean))
        # Equal norms on both sides: neither factor over- or underflows in a low-precision format.
        scale = (b.norm(dim=0) / a.norm(dim=1).clamp_min(1e-300)).sqrt().clamp(1e-12, 1e12)
        return a * scale[:, None], b / scale, correction


def _moment(moments: Moments, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return (moments.covariance, moments.mean) if centred else (moments.second_moment, torch.zeros_like(moments.mean))


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
    weight = weight.double()
    moment, mean = _moment(statistics.pooled("input"), options.centred)
    if options.whitening != "full":
        moment = torch.diag(_stand_in(statistics, "input", len(moment), options.whitening))
    gram = weight.T @ weight
    if options.metric == "task":
        gradient = statistics.input_gradient if branch == "joint" or not site.gated else statistics.branch_gradients[branch]
        assert gradient is not None
        tokens = max(gradient.count, 1)
        ridge = METRIC_RIDGE * statistics.intermediate_gradient_energy / tokens / (site.num_inputs * site.intermediate_size)
        # Where no gradient ever arrives both terms are zero: whatever happens here is free.
        gram = gradient.second_moment + ridge * gram
    root, inverse = root_and_inverse(moment, floor=RELATIVE_FLOOR)
    energies, basis = descending_eigh(root @ gram @ root)
    # Directions raised to the eigenvalue floor carry less than the floor: the discarded energy counts what was really there.
    whitened = inverse @ basis
    present = (whitened * (moment @ whitened)).sum(0).clamp(0, 1)
    return Factorization(weight, basis, root, inverse, energies * present, mean, "input")


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
    else:
        moment = weight.double() * _stand_in(statistics, "intermediate", weight.shape[1], options.whitening) @ weight.double().T
    metric, free = torch.eye(len(moment), dtype=torch.float64), False
    if options.metric == "task":
        assert statistics.output_gradient is not None
        free = float(statistics.output_gradient.second_moment.diagonal().sum()) <= 0
        metric = with_ridge(statistics.output_gradient.second_moment, METRIC_RIDGE)
    root, inverse = root_and_inverse(metric, floor=RELATIVE_FLOOR)
    energies, basis = descending_eigh(root @ moment @ root)
    return Factorization(
        weight.double(),
        basis,
        root,
        inverse,
        energies * (0.0 if free else 1.0),
        mean if options.centred else torch.zeros_like(mean),
        "output",
    )
