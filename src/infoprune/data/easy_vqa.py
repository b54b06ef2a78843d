"""easy-vqa: synthetic shapes, one of thirteen answers; small enough to come with a wheel."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from infoprune.data.example import Example
from infoprune.errors import DataError

# The official training split has 4,000 images. The demo model never saw one in twenty of them: those are ``validation``, for choosing
# and stopping; ``train`` is the rest.
SPLITS = ("train", "validation", "test")
VALIDATION_SHARE, VALIDATION_SEED = 20, 0


def read(split: str, notify: Callable[[str], None]) -> list[Example]:
    """Examples of a split, from the pinned wheel.

    Raises:
        DataError: There is no such split.
        InfoPruneError: The wheel can't be fetched.
    """
    from infoprune.demo.sources import EASY_VQA, fetch

    if split not in SPLITS:
        raise DataError(f"easy-vqa has no split '{split}'; it has {', '.join(SPLITS)}.")
    folder: Path = fetch(EASY_VQA, notify=notify) / ("test" if split == "test" else "train")
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    examples = [Example(folder / "images" / f"{image}.png", question, answer) for question, answer, image in questions]
    if split == "test":
        return examples
    images = list(dict.fromkeys(example.image for example in examples))
    held_out = set(random.Random(VALIDATION_SEED).sample(images, len(images) // VALIDATION_SHARE))
    return [example for example in examples if (example.image in held_out) == (split == "validation")]
