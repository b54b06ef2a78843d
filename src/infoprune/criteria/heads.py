"""Criteria for attention heads: the set-wise information loss, and rankings by a score per unit.

Per block there is one covariance S of the concatenated contexts c, taken at the input of the output projection W_O, and one metric
F on the block's output. A *unit* is a key/value group (``architecture.AttentionSite``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from infoprune.architecture import AttentionSite
from infoprune.criteria.ffn import METRIC_RIDGE, Metric
from infoprune.errors import CalibrationError
from infoprune.linalg import descending_eigvalsh, with_ridge
from infoprune.plan import Compensation
from infoprune.site_statistics import SiteStatistics
from infoprune.spectrum import effective_rank, gaussian_rate, ks_distance

NOISE_SHARE = 0.1
# Added to the contexts' covariance, relative to its mean diagonal. Contexts are nearly collinear: without a ridge the repaired output
# projection reaches weights of 100, fits the calibration sample and is as fragile on other data as it is exact on that one.
COMPENSATION_RIDGE = 0.02


@dataclass(frozen=True)
class Block:
    """What criteria see of one attention block; all float64.

    Attributes:
        site: The site.
        covariance: (n, n) of the concatenated contexts.
        mean: (n,) of the same.
        out: (hidden, n) weight of the output projection.
        metric: (hidden, hidden) F; the identity where no gradients were taken, zero where none arrives.
        ridge: What the diagonal of ``covariance`` has been raised by.
        sensitivity: (units,) see :func:`infoprune.sensitivity.head_sensitivities`; ``None``: not gathered.
        saliency: (units,) of :func:`infoprune.saliency.weight_saliencies`, where it was asked for.
    """

    site: AttentionSite
    covariance: torch.Tensor
    mean: torch.Tensor
    out: torch.Tensor
    metric: torch.Tensor
    ridge: float = 0.0
    sensitivity: torch.Tensor | None = None
    saliency: torch.Tensor | None = None

    @property
    def measured(self) -> torch.Tensor:
        """(n, n) the contexts' covariance as it was seen, without the ridge."""
        return self.covariance - self.ridge * torch.eye(len(self.covariance), dtype=torch.float64)

    def columns(self, unit: int) -> slice:
        """Columns of the output projection that belong to ``unit``."""
        return slice(unit * self.site.unit_width, (unit + 1) * self.site.unit_width)

    def index(self, units: list[int]) -> torch.Tensor:
        """Column indices of several units, in the order given."""
        return (
            torch.cat([torch.arange(self.columns(u).start, self.columns(u).stop) for u in units])
            if units
            else torch.zeros(0, dtype=torch.long)
        )


def block_of(site: AttentionSite, statistics: SiteStatistics, out_weight: torch.Tensor, metric: Metric = "task") -> Block:
    """Assemble what criteria need; the covariance gets the ridge of :data:`COMPENSATION_RIDGE`.

    Without gradients, or where ``metric`` is ``identity``, F is the identity, and losses are squared errors of the block's output.
    """
    moments = statistics.pooled("input")
    covariance = moments.covariance
    covariance = (covariance + covariance.T) / 2  # float32 products leave it slightly asymmetric, which an inverse would magnify
    ridge = max(COMPENSATION_RIDGE * float(covariance.diagonal().mean()), 1e-30)
    covariance = covariance + ridge * torch.eye(len(covariance), dtype=torch.float64)
    if statistics.output_gradient is None or metric == "identity":
        fisher = torch.eye(site.hidden_size, dtype=torch.float64)
    else:
        raw = statistics.output_gradient.second_moment
        fisher = with_ridge(raw, METRIC_RIDGE) if float(raw.diagonal().sum()) > 0 else torch.zeros_like(raw)
    return Block(site, covariance, moments.mean, out_weight.detach().double(), fisher, ridge, statistics.sensitivity, statistics.saliency)


@dataclass(frozen=True)
class Removal:
    """A nested sequence of removals from one block.

    Attributes:
        order: Units, the first to go first; those that must stay (``AttentionSite.min_units``) are never listed.
        losses: (len(order) + 1,) loss when the first k of ``order`` are gone, k = 0.. ; nats per token.
        scores: Score of each unit under a ranking criterion.
    """

    order: list[int]
    losses: list[float]
    scores: list[float] | None = None


def information_loss(block: Block, compensation: Compensation = "least-squares", order: Sequence[int] | None = None) -> Removal:
    """Set-wise loss of information after compensation, minimised greedily within the block (the default), or along a given ``order``.

    With least squares D(G) = 1/2 tr(F Cov(residual of the block's output that the kept heads cannot reproduce)), in nats per token. With
    Lambda the inverse covariance of the kept contexts and W' the compensated output projection, removing unit u on top of G adds
    1/2 tr(W'_u^T F W'_u Lambda_uu^-1) exactly, because Lambda_uu^-1 is the covariance of what the other kept heads cannot predict of
    u (Schur complement), and that part is uncorrelated with all that was lost before. Each step is a rank-d_h update (cf. Hassibi &
    Stork, "Optimal brain surgeon", 1993, for single weights).

    With less compensation D(G) is the loss of the removed contexts themselves, a sum over pairs of removed units; see
    :func:`removal_loss`.
    """
    return _with_regression(block, order) if compensation == "least-squares" else _by_pairs(block, compensation, order)


def _with_regression(block: Block, given: Sequence[int] | None) -> Removal:
    """Every step updates Lambda and G = W'^T F W' of the units still there by a matrix of rank d_h; W' itself is not needed."""
    width = block.site.unit_width
    precision, energy = torch.linalg.inv(block.covariance), block.out.T @ block.metric @ block.out
    kept, order, losses = list(range(block.site.num_units)), [], [0.0]
    while len(kept) > block.site.min_units:
        marginal = _marginals(energy, precision, width)
        place = int(marginal.argmin()) if given is None else kept.index(given[len(order)])
        columns = torch.arange(len(precision))
        gone = (columns >= place * width) & (columns < (place + 1) * width)
        c, rest = columns[gone], columns[~gone]
        coefficient = torch.linalg.solve(precision[c][:, c], precision[c][:, rest])  # Lambda_uu^-1 Lambda_u.
        half = energy[c][:, rest] - 0.5 * energy[c][:, c] @ coefficient
        energy = energy[rest][:, rest] - coefficient.T @ half - half.T @ coefficient
        precision = precision[rest][:, rest] - precision[rest][:, c] @ coefficient
        order.append(kept.pop(place))
        losses.append(losses[-1] + max(float(marginal[place]), 0.0))
    return Removal(order, losses)


def _marginals(energy: torch.Tensor, precision: torch.Tensor, width: int) -> torch.Tensor:
    """(units,) nats per token that each unit's removal adds: 1/2 tr(W'_u^T F W'_u Lambda_uu^-1)."""
    units = len(energy) // width
    of_units = [m.reshape(units, width, units, width).diagonal(dim1=0, dim2=2).movedim(-1, 0) for m in (energy, precision)]
    return 0.5 * (of_units[0] * torch.linalg.inv(of_units[1]).mT).sum((1, 2))


def single_losses(block: Block) -> list[float]:
    """D({u}) of every unit after compensation by least squares, nats per token: see :func:`information_loss`."""
    energy = block.out.T @ block.metric @ block.out
    return _marginals(energy, torch.linalg.inv(block.covariance), block.site.unit_width).clamp_min(0).tolist()


def _by_pairs(block: Block, compensation: Compensation, given: Sequence[int] | None) -> Removal:
    """Losses D(G) = sum over a, b in G of 1/2 tr(F W_a M_ab W_b^T), M the covariance or the second moment of the contexts."""
    elements = 0.5 * _lost_without_regression(block, compensation) * (block.out.T @ block.metric @ block.out)
    n, width = block.site.num_units, block.site.unit_width
    pairs = elements.reshape(n, width, n, width).sum((1, 3))
    order: list[int] = []
    losses = [0.0]
    while len(order) < n - block.site.min_units:
        marginal = {u: float(pairs[u, u] + 2 * pairs[u, order].sum()) for u in range(n) if u not in order}
        unit = min(marginal, key=lambda u: marginal[u]) if given is None else given[len(order)]
        order.append(unit)
        losses.append(max(losses[-1] + marginal[unit], 0.0))
    return Removal(order, losses)


def _lost_without_regression(block: Block, compensation: Compensation) -> torch.Tensor:
    """(n, n) moment of what a removed context leaves behind: its deviation from the mean, or with nothing in its place all of it."""
    return block.measured if compensation == "mean" else block.measured + torch.outer(block.mean, block.mean)


def removal_loss(block: Block, removed: list[int], compensation: Compensation = "least-squares") -> float:
    """D(G) = 1/2 tr(F W_G M W_G^T) of one set, nats per token.

    M is the moment of what is missing at the output projection's input: with least squares the Schur complement of the kept contexts'
    covariance (ridge included), with the mean in the bias the removed contexts' covariance, with nothing their second moment.
    """
    kept = [u for u in range(block.site.num_units) if u not in removed]
    r, k = block.index(removed), block.index(kept)
    lost = (block.covariance if compensation == "least-squares" else _lost_without_regression(block, compensation))[r][:, r]
    if compensation == "least-squares" and kept:
        lost = lost - block.covariance[r][:, k] @ torch.linalg.solve(block.covariance[k][:, k], block.covariance[k][:, r])
    out = block.out[:, r]
    return 0.5 * float(((block.metric @ out) * (out @ lost)).sum())


def compensate(block: Block, kept: list[int], compensation: Compensation = "least-squares") -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output projection that reads only the units ``kept``.

    ``least-squares``: W' = W S_{:,K} S_KK^-1, and the means into the bias. ``mean``: columns as they are and the mean of the removed
    contexts into the bias, FLAP's baseline bias compensation (An et al., arXiv 2312.11983). ``none``: columns as they are.

    Returns:
        (hidden, kept columns) weight and the (hidden,) bias correction, ``None`` without one.
    """
    k = block.index(kept)
    if compensation == "none":
        return block.out[:, k], None
    if compensation == "mean" or not kept:
        return block.out[:, k], block.out @ block.mean - block.out[:, k] @ block.mean[k]
    weight = torch.linalg.solve(block.covariance[k][:, k], block.covariance[k, :] @ block.out.T).T
    return weight, block.out @ block.mean - weight @ block.mean[k]


def head_spectrum(block: Block, unit: int) -> torch.Tensor:
    """Spectrum of Cov(o_h), o_h = c_h W_O^h, from d_h-sized work: eigenvalues of L^T W_O^T W_O L with S_hh = L L^T."""
    c = block.columns(unit)
    root = torch.linalg.cholesky(block.covariance[c, c])
    return descending_eigvalsh(root.T @ (block.out[:, c].T @ block.out[:, c]) @ root)


def erank_score(block: Block, generator: torch.Generator) -> list[float]:
    """ERank of each head's output covariance (Roy & Vetterli 2007, on energies); between 1 and the unit's width."""
    return [effective_rank(head_spectrum(block, u)) for u in range(block.site.num_units)]


def ks_score(block: Block, generator: torch.Generator) -> list[float]:
    """KS distance between the spectra of Cov(block output) with and without the head; in [0, 1].

    An eigenproblem of the stream's width for every head; what it is of changes by the head's own part, W_u S_u: W^T and its transpose.
    """
    whole = block.out @ block.covariance @ block.out.T
    full = descending_eigvalsh(whole)
    scores = []
    for unit in range(block.site.num_units):
        c = block.columns(unit)
        own = block.out[:, c]
        crossed = own @ (block.covariance[c] @ block.out.T)
        scores.append(ks_distance(full, descending_eigvalsh(whole - crossed - crossed.T + own @ block.covariance[c, c] @ own.T)))
    return scores


def noise_energy(block: Block) -> float:
    """s^2 of the rate: a tenth of the block's median energy of a unit, spread over the unit's dimensions (``NOISE_SHARE``)."""
    energies = [float(head_spectrum(block, u).sum()) for u in range(block.site.num_units)]
    return max(NOISE_SHARE * float(torch.tensor(energies).median()) / block.site.unit_width, 1e-30)


def rate_score(block: Block, generator: torch.Generator) -> list[float]:
    """Rate R_h = 1/2 sum ln(1 + lambda_i / s^2) in nats, s^2 = 0.1 median energy of the block's units / their dimensions."""
    noise = noise_energy(block)
    return [gaussian_rate(head_spectrum(block, u), noise) for u in range(block.site.num_units)]


def conditional_rate_score(block: Block, generator: torch.Generator) -> list[float]:
    """Rate of what the block's other heads cannot linearly reproduce of a head (Schur complement), in nats."""
    noise, precision = noise_energy(block), torch.linalg.inv(block.covariance)
    scores = []
    for unit in range(block.site.num_units):
        c = block.columns(unit)
        residual = torch.linalg.inv(precision[c, c])
        root = torch.linalg.cholesky((residual + residual.T) / 2)
        scores.append(gaussian_rate(descending_eigvalsh(root.T @ (block.out[:, c].T @ block.out[:, c]) @ root), noise))
    return scores


def magnitude_score(block: Block, generator: torch.Generator) -> list[float]:
    """Frobenius norm of the head's columns of the output projection."""
    return [float(block.out[:, block.columns(u)].norm()) for u in range(block.site.num_units)]


def energy_score(block: Block, generator: torch.Generator) -> list[float]:
    """Task-weighted energy 1/2 tr(F Cov(o_h)) in nats per token: the loss that leaves a head's mean in its place, heads one by one."""
    return [removal_loss(block, [u], "mean") for u in range(block.site.num_units)]


def fluctuation_score(block: Block, generator: torch.Generator) -> list[float]:
    """FLAP's score of heads (An et al., arXiv 2312.11983, and its public code), comparable between blocks.

    Channel j of the output projection's input has the fluctuation s_j = (Var(c_j) ||W_:j||^2)^2, their WIFV, which the code squares for
    heads. s is standardised over the block's channels, (s - mean) / std, and averaged over the unit's. Their variances weigh all tokens
    the same, which is ``weighting="uniform"``; otherwise tokens count here by relevance.
    """
    channel = (block.measured.diagonal() * block.out.square().sum(0)).square()
    spread = float(channel.std())
    standard = (channel - channel.mean()) / spread if spread > 0 else torch.zeros_like(channel)
    return standard.reshape(block.site.num_units, -1).mean(1).tolist()


def taylor_score(block: Block, generator: torch.Generator) -> list[float]:
    """First-order Taylor: mean absolute derivative of the loss in a gate on the unit, with l2 norm 1 in each block.

    Michel, Levy & Neubig 2019 (arXiv 1905.10650), section 4.1, on reference answers; normalised per layer as there, after Molchanov et al.
    2017 (arXiv 1611.06440). The absolute value is taken per question, as in the paper; their code takes it per token.

    Raises:
        CalibrationError: Calibration was not asked for sensitivities.
    """
    if block.sensitivity is None:
        raise CalibrationError("First-order scores need gradients of the answers' loss; calibrate with heads='taylor'.")
    norm = float(block.sensitivity.norm())
    return (block.sensitivity / norm if norm > 0 else block.sensitivity).tolist()


def grouped_taylor_score(block: Block, generator: torch.Generator) -> list[float]:
    """LLM-Pruner's grouped first-order Taylor (Ma, Fang & Wang, arXiv 2305.11627), in nats per answer token.

    Sum of |w dL/dw| over the unit's rows of the query, key and value projections and its columns of the output projection.
    """
    assert block.saliency is not None
    return block.saliency.tolist()


def random_score(block: Block, generator: torch.Generator) -> list[float]:
    """Uniform random scores."""
    return torch.rand(block.site.num_units, generator=generator).tolist()


TAYLOR, GROUPED_TAYLOR = "taylor", "grouped-taylor"
Score = Callable[[Block, torch.Generator], list[float]]
# Rankings: higher is more worth keeping. ``information-loss`` is not among them, being a function of sets.
RANKINGS: dict[str, Score] = {
    "erank": erank_score,
    "ks": ks_score,
    "rate": rate_score,
    "conditional-rate": conditional_rate_score,
    "magnitude": magnitude_score,
    "energy": energy_score,
    "fluctuation": fluctuation_score,
    TAYLOR: taylor_score,
    GROUPED_TAYLOR: grouped_taylor_score,
    "random": random_score,
}
INFORMATION_LOSS, ERANK_KS = "information-loss", "erank-ks"
CRITERIA = (INFORMATION_LOSS, ERANK_KS, *RANKINGS)


def rank_units(blocks: Iterable[Block], criterion: str, *, alpha: float = 0.5, seed: int = 0) -> dict[str, list[float]]:
    """Scores of every unit of every block under a ranking criterion; higher is more worth keeping.

    ``erank-ks`` is the literal unified criterion: alpha * norm(eRank) + (1 - alpha) * norm(KS of removal), each normalised to its
    rank among all units, divided by the unit's cost.

    Args:
        blocks: The blocks, in the order of the forward pass; read one by one, as the matrices of one are large.
        criterion: A key of :data:`RANKINGS` or ``erank-ks``.
        alpha: Weight of eRank in ``erank-ks``.
        seed: Seed for ``random``.
    """
    generator = torch.Generator().manual_seed(seed)
    if criterion != ERANK_KS:
        return {block.site.path: RANKINGS[criterion](block, generator) for block in blocks}
    sites, eranks, distances = [], [], []
    for block in blocks:
        sites.append(block.site)
        eranks.append(erank_score(block, generator))
        distances.append(ks_score(block, generator))
    return {
        site.path: [(alpha * e + (1 - alpha) * k) / site.parameters_per_unit for e, k in zip(es, ks_, strict=True)]
        for site, es, ks_ in zip(sites, _percentiles(eranks), _percentiles(distances), strict=True)
    }


def _percentiles(scores: list[list[float]]) -> list[list[float]]:
    ordered = sorted(s for block in scores for s in block)
    place = {value: index / len(ordered) for index, value in enumerate(ordered)}
    return [[place[s] for s in block] for block in scores]
