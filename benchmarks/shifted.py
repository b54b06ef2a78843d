"""A second data set that no choice was made on: easy-VQA's test images seen otherwise, and asked about in other words.

Images are mirrored, turned by 90 degrees and given noise; questions use wordings that easy-VQA does not have. What an image shows is
read off the original answers, so only images are used whose shape and colour these tell. The dense model is less sure here, by design.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image

from infoprune.data import Example, load_examples

NOISE = 8.0  # standard deviation, of 255
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
QUESTIONS_PER_IMAGE = 4


def shifted(folder: Path, num_questions: int, seed: int = 0) -> list[Example]:
    """Questions on altered test images, which are written to ``folder``.

    Args:
        folder: For the images.
        num_questions: Rounded up to whole images.
        seed: Of noise and of what is asked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random_, found = random.Random(seed), []
    for image, (shape, color) in shown().items():
        if len(found) >= num_questions:
            break
        target = folder / f"{seed}-{image.name}"
        noise = np.random.default_rng([seed, len(found)])
        if not target.exists():
            altered(Image.open(image), noise).save(target)
        found += [Example(target, question, answer) for question, answer in asked(shape, color, random_)]
    return found


def shown() -> dict[Path, tuple[str, str]]:
    """Shape and colour of the test images whose answers tell both."""
    shapes: dict[Path, str] = {}
    colors: dict[Path, str] = {}
    for example in load_examples("easy-vqa:test"):
        for known, found in ((SHAPES, shapes), (COLORS, colors)):
            if example.answer in known:
                found[example.image] = example.answer
    return {image: (shape, colors[image]) for image, shape in shapes.items() if image in colors}


def altered(image: Image.Image, noise: np.random.Generator) -> Image.Image:
    """Mirrored, turned, noisy."""
    turned = image.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT).transpose(Image.Transpose.ROTATE_90)
    values = np.asarray(turned, dtype=np.float64) + noise.normal(0, NOISE, (*turned.size[::-1], 3))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def asked(shape: str, color: str, random_: random.Random) -> list[tuple[str, str]]:
    """Questions on one image and their answers."""
    other_shape = random_.choice([s for s in SHAPES if s != shape])
    other_color = random_.choice([c for c in COLORS if c != color])
    truth = random_.random() < 0.5
    return [
        ("which shape do you see?", shape),
        ("name the color of the shape.", color),
        (f"is the shape a {shape if truth else other_shape}?", "yes" if truth else "no"),
        (f"is the shape {other_color if truth else color}?", "no" if truth else "yes"),
    ]
