"""Two models' answers to the same questions: by how much they differ, how sure that is, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infoprune.data import Example
from infoprune.data.images import identities
from infoprune.evaluation.certify import by_image, mcnemar, rate_interval, upper_bounds
from infoprune.evaluation.quality import Quality
from infoprune.prompts import PromptEncoder

LOST, CHANGED, WON = "lost", "changed", "won"


def differences(
    dense: Quality,
    compressed: Quality,
    examples: Sequence[Example],
    encoder: PromptEncoder,
    *,
    confidence: float = 0.95,
    images: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Bounds on the drop, tests, agreement and the questions that changed, for JSON.

    Args:
        dense, compressed: Of :func:`infoprune.evaluation.quality.score`, on ``examples``.
        examples: The questions.
        encoder: Knows the answers' tokens.
        confidence: Of the bounds.
        images: Which questions share an image; ``None``: what is in the files tells.

    Returns:
        ``drop_bounds`` (points, one-sided, each at ``confidence``; see :mod:`infoprune.evaluation.certify` for what they assume),
        ``mcnemar``, ``agreement`` and ``agreement_ci95`` (percent of questions with the same answer, see :class:`Quality`),
        ``changed`` (see :func:`changed_questions`).
    """
    images = identities([example.image for example in examples]) if images is None else images
    drop = by_image(dense.scores.astype(float) - compressed.scores, images)
    apart = by_image(np.array([a != b for a, b in zip(dense.answers, compressed.answers, strict=True)], dtype=float), images)
    low, high = rate_interval(apart, 0.95)
    return {
        "confidence": confidence,
        "num_images": len(drop.sums),
        "drop_bounds": upper_bounds(drop, confidence).points(),
        "mcnemar": mcnemar(dense.correct, compressed.correct).__dict__,
        "agreement": 100 * (1 - apart.mean),
        "agreement_ci95": [100 * (1 - high), 100 * (1 - low)],
        "changed": changed_questions(dense, compressed, examples, encoder),
    }


def changed_questions(dense: Quality, compressed: Quality, examples: Sequence[Example], encoder: PromptEncoder) -> list[dict[str, Any]]:
    """Questions that the two models answer differently, worst first: by what the compressed model's score lost, then by KL.

    ``outcome`` compares the two scores: what was lost or won may be a part, and what is neither may be right in other words.
    """
    kl = compressed.kl_by_question
    found = []
    for index, (example, before, after) in enumerate(zip(examples, dense.answers, compressed.answers, strict=True)):
        if before == after:
            continue
        lost = float(dense.scores[index]) - float(compressed.scores[index])
        found.append({
            "index": index, "id": example.id, "image": str(example.image), "question": example.question, "answer": example.answer,
            "dense_answer": _text(before, example, dense.correct[index], encoder),
            "compressed_answer": _text(after, example, compressed.correct[index], encoder),
            "outcome": LOST if lost > 0 else WON if lost < 0 else CHANGED, "lost": lost,
            "dense_score": float(dense.scores[index]), "compressed_score": float(compressed.scores[index]),
            "kl_nats": None if kl is None else float(kl[index]),
        })  # fmt: skip
    return sorted(found, key=lambda item: (-item["lost"], -(item["kl_nats"] or 0.0), item["index"]))


def _text(answer: tuple[int, ...] | str, example: Example, right: bool, encoder: PromptEncoder) -> str:
    """An answer as far as it is known: of a scored one, with an ellipsis unless it ends."""
    if isinstance(answer, str):
        return answer
    if right:
        return example.answer
    text = encoder.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
    return text if answer[-1] == encoder.end else text + "…"
