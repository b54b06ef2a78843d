"""How many images a certificate needs, known before any work is done."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from infoprune.evaluation.certify import ByImage, bets, betting_evidence, stakes

POWER = 0.8
LIMIT = 10_000_000  # images; more is "never"


@dataclass(frozen=True)
class Expectation:
    """What is expected of a plan that ought to pass.

    Attributes:
        drop: Share of the score that it loses.
        changed: Share of the questions whose score changes; at least ``drop``.
        together: Share of the images whose questions all change or none; of the others, each question changes for itself.
    """

    drop: float
    changed: float
    together: float = 0.1

    @classmethod
    def within(cls, max_drop: float) -> Expectation:
        """A plan that loses a quarter of what is allowed, and changes four questions for one lost."""
        return cls(max_drop / 4, max_drop)


def perfect_evidence(sizes: np.ndarray, max_drop: float, confidence: float) -> float:
    """Evidence over what is needed if no answer changes, in images of these ``sizes``: below 1, nothing can be certified.

    See :func:`infoprune.evaluation.certify.betting_evidence`.
    """
    sizes = np.asarray(sizes, dtype=float)
    found = betting_evidence(ByImage(np.zeros_like(sizes), sizes), max_drop, confidence, target=max_drop)
    return found / -math.log(1 - confidence)


def least_images(max_drop: float, confidence: float) -> int:
    """Fewest images, all with equally many questions, on which a perfect outcome is certified.

    That is ln(alpha) / ln(1 - max_drop) and hardly more, for the spared bets. No bound can do with fewer where questions on one image may
    all be lost together: if that happens to a share ``max_drop`` of the images, a smaller sample shows none of it with a probability
    above alpha.
    """
    images = math.ceil(math.log(1 - confidence) / math.log1p(-max_drop) - 1e-9)
    while perfect_evidence(np.ones(images), max_drop, confidence) < 1:
        images += 1
    return images


def chance(
    images: int, per_image: int, max_drop: float, confidence: float, expected: Expectation, *, draws: int = 1000, seed: int = 0
) -> float:
    """Chance that ``images`` of ``per_image`` questions each certify ``max_drop`` for a plan that is as ``expected``; by simulation."""
    values, shares = _sums(per_image, expected)
    fractions, weights = bets(np.full(images, float(per_image)), confidence, max_drop)
    drawn = np.random.default_rng(seed).multinomial(images, shares, size=draws)
    staked = stakes(values, np.full_like(values, per_image), per_image, max_drop)
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log1p(-fractions[:, None] * staked), -1e9)  # times a count of zero, an infinity would not be a number
    capital = np.logaddexp.reduce(drawn @ logs.T + np.log(weights), axis=1)
    return float((capital >= -math.log(1 - confidence)).mean())


def images_needed(per_image: int, max_drop: float, confidence: float, expected: Expectation, *, power: float = POWER) -> int | None:
    """Images of ``per_image`` questions each that certify such a plan with probability ``power``; ``None``: no number does."""
    if expected.drop >= max_drop:
        return None
    low = least_images(max_drop, confidence)
    high = low
    while chance(high, per_image, max_drop, confidence, expected) < power:
        low, high = high, 2 * high
        if high > LIMIT:
            return None
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle, per_image, max_drop, confidence, expected) >= power else (middle, high)
    return high


def _sums(per_image: int, expected: Expectation) -> tuple[np.ndarray, np.ndarray]:
    """Possible sums of an image's differences, and their probabilities."""
    lost, won = (expected.changed + expected.drop) / 2, (expected.changed - expected.drop) / 2
    one = np.maximum([won, 1 - expected.changed, lost], 0.0)
    shares = np.ones(1)
    for _ in range(per_image):
        shares = np.convolve(shares, one)
    shares = (1 - expected.together) * shares
    shares[[0, per_image, 2 * per_image]] += expected.together * one
    return np.arange(-per_image, per_image + 1, dtype=float), shares / shares.sum()
