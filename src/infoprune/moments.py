"""Weighted moments of streams of vectors, summed in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from infoprune.linalg import add_products_, mirrored_


def exact_sum(values: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """Sum in float64, on the CPU; Apple's GPUs have no float64, so that there the values come first."""
    return (values.cpu() if values.device.type == "mps" else values).sum(dim, dtype=torch.float64).cpu()


@dataclass
class Moments:
    """Weighted count, mean and covariance of a stream of vectors.

    Products are formed in the data's precision per batch and summed in float64, which loses nothing that matters and costs a third
    of forming them in float64.

    Attributes:
        dimension: Length of the vectors.
        count: Vectors seen.
        weight: Sum of their weights.
    """

    dimension: int
    count: int = 0
    weight: float = 0.0
    _sum: torch.Tensor = field(init=False, repr=False)
    _outer: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._sum = torch.zeros(self.dimension, dtype=torch.float64)
        self._outer = torch.zeros(self.dimension, self.dimension, dtype=torch.float64)

    def update(self, vectors: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add vectors (n, dimension), with weights (n,) or weight one each."""
        if vectors.dtype in (torch.float16, torch.bfloat16):
            vectors = vectors.float()
        weighted = vectors if weights is None else vectors * weights[:, None].to(vectors.dtype)
        sums = vectors.sum(0) if weights is None else weights.to(vectors.dtype) @ vectors
        self._sum += sums.cpu()
        add_products_(self._outer, weighted, vectors)
        self.count += len(vectors)
        self.weight += float(len(vectors) if weights is None else exact_sum(weights, 0))

    def merge(self, other: Moments) -> Moments:
        """Moments of both streams together."""
        total = Moments(self.dimension, self.count + other.count, self.weight + other.weight)
        total._sum, total._outer = self._sum + other._sum, self._outer + other._outer
        return total

    def is_finite(self) -> bool:
        """No NaN and no infinity was seen."""
        return bool(torch.isfinite(self._outer).all() and torch.isfinite(self._sum).all())

    @property
    def mean(self) -> torch.Tensor:
        """(dimension,) float64."""
        return self._sum / self.weight if self.weight > 0 else self._sum

    @property
    def second_moment(self) -> torch.Tensor:
        """E[x x^T], (dimension, dimension) float64."""
        return mirrored_(self._outer / self.weight if self.weight > 0 else self._outer.clone())

    @property
    def covariance(self) -> torch.Tensor:
        """E[x x^T] - mean mean^T, (dimension, dimension) float64."""
        return self.second_moment - torch.outer(self.mean, self.mean)


@dataclass
class DiagonalMoments:
    """Weighted mean and variance of every entry of a stream of vectors too long for a covariance; see :class:`Moments`.

    Attributes:
        dimension: Length of the vectors.
        count: Vectors seen.
        weight: Sum of their weights.
    """

    dimension: int
    count: int = 0
    weight: float = 0.0
    _sum: torch.Tensor = field(init=False, repr=False)
    _squares: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._sum = torch.zeros(self.dimension, dtype=torch.float64)
        self._squares = torch.zeros(self.dimension, dtype=torch.float64)

    def update(self, vectors: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add vectors (n, dimension), with weights (n,) or weight one each."""
        if vectors.dtype in (torch.float16, torch.bfloat16):
            vectors = vectors.float()
        weighted = vectors if weights is None else vectors * weights[:, None].to(vectors.dtype)
        self._sum += exact_sum(weighted, 0)
        self._squares += exact_sum(weighted * vectors, 0)
        self.count += len(vectors)
        self.weight += float(len(vectors) if weights is None else exact_sum(weights, 0))

    @property
    def mean(self) -> torch.Tensor:
        """(dimension,) float64."""
        return self._sum / self.weight if self.weight > 0 else self._sum

    @property
    def second_moment(self) -> torch.Tensor:
        """(dimension,) float64, E[x^2] of each entry."""
        return self._squares / self.weight if self.weight > 0 else self._squares

    @property
    def variance(self) -> torch.Tensor:
        """(dimension,) float64, not negative."""
        return (self.second_moment - self.mean.square()).clamp_min(0)
