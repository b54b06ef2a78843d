"""Turn a data specification (``easy-vqa:test``, ``my.jsonl``) into examples."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infoprune.data.example import Example
from infoprune.errors import DataError

# The official training split has 4,000 images. The demo model never saw one in twenty of them: those are ``validation``, for choosing
# and stopping; ``train`` is the rest.
EASY_VQA_SPLITS = ("train", "validation", "test")
VALIDATION_SHARE, VALIDATION_SEED = 20, 0


def load_examples(spec: str, *, default_split: str = "train", notify: Callable[[str], None] = lambda message: None) -> list[Example]:
    """Load the examples that ``spec`` names.

    Args:
        spec: ``easy-vqa`` or ``easy-vqa:SPLIT`` (train, validation, test), or the path of a ``.jsonl`` or ``.json`` file whose records have
            ``image`` (a path, relative to the file), ``question`` and ``answer``.
        default_split: The split when ``easy-vqa`` comes without one.
        notify: Called with one line for people before a download.

    Raises:
        DataError: Nothing there, nothing readable in it, or a record lacks a field.
    """
    name, _, split = spec.partition(":")
    if name == "easy-vqa":
        return _easy_vqa(split or default_split, notify)
    path = Path(spec).expanduser()
    if not path.is_file():
        raise DataError(f"No data at '{spec}'. Give 'easy-vqa', 'easy-vqa:test', or a .jsonl file with image, question and answer.")
    examples = [_record(item, f"{path}, record {number}", path.parent) for number, item in enumerate(_read_json(path), start=1)]
    if not examples:
        raise DataError(f"{path} has no records. Each line needs image, question and answer.")
    return examples


def _read_json(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}") from error
    try:
        if path.suffix != ".jsonl":
            loaded = json.loads(text)
            if not isinstance(loaded, list):
                raise DataError(f"{path} must hold a JSON list of records, one per question.")
            return loaded
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not valid JSON: {error.msg}.") from error
    return records


def _record(item: Any, where: str, folder: Path) -> Example:
    if not isinstance(item, dict):
        raise DataError(f"{where} is not an object with image, question and answer.")
    for field in ("image", "question", "answer"):
        if not isinstance(item.get(field), str) or not item[field].strip():
            raise DataError(f"{where} lacks a non-empty text field '{field}'.")
    image = Path(item["image"])
    return Example(image if image.is_absolute() else folder / image, item["question"].strip(), item["answer"].strip())


def _easy_vqa(split: str, notify: Callable[[str], None]) -> list[Example]:
    from infoprune.demo.sources import EASY_VQA, fetch

    if split not in EASY_VQA_SPLITS:
        raise DataError(f"easy-vqa has no split '{split}'; it has {', '.join(EASY_VQA_SPLITS)}.")
    folder = fetch(EASY_VQA, notify=notify) / ("test" if split == "test" else "train")
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    examples = [Example(folder / "images" / f"{image}.png", question, answer) for question, answer, image in questions]
    if split == "test":
        return examples
    images = list(dict.fromkeys(example.image for example in examples))
    held_out = set(random.Random(VALIDATION_SEED).sample(images, len(images) // VALIDATION_SHARE))
    return [example for example in examples if (example.image in held_out) == (split == "validation")]
