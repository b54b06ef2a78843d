"""Answer quality: exact match of greedy answers, and KL(dense || compressed) per answer token.

Scoring is teacher-forced: greedy decoding yields the reference answer exactly when, at every position of the answer and its
end-of-sequence token, the reference token has the highest logit given the reference tokens before it. One packed forward therefore
tells what ``generate`` would answer right, without its decoding steps; :func:`infoprune.evaluation.generation.generate_answers` gives the
answers themselves, as the check and for metrics that read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from infoprune.data import Example
from infoprune.data.images import identities
from infoprune.errors import DataError
from infoprune.evaluation.certify import bootstrap_draws, by_image
from infoprune.model import VLM
from infoprune.packing import PackedBatch, answer_logits, batches
from infoprune.progress import SILENT, Progress

IMAGES_PER_BATCH = 8


@dataclass(frozen=True)
class Quality:
    """Per-question results of one model.

    Attributes:
        scores: (questions,) score of each answer, within 0 to 1; boolean where an answer is right or wrong.
        kl: (answer tokens,) KL(dense || this) in nats at each answer token, end-of-sequence included; ``None`` without a reference.
        token_question: (answer tokens,) index of the question that each entry of ``kl`` belongs to.
        answers: Per question the generated answer, or the token ids of the greedy answer up to the first that departs from the reference
            answer. Models that depart at the same token count as answering the same, though teacher forcing doesn't show how they go on.
    """

    scores: np.ndarray
    kl: np.ndarray | None = None
    token_question: np.ndarray | None = None
    answers: tuple[tuple[int, ...] | str, ...] = ()

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * float(self.scores.mean())

    @property
    def correct(self) -> np.ndarray:
        """(questions,) boolean: what counts as right where nothing between right and wrong is possible, as in McNemar's test."""
        return self.scores > 0.5

    @property
    def accuracy_ci95(self) -> tuple[float, float]:
        """Wilson interval in percent, of questions taken as independent: too narrow where many share an image.

        It is wider than need be for scores between 0 and 1, which vary less than a coin with their mean.
        """
        interval = binomtest(round(float(self.scores.sum())), len(self.scores)).proportion_ci(0.95, method="wilson")
        return 100 * interval.low, 100 * interval.high

    @property
    def kl_nats(self) -> float | None:
        """Mean KL per answer token."""
        return None if self.kl is None else float(self.kl.mean())

    @property
    def kl_by_question(self) -> np.ndarray | None:
        """(questions,) mean KL per answer token of each question."""
        if self.kl is None or self.token_question is None:
            return None
        return np.bincount(self.token_question, weights=self.kl) / np.bincount(self.token_question)

    def only(self, chosen: np.ndarray) -> Quality:
        """That of some questions alone, by a boolean for each."""
        kl, question = self.kl, self.token_question
        if question is not None:
            held = chosen[question]
            kl, question = None if kl is None else kl[held], (np.cumsum(chosen) - 1)[question[held]]
        return Quality(self.scores[chosen], kl, question, tuple(compress(self.answers, chosen)))


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
    answers: list[list[tuple[int, ...]]] = [[()] * len(examples) for _ in models]
    places: list[np.ndarray] = []
    share = all(can_share_prefix(vlm) for vlm in models)
    with progress.task("evaluating", len(examples)) as advance:
        for batch, indices in batches(models[0].encoder, examples, images_per_batch=IMAGES_PER_BATCH, share_prefix=share):
            reference: torch.Tensor | None = None
            places.append(np.asarray(indices)[batch.question.numpy()])
            for number, vlm in enumerate(models):
                moved = batch.to(vlm.device)
                logits = answer_logits(vlm.model, moved).float()
                for place, answer, right in zip(indices, *_greedy_answers(logits.argmax(-1).tolist(), batch), strict=True):
                    answers[number][place], correct[number][place] = answer, right
                log_p = logits.log_softmax(-1).cpu()
                if reference is None:
                    reference = log_p
                else:
                    kls[number].append((reference.exp() * (reference - log_p)).sum(-1))
            advance(batch.num_questions)
    token_question = np.concatenate(places)
    return [
        Quality(right, torch.cat(kl).numpy() if kl else None, token_question, tuple(found))
        for right, kl, found in zip(correct, kls, answers, strict=True)
    ]


def _greedy_answers(predicted: list[int], batch: PackedBatch) -> tuple[list[tuple[int, ...]], list[bool]]:
    """Each question's predicted tokens up to the first that is not the reference's, and whether there is none such."""
    answers: list[list[int]] = [[] for _ in range(batch.num_questions)]
    right = [True] * batch.num_questions
    for token, target, question in zip(predicted, batch.targets.tolist(), batch.question.tolist(), strict=True):
        if right[question]:
            answers[question].append(token)
            right[question] = token == target
    return [tuple(answer) for answer in answers], right


def can_share_prefix(vlm: VLM) -> bool:
    """Packing gives every question a full view of the prefix, which a sliding window would cut, and counts positions one by one."""
    return vlm.encoder.shares_prefix and getattr(vlm.model.config.get_text_config(), "sliding_window", None) is None


def paired_drop(
    dense: Quality, compressed: Quality, examples: Sequence[Example], *, images: Sequence[str] | None = None, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Accuracy drop in points, dense minus compressed, with a 95% interval.

    Questions on one image are not independent, so the bootstrap resamples images, not questions (percentile interval of
    10,000 draws). ``images`` tells which questions share one; ``None``: what is in the files does.
    """
    units = identities([example.image for example in examples]) if images is None else images
    data = by_image(dense.scores.astype(float) - compressed.scores, units)
    low, high = np.percentile(100 * bootstrap_draws(data, seed=seed), [2.5, 97.5])
    return 100 * data.mean, (float(low), float(high))


def comparison(dense: Quality, compressed: Quality, examples: Sequence[Example], *, images: Sequence[str] | None = None) -> dict[str, Any]:
    """Figures of a dense/compressed pair, under the keys of the result files; ``images`` as in :func:`paired_drop`."""
    drop, interval = paired_drop(dense, compressed, examples, images=images)
    return {
        "accuracy": compressed.accuracy,
        "accuracy_ci95": list(compressed.accuracy_ci95),
        "dense_accuracy": dense.accuracy,
        "num_questions": len(examples),
        "drop_points": drop,
        "drop_ci95": list(interval),
        "kl_nats": compressed.kl_nats,
    }
