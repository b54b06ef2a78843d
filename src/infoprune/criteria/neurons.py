"""Criteria for the neurons of an FFN: a score per neuron, of which ``energy`` is a loss in nats.

A neuron j is entry z_j of what the down projection W reads, with its rows of gate and up and its column w_j of W. Removing it leaves its
mean, W z - w_j (z_j - E[z_j]), where biases are added, else nothing. Only vectors of the FFN's width are needed, never a
covariance of that size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from infoprune.architecture import FFNSite
from infoprune.criteria.ffn import METRIC_RIDGE, Metric
from infoprune.linalg import with_ridge
from infoprune.site_statistics import SiteStatistics


@dataclass(frozen=True)
class Neurons:
    """What criteria see of one FFN; all float64.

    Attributes:
        site: The site.
        variance: (m,) of each neuron.
        lost: (m,) what goes with each neuron, E[z^2] where nothing is left in its place, else the variance.
        inputs: (m, hidden) weights of the up projection, and of the gate where there is one.
        down: (hidden, m) weight of the down projection.
        metric: (hidden, hidden) F at the FFN's output; the identity where no gradients were taken, zero where none arrives.
        saliency: (m,) of :func:`infoprune.saliency.weight_saliencies`, where it was asked for.
    """

    site: FFNSite
    variance: torch.Tensor
    lost: torch.Tensor
    inputs: tuple[torch.Tensor, ...]
    down: torch.Tensor
    metric: torch.Tensor
    saliency: torch.Tensor | None = None


def neurons_of(
    site: FFNSite,
    statistics: SiteStatistics,
    inputs: tuple[torch.Tensor, ...],
    down: torch.Tensor,
    metric: Metric = "task",
    centred: bool = True,
) -> Neurons:
    """Assemble what criteria need; ``statistics`` must have the moments of neurons, whose means stay if ``centred``."""
    assert statistics.neurons is not None
    moments = statistics.neurons
    found = torch.eye(site.hidden_size, dtype=torch.float64)
    if metric == "task" and statistics.output_gradient is not None:
        raw = statistics.output_gradient.second_moment
        found = with_ridge(raw, METRIC_RIDGE) if float(raw.diagonal().sum()) > 0 else torch.zeros_like(raw)
    lost = moments.variance if centred else moments.second_moment
    return Neurons(site, moments.variance, lost, inputs, down.double(), found, statistics.saliency)


def energy_score(neurons: Neurons, generator: torch.Generator) -> torch.Tensor:
    """Expected loss of a neuron's removal, 1/2 Var(z_j) w_j^T F w_j, or E[z_j^2] where its mean goes, too, in nats per token (the default).

    Second order, and additive: what neurons share is not seen, so sets of alike neurons are rated too high or too low.
    """
    return 0.5 * neurons.lost * ((neurons.metric @ neurons.down) * neurons.down).sum(0)


def fluctuation_score(neurons: Neurons, generator: torch.Generator) -> torch.Tensor:
    """FLAP's WIFV (An et al., arXiv 2312.11983): variance of each neuron times the squared norm of its column of down."""
    return neurons.variance * neurons.down.square().sum(0)


def taylor_score(neurons: Neurons, generator: torch.Generator) -> torch.Tensor:
    """LLM-Pruner's grouped first-order Taylor (arXiv 2305.11627), in nats per answer token: sum of |w dL/dw| over a neuron's weights."""
    assert neurons.saliency is not None
    return neurons.saliency


def magnitude_score(neurons: Neurons, generator: torch.Generator) -> torch.Tensor:
    """Euclidean norm of a neuron's weights: its rows of gate and up and its column of down."""
    return torch.cat([*(weight.T.double() for weight in neurons.inputs), neurons.down]).norm(dim=0)


def random_score(neurons: Neurons, generator: torch.Generator) -> torch.Tensor:
    """Uniform random scores."""
    return torch.rand(neurons.site.intermediate_size, generator=generator, dtype=torch.float64)


Score = Callable[[Neurons, torch.Generator], torch.Tensor]
ENERGY, FLUCTUATION, TAYLOR = "energy", "fluctuation", "taylor"
# Scores of shape (m,): higher is more worth keeping.
RANKINGS: dict[str, Score] = {
    ENERGY: energy_score,
    FLUCTUATION: fluctuation_score,
    TAYLOR: taylor_score,
    "magnitude": magnitude_score,
    "random": random_score,
}


@dataclass(frozen=True)
class NeuronRemoval:
    """A nested sequence of removals from one FFN.

    Attributes:
        order: (m,) neurons, the first to go first.
        losses: (m + 1,) loss when the first k of ``order`` are replaced by their means, k = 0.. ; nats per token, by ``energy``.
        scores: (m,) comparable between sites.
    """

    order: torch.Tensor
    losses: torch.Tensor
    scores: torch.Tensor


def rank_neurons(neurons: Neurons, criterion: str, generator: torch.Generator) -> NeuronRemoval:
    """Order the neurons of one FFN by a criterion.

    ``fluctuation`` is standardised within the site, (s - mean) / std, as FLAP does before it compares sites.

    Args:
        neurons: The FFN's.
        criterion: A key of :data:`RANKINGS`.
        generator: Source of ``random``.
    """
    scores = RANKINGS[criterion](neurons, generator)
    if criterion == FLUCTUATION:
        scores = (scores - scores.mean()) / scores.std().clamp_min(1e-300)
    order = torch.argsort(scores, stable=True)
    losses = torch.zeros(len(order) + 1, dtype=torch.float64)
    losses[1:] = (scores if criterion == ENERGY else energy_score(neurons, generator))[order].cumsum(0)
    return NeuronRemoval(order, losses, scores)
