"""One image, one question, and the answers that people gave."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from infoprune.data.images import loaded


@dataclass(frozen=True)
class Example:
    """A question about an image, with the answer that counts as right.

    Attributes:
        image: Path of the image file; examples with equal paths share their image's tokens when packed.
        question: What is asked, without image markers.
        answer: The reference answer, without surrounding white space: what training aims at and exact match compares with. Empty where
            there is no reference, as in test splits whose answers are kept secret; see :attr:`answered`.
        id: The question's id in its data set, unique there; ``None`` where the data has none.
        answers: All that people answered, as they wrote it, where a benchmark's metric weighs several; empty: ``answer`` alone.
        kinds: Names and values by which figures are broken down, e.g. ``{"answer_type": "yes/no"}``.
        extras: Lists of strings by name that the data set's own metric or prompt reads, e.g. ``{"ocr_tokens": ("stop",)}``.
        prompt: The question as its benchmark puts it to models, with what is added to it; ``None``: as it is.
    """

    image: Path
    question: str
    answer: str
    id: str | None = None
    answers: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict, compare=False)
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    prompt: str | None = field(default=None, compare=False)

    @property
    def answered(self) -> bool:
        """Whether there is a reference answer. Without one a question can be put to a model, but neither trained on nor scored."""
        return bool(self.answer)

    def load_image(self) -> Image.Image:
        """Read the image as RGB, as :func:`infoprune.data.images.as_rgb` has it.

        Raises:
            DataError: The file is missing, is not an image, or has more pixels than Pillow's limit against decompression bombs.
        """
        return loaded(self.image)


def subset(examples: Sequence[Example], count: int | None, *, seed: int, per_image: int | None = None) -> list[Example]:
    """A reproducible random sample, in the original order.

    Args:
        examples: The pool.
        count: How many to take; ``None`` or more than there are: all.
        seed: Seed of the draw.
        per_image: Draw images, so many questions of each, before coming back to one. Moments want many images, and questions that share
            one cost a fraction of those that don't.
    """
    if count is None or count >= len(examples):
        return list(examples)
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    if per_image is not None:
        place: dict[Path, int] = {}
        turn: dict[Path, int] = {}
        keys = {}
        for index in order:
            image = examples[index].image
            turn[image] = turn.get(image, -1) + 1
            keys[index] = (turn[image] // per_image, place.setdefault(image, len(place)))
        order.sort(key=lambda index: keys[index])
    return [examples[index] for index in sorted(order[:count])]
