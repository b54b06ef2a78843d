"""Answer quality: exact match of greedy answers, and KL(dense || compressed) per answer token.

Scoring is teacher-forced: greedy decoding yields the reference answer exactly when, at every position of the answer and its
end-of-sequence token, the reference token has the highest logit given the reference tokens before it. One packed forward therefore
tells what ``generate`` would answer right, without its decoding steps; :func:`infoprune.evaluation.generation.generate_answers` gives the
answers themselves, as the check and for metrics that read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from infoprune.data import Example
from infoprune.errors import DataError
from infoprune.model import VLM
from infoprune.packing import answer_logits, batches
from infoprune.progress import SILENT, Progress

IMAGES_PER_BATCH = 8
BOOTSTRAP_DRAWS = 10_000


@dataclass(frozen=True)
class Quality:
    """Per-question results of one model.

    Attributes:
        correct: (questions,) boolean.
        kl: (answer tokens,) KL(dense || this) in nats at each answer token, end-of-sequence included; ``None`` without a reference.
    """

    correct: np.ndarray
    kl: np.ndarray | None = None

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * float(self.correct.mean())

    @property
    def accuracy_ci95(self) -> tuple[float, float]:
        """Wilson interval in percent."""
        interval = binomtest(int(self.correct.sum()), len(self.correct)).proportion_ci(0.95, method="wilson")
        return 100 * interval.low, 100 * interval.high

    @property
    def kl_nats(self) -> float | None:
        """Mean KL per answer token."""
        return None if self.kl is None else float(self.kl.mean())


@torch.no_grad()
def score(models: Sequence[VLM], examples: Sequence[Example], *, progress: Progress = SILENT) -> list[Quality]:
    """Score several models on the same batches; the first one is the reference of the KL.

    Raises:
        DataError: No examples.
    """
    if not examples:
        raise DataError("There are no examples to evaluate on.")
    correct = [np.zeros(len(examples), dtype=bool) for _ in models]
    kls: list[list[torch.Tensor]] = [[] for _ in models]
    share = all(can_share_prefix(vlm) for vlm in models)
    with progress.task("evaluating", len(examples)) as advance:
        for batch, indices in batches(models[0].encoder, examples, images_per_batch=IMAGES_PER_BATCH, share_prefix=share):
            reference: torch.Tensor | None = None
            for number, vlm in enumerate(models):
                moved = batch.to(vlm.device)
                logits = answer_logits(vlm.model, moved).float()
                wrong = torch.zeros(batch.num_questions, device=logits.device)
                wrong.index_add_(0, moved.question, (logits.argmax(-1) != moved.targets).float())
                correct[number][indices] = (wrong == 0).cpu().numpy()
                log_p = logits.log_softmax(-1).cpu()
                if reference is None:
                    reference = log_p
                else:
                    kls[number].append((reference.exp() * (reference - log_p)).sum(-1))
            advance(batch.num_questions)
    return [Quality(right, torch.cat(kl).numpy() if kl else None) for right, kl in zip(correct, kls, strict=True)]


def can_share_prefix(vlm: VLM) -> bool:
    """Packing gives every question a full view of the prefix, which a sliding window would cut, and counts positions one by one."""
    return vlm.encoder.shares_prefix and getattr(vlm.model.config.get_text_config(), "sliding_window", None) is None


def exact_match(answers: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
    """(questions,) boolean: whether the answer, stripped of white space, is the reference answer."""
    return np.array([answer.strip() == example.answer.strip() for answer, example in zip(answers, examples, strict=True)])


def paired_drop(dense: Quality, compressed: Quality, examples: Sequence[Example], *, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Accuracy drop in points, dense minus compressed, with a 95% interval.

    Questions on one image are not independent, so the bootstrap resamples images, not questions (percentile interval of
    10,000 draws).
    """
    difference = dense.correct.astype(float) - compressed.correct.astype(float)
    _, group = np.unique([str(example.image) for example in examples], return_inverse=True)
    sums = np.bincount(group, weights=difference)
    sizes = np.bincount(group).astype(float)
    rng, n = np.random.default_rng(seed), len(sums)
    draws = []
    for _ in range(math.ceil(BOOTSTRAP_DRAWS / 500)):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=500)
        draws.append((counts @ sums) / (counts @ sizes))
    low, high = np.percentile(100 * np.concatenate(draws), [2.5, 97.5])
    return 100 * float(difference.mean()), (float(low), float(high))


def comparison(dense: Quality, compressed: Quality, examples: Sequence[Example]) -> dict[str, Any]:
    """Figures of a dense/compressed pair, under the keys of the result files."""
    drop, interval = paired_drop(dense, compressed, examples)
    return {
        "accuracy": compressed.accuracy,
        "accuracy_ci95": list(compressed.accuracy_ci95),
        "dense_accuracy": dense.accuracy,
        "num_questions": len(examples),
        "drop_points": drop,
        "drop_ci95": list(interval),
        "kl_nats": compressed.kl_nats,
    }
