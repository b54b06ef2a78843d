"""Users' own data: a ``.jsonl`` (``.ndjson``) or ``.json`` file of records."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError

from infoprune.data.benchmark import Doubtful, Row, Text, complaint, distinct_keys, most_frequent, read_json
from infoprune.data.example import Example
from infoprune.data.images import ImageFolder, OutsideError
from infoprune.data.problems import Problems
from infoprune.errors import DataError

LINES = (".jsonl", ".ndjson")


def _text(value: Any) -> Any:
    """Numbers as their text: answers to counting questions often are. Not truth values, which may stand for yes and no, or for words."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Answer = Annotated[str, BeforeValidator(_text)]


class _Record(Row):
    image: Text
    question: Text
    answer: Answer | None = None  # tables have null for what is not there
    answers: list[Answer] | None = None
    id: Answer | None = None
    kinds: dict[str, str] | None = None


def read(path: Path, problems: Problems) -> Iterator[Example]:
    """Examples of a file whose records have ``image``, ``question``, ``answer`` or ``answers``, and may have ``id`` and ``kinds``.

    Raises:
        DataError: The file can't be read, is no list, or of another kind than these.
    """
    kind = path.suffix.lower()
    if kind not in (*LINES, ".json"):
        raise DataError(f"{path} is of no kind that is read: give a .jsonl file, a record a line, or a .json file with a list of records.")
    images = ImageFolder(path.parent)
    for where, item in _lines(path, problems) if kind in LINES else _items(path, problems):
        if isinstance(item, Doubtful):  # told, and not used
            continue
        try:
            record = _Record.model_validate(item)
            image = _image(record.image, images)
        except ValidationError as error:
            problems.add("malformed row", f"{where}: {complaint(error)}")
        except OutsideError as error:
            problems.add("image outside the folder", f"{where}: {error}")
        else:
            if image is None:
                problems.add(f"image missing in {path.parent}", f"{where}: {record.image}")
                continue
            answers = record.answers or []
            answer = (record.answer or "").strip() or most_frequent(answers)
            yield Example(image, record.question, answer, id=record.id, answers=tuple(answers), kinds=record.kinds or {})


def _image(name: str, images: ImageFolder) -> Path | None:
    """An absolute path is the user's own choice; a relative one stays beside the file."""
    path = Path(name)
    return (path if os.path.isfile(path) else None) if path.is_absolute() else images.find(name)


def _items(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    loaded = read_json(path, problems)
    if not isinstance(loaded, list):
        raise DataError(f"{path} must hold a JSON list of records, one per question.")
    for number, item in enumerate(loaded, start=1):
        yield f"record {number}", item


def _lines(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line, object_pairs_hook=distinct_keys(f"line {number}", problems))
            except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
                problems.add("malformed row", f"line {number} is not valid JSON: {error}")
