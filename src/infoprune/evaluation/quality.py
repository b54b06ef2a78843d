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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from infoprune.data import Example
from infoprune.data.images import identities
from infoprune.errors import DataError
from infoprune.evaluation.certify import bootstrap_draws, by_image
from infoprune.evaluation.record import SCORES, RecordFile, score_fingerprint
from infoprune.memory import out_of_memory
from infoprune.model import VLM
from infoprune.packing import PackedBatch, answer_logits, batches
from infoprune.progress import SILENT, Progress

IMAGES_PER_BATCH = 8
Found = dict[str, Any]  # of one question and model, see score()


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


def score(
    models: Sequence[VLM],
    examples: Sequence[Example],
    *,
    record: Path | None = None,
    images_per_batch: int | None = None,
    progress: Progress = SILENT,
) -> list[Quality]:
    """Score several models on the same batches; the first one is the reference of the KL.

    Args:
        models: What to score.
        examples: Questions with their reference answers; those on one image are packed together.
        record: File that keeps what was found of each question: a dictionary per model of ``tokens`` (see :attr:`Quality.answers`),
            ``right`` and, but for the first, ``kl`` at each token of the reference answer. An interrupted run goes on from what it left
            beside the file, with the result of an uninterrupted one; a file that is finished is read.
        images_per_batch: Images whose questions are scored together: lower it if memory runs out. ``None``: :data:`IMAGES_PER_BATCH`.
        progress: Shows how many are scored.

    Raises:
        InfoPruneError: The device has not enough memory.
        DataError: No examples, one without an answer, or a ``record`` that another run is writing or that is of other models or data.
    """
    if not examples:
        raise DataError("There are no examples to evaluate on.")
    images_per_batch = images_per_batch or IMAGES_PER_BATCH
    if record is None:
        return _qualities(_score_all(models, examples, None, images_per_batch, progress))
    file = RecordFile(Path(record), score_fingerprint(models, examples), examples, SCORES)
    found = file.finished()
    if found is None:
        with file.held(0):
            found = _score_all(models, examples, file, images_per_batch, progress)
            file.finish(found)
    else:
        progress.note(f"The scores are read from {record}.")
    return _qualities(found)


def _score_all(
    models: Sequence[VLM], examples: Sequence[Example], file: RecordFile | None, images_per_batch: int, progress: Progress
) -> list[list[Found]]:
    """What was found of each question, per model."""
    share = all(can_share_prefix(vlm) for vlm in models)
    found: dict[int, list[Found]] = file.resumed() if file is not None else {}
    if found:
        progress.note(f"{len(found)} of {len(examples)} questions were scored by an interrupted run.")
    append = file.appender(0) if file is not None else lambda new: None
    with progress.task("evaluating", len(examples)) as advance, out_of_memory("score", images_per_batch):
        advance(len(found))
        for batch, indices in batches(models[0].encoder, examples, images_per_batch=images_per_batch, share_prefix=share, done=found):
            new = dict(zip(indices, _score_batch(models, batch), strict=True))
            append(new)
            advance(len(new.keys() - found.keys()))
            found |= new
    return [found[index] for index in range(len(examples))]


@torch.no_grad()
def _score_batch(models: Sequence[VLM], batch: PackedBatch) -> list[list[Found]]:
    """What is found of each of a batch's questions, per model."""
    found: list[list[Found]] = [[] for _ in range(batch.num_questions)]
    reference: torch.Tensor | None = None
    for vlm in models:
        logits = answer_logits(vlm.model, batch.to(vlm.device)).float()
        for item, (tokens, right) in zip(found, _greedy_answers(logits.argmax(-1).tolist(), batch), strict=True):
            item.append({"tokens": tokens, "right": right})
        log_p = logits.log_softmax(-1)
        if reference is None:
            reference = log_p
            continue
        reference = reference.to(log_p.device)  # where the models share one, nothing but the sums travels
        kl = (reference.exp() * (reference - log_p)).sum(-1)
        for value, question in zip(kl.tolist(), batch.question.tolist(), strict=True):
            found[question][-1].setdefault("kl", []).append(value)
    return found


def _qualities(found: Sequence[Sequence[Found]]) -> list[Quality]:
    """Per model, from what was found of each question."""
    qualities = []
    for number in range(len(found[0])):
        own = [item[number] for item in found]
        right, answers = np.array([item["right"] for item in own]), tuple(tuple(item["tokens"]) for item in own)
        kl = places = None
        if number:
            kl = np.array([value for item in own for value in item["kl"]], dtype=np.float32)
            places = np.repeat(np.arange(len(own)), [len(item["kl"]) for item in own])
        qualities.append(Quality(right, kl, places, answers))
    return qualities


def _greedy_answers(predicted: list[int], batch: PackedBatch) -> list[tuple[list[int], bool]]:
    """Each question's predicted tokens up to the first that is not the reference's, and whether there is none such."""
    answers: list[list[int]] = [[] for _ in range(batch.num_questions)]
    right = [True] * batch.num_questions
    for token, target, question in zip(predicted, batch.targets.tolist(), batch.question.tolist(), strict=True):
        if right[question]:
            answers[question].append(token)
            right[question] = token == target
    return list(zip(answers, right, strict=True))


def settings_not_scored(vlm: VLM) -> list[str]:
    """Generation settings of the checkpoint that change its greedy answers, and that teacher-forced scoring does not know, as text."""
    neutral = {
        "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
        "min_length": 0, "min_new_tokens": 0, "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None,
        "sequence_bias": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None,
        "guidance_scale": 1.0,
    }  # fmt: skip
    given = {name: getattr(vlm.model.generation_config, name, None) for name in neutral}
    return [f"{name}={value}" for name, value in given.items() if value not in (None, [], neutral[name])]


def can_share_prefix(vlm: VLM) -> bool:
    """Packing gives every question a full view of the prefix, which a sliding window would cut, and counts positions one by one.

    Its masks are boolean, which of Transformers' attentions only SDPA takes for what they are: eager attention adds them to the scores.
    """
    text = vlm.model.config.get_text_config()
    return vlm.encoder.shares_prefix and getattr(text, "sliding_window", None) is None and text._attn_implementation == "sdpa"


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
