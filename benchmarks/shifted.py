"""Data sets that calibration never saw the like of: easy-VQA's images seen otherwise, and asked about in other words.

Images are altered and questions use wordings that easy-VQA does not have. What an image shows is read off the original answers, so only
images are used whose shape and colour these tell. The dense model is less sure here, by design. There are two shifts with nothing in
common: ``VALIDATION``, of validation images, may choose defaults; ``TEST``, of test images, is for what was chosen without it. ``BROAD``
is ``TEST`` with five ways to ask for one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from infoprune.data import Example, load_examples

NOISE = 8.0  # standard deviation, of 255
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def turned(image: Image.Image, noise: np.random.Generator) -> Image.Image:
    """Mirrored, turned by 90 degrees, noisy."""
    changed = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).transpose(Image.Transpose.ROTATE_90)
    values = np.asarray(changed, dtype=np.float64) + noise.normal(0, NOISE, (*changed.size[::-1], 3))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def dimmed(image: Image.Image, noise: np.random.Generator) -> Image.Image:
    """Upside down, blurred, darker or brighter."""
    changed = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).filter(ImageFilter.GaussianBlur(0.8))
    return ImageEnhance.Brightness(changed).enhance(float(noise.uniform(0.8, 1.2)))


@dataclass(frozen=True)
class Shift:
    """A way to look at a split's images and to ask about them.

    Attributes:
        split: Of easy-VQA.
        alter: What is done to an image, given randomness of its own.
        shape, color: Ways to ask for them; ``is_shape``, ``is_color`` with a place for a candidate. As many of each.
    """

    split: str
    alter: Callable[[Image.Image, np.random.Generator], Image.Image]
    shape: tuple[str, ...]
    color: tuple[str, ...]
    is_shape: tuple[str, ...]
    is_color: tuple[str, ...]

    @property
    def wordings(self) -> tuple[str, ...]:
        """The ways to ask, each once on every image."""
        return tuple(way for ways in zip(self.shape, self.color, self.is_shape, self.is_color, strict=True) for way in ways)


VALIDATION = Shift(
    split="validation",
    alter=dimmed,
    shape=("tell me what form this picture has.",),
    color=("describe the color of this object.",),
    is_shape=("could you find a {} here?",),
    is_color=("was it drawn in {}?",),
)
TEST = Shift(
    split="test",
    alter=turned,
    shape=("which shape do you see?",),
    color=("name the color of the shape.",),
    is_shape=("is the shape a {}?",),
    is_color=("is the shape {}?",),
)
BROAD = replace(
    TEST,
    shape=(*TEST.shape, "what is drawn here?", "name the shape.", "what geometric form is this?", "what kind of shape is shown?"),
    color=(*TEST.color, "which color is it?", "what is the object's color?", "how is the shape colored?", "what color do you see?"),
    is_shape=(*TEST.is_shape, "do you see a {}?", "is this a {}?", "is a {} shown?", "does the picture show a {}?"),
    is_color=(*TEST.is_color, "is it {}?", "is the object {} in color?", "do you see a {} object?", "is something {} here?"),
)


def shifted(shift: Shift, folder: Path, num_questions: int, seed: int = 0) -> list[Example]:
    """Questions on altered images, which are written to ``folder``.

    Args:
        shift: Of what.
        folder: For the images.
        num_questions: Rounded up to whole images.
        seed: Of noise and of what is asked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random_, found = random.Random(seed), []
    for image, (shape, color) in shown(shift.split).items():
        if len(found) >= num_questions:
            break
        target = folder / f"{shift.split}-{seed}-{image.name}"
        noise = np.random.default_rng([seed, len(found)])
        if not target.exists():
            shift.alter(Image.open(image).convert("RGB"), noise).save(target)
        found += [
            Example(target, question, answer, kinds={"wording": wording})
            for wording, (question, answer) in zip(shift.wordings, asked(shift, shape, color, random_), strict=True)
        ]
    return found


def shown(split: str) -> dict[Path, tuple[str, str]]:
    """Shape and colour of the images whose answers tell both."""
    shapes: dict[Path, str] = {}
    colors: dict[Path, str] = {}
    for example in load_examples(f"easy-vqa:{split}"):
        for known, found in ((SHAPES, shapes), (COLORS, colors)):
            if example.answer in known:
                found[example.image] = example.answer
    return {image: (shape, colors[image]) for image, shape in shapes.items() if image in colors}


def asked(shift: Shift, shape: str, color: str, random_: random.Random) -> list[tuple[str, str]]:
    """Questions on one image and their answers."""
    found = []
    for ask_shape, ask_color, is_shape, is_color in zip(shift.shape, shift.color, shift.is_shape, shift.is_color, strict=True):
        other_shape = random_.choice([s for s in SHAPES if s != shape])
        other_color = random_.choice([c for c in COLORS if c != color])
        truth = random_.random() < 0.5
        found += [
            (ask_shape, shape),
            (ask_color, color),
            (is_shape.format(shape if truth else other_shape), "yes" if truth else "no"),
            (is_color.format(other_color if truth else color), "no" if truth else "yes"),
        ]
    return found
