"""How much of the score was lost, at a stated confidence: upper bounds on a paired drop, and tests along a path of plans. Pure.

The data are paired scores of n images: image j has m_j questions, each with the dense model's score minus the compressed one's, in
[-1, 1]; S_j is their sum. Questions on one image are dependent, so images are the units. The parameter that is bounded is the drop over
all questions, each counting the same,

    theta = sum_j E[S_j] / sum_j m_j,

given how many questions each image has. **Assumption**: images are independent of each other, whatever happens within one. They need not be
identically distributed; where they are draws from a population and the drop does not depend on the number of questions, theta is the
population's drop. All scores here are shares (0.005 is half a percentage point).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from infoprune.errors import BudgetError, DataError

BOOTSTRAP_DRAWS = 10_000
SPARE = 0.02  # weight of the bets that are too small to certify the target
CERTIFYING = "betting"  # the bound that certificates rest on; the others are shown beside it


@dataclass(frozen=True)
class ByImage:
    """What the bounds see of paired scores.

    Attributes:
        sums: (images,) sum of the differences over an image's questions.
        sizes: (images,) how many questions that is.
    """

    sums: np.ndarray
    sizes: np.ndarray

    @property
    def mean(self) -> float:
        """Mean difference over all questions."""
        return float(self.sums.sum() / self.sizes.sum())


@dataclass(frozen=True)
class Bounds:
    """One-sided upper confidence bounds on the drop, each at the same confidence.

    Attributes:
        betting, empirical_bernstein: Valid at any number of images.
        bootstrap: Valid as images become many; too low where answers hardly ever change.
    """

    betting: float
    empirical_bernstein: float
    bootstrap: float

    def points(self) -> dict[str, float]:
        """In percentage points, for JSON."""
        return {name: 100 * value for name, value in self.__dict__.items()}


def check_confidence(confidence: float) -> None:
    """Refuse what is no confidence, such as a percentage.

    Raises:
        BudgetError: It is not at least 0.5 and below 1.
    """
    if not 0.5 <= confidence < 1:
        raise BudgetError(f"confidence must be at least 0.5 and below 1, e.g. 0.95, not {confidence}.")


def by_image(differences: np.ndarray, images: Sequence[object]) -> ByImage:
    """Sum (questions,) differences in [-1, 1] over the image that each question is about.

    Raises:
        DataError: No questions, or a difference that is no difference of two scores in [0, 1].
    """
    values = np.asarray(differences, dtype=float)
    if not len(values):
        raise DataError("There are no questions to compare answers on.")
    if not (np.abs(values) <= 1).all():  # also refuses NaN
        raise DataError("Scores must be between 0 and 1 to be compared with a certificate.")
    _, group = np.unique(np.asarray([str(image) for image in images]), return_inverse=True)
    return ByImage(np.bincount(group, weights=values), np.bincount(group).astype(float))


def upper_bounds(data: ByImage, confidence: float, *, target: float | None = None, seed: int = 0) -> Bounds:
    """All bounds on the drop; ``target`` as in :func:`betting_upper`."""
    return Bounds(
        betting_upper(data, confidence, target=target),
        empirical_bernstein_upper(data, confidence),
        bootstrap_upper(data, confidence, seed=seed),
    )


# --- bootstrap ---------------------------------------------------------------------------------------------------------------------


def bootstrap_draws(data: ByImage, *, seed: int = 0, draws: int = BOOTSTRAP_DRAWS) -> np.ndarray:
    """(draws,) means over questions when images are drawn with replacement (Efron & Tibshirani 1993, chapter 13).

    Images with the same sum and size are interchangeable, so that their numbers are drawn instead of them.
    """
    kinds, counts = np.unique(np.stack([data.sums, data.sizes]), axis=1, return_counts=True)
    n = len(data.sums)
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, draws, 1000):
        drawn = rng.multinomial(n, counts / n, size=min(1000, draws - start))
        found.append((drawn @ kinds[0]) / (drawn @ kinds[1]))
    return np.concatenate(found)


def bootstrap_upper(data: ByImage, confidence: float, *, seed: int = 0, draws: int = BOOTSTRAP_DRAWS) -> float:
    """Percentile bound: the ``confidence`` quantile of :func:`bootstrap_draws`. Approximate; 0 if no answer changed."""
    return float(np.quantile(bootstrap_draws(data, seed=seed, draws=draws), confidence))


# --- valid at any number of images -------------------------------------------------------------------------------------------------


def empirical_bernstein_upper(data: ByImage, confidence: float) -> float:
    """Bound from the sample variance (Maurer & Pontil 2009, theorem 11, which asks for independence only).

    With X_j = S_j n / sum m, whose mean over images is the mean over questions, V their sample variance, R = n max m / sum m their
    largest magnitude, and alpha = 1 - confidence,

        theta <= mean(X) + sqrt(2 V ln(2 / alpha) / n) + 2 R * 7 ln(2 / alpha) / (3 (n - 1)).

    Returns:
        The bound, at most 1.
    """
    n = len(data.sums)
    if n < 2:
        return 1.0
    scale = n / data.sizes.sum()
    log = math.log(2 / (1 - confidence))
    variance = float(np.var(data.sums * scale, ddof=1))
    slack = math.sqrt(2 * variance * log / n) + 14 * float(data.sizes.max()) * scale * log / (3 * (n - 1))
    return min(data.mean + slack, 1.0)


def betting_upper(data: ByImage, confidence: float, *, target: float | None = None, highest: float = 1.0) -> float:
    """Bound by betting against every larger drop: the least drop that :func:`betting_evidence` refutes.

    Evidence grows with the hypothetical drop, so that this is one number, and it is at most ``target`` exactly where the test of
    ``target`` succeeds.

    Args:
        data: Paired scores.
        confidence: One-sided.
        target: The drop that is to be certified, if there is one; it decides how bets are spread, and must not depend on the scores.
        highest: No question's difference is above this.

    Returns:
        The bound; ``highest`` if nothing below it is refuted.
    """
    wanted = -math.log(1 - confidence)
    low, high = -1.0, highest - 1e-9
    if betting_evidence(data, high, confidence, target=target, highest=highest) < wanted:
        return highest
    for _ in range(50):
        middle = (low + high) / 2
        refuted = betting_evidence(data, middle, confidence, target=target, highest=highest) >= wanted
        low, high = (low, middle) if refuted else (middle, high)
    return high


def betting_evidence(data: ByImage, drop: float, confidence: float, *, target: float | None = None, highest: float = 1.0) -> float:
    """Logarithm of the capital won against the hypothesis that the drop is ``drop`` or more (Waudby-Smith & Ramdas 2024, section 4).

    With Z_j = S_j - drop * m_j, which is at most max m * (highest - drop), and a bet lambda = f / (max m * (highest - drop)), f in (0, 1],

        K = product over images of (1 - lambda Z_j).

    All factors are at least 0. Under the hypothesis the mean of the E[Z_j] is at least 0, so by independence and the inequality of
    arithmetic and geometric means E[K] = product(1 - lambda E[Z_j]) <= 1: the images need not be alike, and since lambda is one number,
    their order does not matter. Averages of capitals over several f keep this. By Markov's inequality P(K >= 1 / alpha) <= alpha, so
    1 / K is a p-value.

    Args:
        data: Paired scores.
        drop: The hypothesis, above -1 and below ``highest``.
        confidence: At which the evidence will be used; together with the number of images it decides how bets are spread.
        target, highest: See :func:`betting_upper`.
    """
    fractions, weights = bets(data.sizes, confidence, target)
    kinds, counts = np.unique(np.stack([data.sums, data.sizes]), axis=1, return_counts=True)
    with np.errstate(divide="ignore"):  # a bet of everything can lose everything
        capital = np.log1p(-fractions[:, None] * stakes(kinds[0], kinds[1], data.sizes.max(), drop, highest)) @ counts
    return float(np.logaddexp.reduce(capital + np.log(weights)))


def stakes(sums: np.ndarray, sizes: np.ndarray, largest: float, drop: float, highest: float = 1.0) -> np.ndarray:
    """Z_j over its largest possible value, at most 1: m / max m - (highest * m - S) / (max m * (highest - drop)).

    In this form rounding keeps two facts that a bet of everything rests on: the stake never grows with the drop, and an image of the
    largest size that lost all of its questions has a stake of exactly 1 at every drop.
    """
    return sizes / largest - (highest * sizes - sums) / (largest * (highest - drop))


def bets(sizes: np.ndarray, confidence: float, target: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Fractions f = 1, 1/2, 1/4, ... and their weights, in proportion to 1, 1/2, 1/3, ...

    Small bets pay where answers change much, if there are images enough: the smallest is what the largest possible variance asks for. To
    certify a ``target``, f = 2^-k needs 2^k times as many images as f = 1, so that bets too small for that share ``SPARE`` of the weights:
    enough to give a sensible bound where larger bets lose everything.
    """
    log = -math.log(1 - confidence)
    effective = float(sizes.sum() / sizes.max())
    steps = np.arange(math.floor(0.5 * math.log2(max(effective / (2 * log), 1))) + 1)
    weights = 1 / (1 + steps)
    weights /= weights.sum()
    if target is not None and 0 < target < 1:
        useful = steps <= math.log2(max(effective * -math.log1p(-target) / log, 1))
        if not useful.all():
            weights = np.where(useful, (1 - SPARE) * weights / weights[useful].sum(), SPARE * weights / weights[~useful].sum())
    return 0.5**steps, weights


def rate_interval(data: ByImage, confidence: float) -> tuple[float, float]:
    """Two-sided interval for the rate of something that a question has (1) or has not (0), by two bets of half the error each."""
    half = 1 - (1 - confidence) / 2
    low = -betting_upper(ByImage(-data.sums, data.sizes), half, highest=0.0)
    return max(low, 0.0), min(betting_upper(data, half), 1.0)


# --- tests -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test (McNemar 1947) on answers that one model alone gets right.

    Attributes:
        dense_only, compressed_only: Questions that only this model answers correctly.
        p_value: Two-sided, binomial; of the hypothesis that both models are equally often right. It takes questions as independent,
            which questions on one image are not: a description, not what a certificate rests on.
    """

    dense_only: int
    compressed_only: int
    p_value: float


def mcnemar(dense: np.ndarray, compressed: np.ndarray) -> McNemar:
    """Test (questions,) booleans, true where a model is right."""
    lost, won = int((dense & ~compressed).sum()), int((~dense & compressed).sum())
    return McNemar(lost, won, float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0)


def p_value(data: ByImage, max_drop: float, confidence: float) -> float:
    """Of the hypothesis that the drop is ``max_drop`` or more; see :func:`betting_evidence`."""
    return math.exp(-max(betting_evidence(data, max_drop, confidence, target=max_drop), 0.0))


def fixed_sequence(p_values: Sequence[float], confidence: float) -> int:
    """How many plans at the start of a path are certified: all before the first p-value above 1 - ``confidence``.

    Fixed-sequence testing, as in Learn then Test (Angelopoulos et al. 2021). Each plan is tested at the full error: to certify any bad
    plan, the first bad one must pass, which happens with at most that probability. For this the order must not depend on the data that
    certify; that plans are nested, or that the drop grows along the path, is not needed: it only decides how far one gets.
    """
    return next((index for index, p in enumerate(p_values) if not p <= 1 - confidence), len(p_values))
