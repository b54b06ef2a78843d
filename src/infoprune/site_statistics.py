"""What calibration keeps of every site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from infoprune.moments import DiagonalMoments, Moments

Weighting = Literal["uniform", "relevance"]
TokenClass = Literal["image", "text", "all"]


@dataclass
class SiteStatistics:
    """Moments at one site; gradients are of the log-likelihood, per token.

    Attributes:
        by_class: Moments of the token classes, by tap: ``input`` (the block's input; for attention the input of its output
            projection, the concatenated contexts) and ``output`` (FFN only); of FFNs where factorisations need them.
        output_gradient: Moments of g at the block's output; its second moment is F.
        input_gradient: FFN only: moments of the gradient with respect to the block's input, W^T g over the input linears.
        branch_gradients: Gated FFN only, on request: the same for the gate and the up projection apart.
        intermediate_gradient_energy: FFN only: sum over tokens of |g|^2 at the input linears' outputs.
        token_weights: Per batch, (tokens,) weights at the block's output; ones without relevance weighting.
        magnitudes: FFN only, on request: sum over tokens of |x| at the block's input (``input``) and at the down projection's
            (``intermediate``); tokens count the same, whatever their weights.
        sensitivity: Attention only, on request: see :func:`infoprune.sensitivity.head_sensitivities`.
        neurons: FFN only, on request: means and variances of what the down projection reads.
        saliency: On request: first-order Taylor of every unit or neuron, see :func:`infoprune.saliency.weight_saliencies`.
    """

    by_class: dict[str, dict[TokenClass, Moments]] = field(default_factory=dict)
    output_gradient: Moments | None = None
    input_gradient: Moments | None = None
    branch_gradients: dict[str, Moments] = field(default_factory=dict)
    intermediate_gradient_energy: float = 0.0
    token_weights: list[torch.Tensor] = field(default_factory=list)
    magnitudes: dict[str, torch.Tensor] = field(default_factory=dict)
    sensitivity: torch.Tensor | None = None
    neurons: DiagonalMoments | None = None
    saliency: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Tokens seen."""
        classes = self.by_class.get("input", {}).values()
        return sum(moments.count for moments in classes) if classes or self.neurons is None else self.neurons.count

    def pooled(self, tap: str) -> Moments:
        """Moments of image and text tokens together."""
        moments = list(self.by_class[tap].values())
        total = moments[0]
        for other in moments[1:]:
            total = total.merge(other)
        return total

    def mean_magnitude(self, tap: str) -> torch.Tensor:
        """E|x|, (dimension,) float64, of what ``magnitudes`` names."""
        return self.magnitudes[tap] / self.count


@dataclass
class Statistics:
    """What calibration saw.

    Attributes:
        sites: Statistics by site path.
        num_examples: Questions seen.
        weighting: How tokens were weighted.
        similarity: On request: mean cosine, over tokens of weight one, between what each layer reads and what it leaves, by its path.
    """

    sites: dict[str, SiteStatistics]
    num_examples: int
    weighting: Weighting
    similarity: dict[str, float] = field(default_factory=dict)
