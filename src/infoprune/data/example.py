"""One image, one question, one answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from infoprune.errors import DataError


@dataclass(frozen=True)
class Example:
    """A question about an image, with the answer that counts as right.

    Attributes:
        image: Path of the image file; examples with equal paths share their image's tokens when packed.
        question: What is asked, without image markers.
        answer: The reference answer, without surrounding white space.
    """

    image: Path
    question: str
    answer: str

    def load_image(self) -> Image.Image:
        """Read the image as RGB.

        Raises:
            DataError: The file is missing or is not an image.
        """
        try:
            with Image.open(self.image) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DataError(f"Cannot read the image {self.image}: {error}. Check that the path is right and the file is whole.") from error


def subset(examples: Sequence[Example], count: int | None, *, seed: int, spread: bool = False) -> list[Example]:
    """A reproducible random sample, in the original order.

    Args:
        examples: The pool.
        count: How many to take; ``None`` or more than there are: all.
        seed: Seed of the draw.
        spread: Take as many different images as possible (one question each) before repeating one. Moments want independent
            images; evaluation wants whole images, whose questions share a prefix.
    """
    if count is None or count >= len(examples):
        return list(examples)
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    if spread:
        turn: dict[Path, int] = {}
        rank = {}
        for index in order:
            image = examples[index].image
            rank[index] = turn[image] = turn.get(image, -1) + 1
        order.sort(key=lambda index: rank[index])  # stable: the shuffle decides within a turn
    return [examples[index] for index in sorted(order[:count])]
