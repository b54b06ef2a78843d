"""What a public benchmark is to this library: official files, rows, prompt; the same whichever benchmark."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from infoprune.data.example import Example
from infoprune.data.images import ImageFolder, OutsideError
from infoprune.data.problems import Problems
from infoprune.errors import DataError

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Row(BaseModel):
    """One record of a benchmark; what is not named is ignored, and a number is no text."""

    model_config = ConfigDict(strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        """Half of a character (a lone surrogate, from text that was cut) can be in JSON, but not in a file or a tokenizer."""
        left = [value]
        while left:
            item = left.pop()
            if isinstance(item, str) and not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"{item[:60]!a} has half a character in it (a lone surrogate)") from error
            elif isinstance(item, dict):
                left += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                left += item
        return value


@dataclass(frozen=True)
class Prompt:
    """How a benchmark's questions are put to a model, as most published results have it (lmms-eval).

    Attributes:
        suffix: Follows the question.
        capitalize: The question's first letter becomes a capital and all others small, as ``str.capitalize`` has it.
        ocr: Add the words that a reader found in the image, where the example has such a list, be it empty.
        max_new_tokens: Longest answer.
    """

    suffix: str = SHORT_ANSWER
    capitalize: bool = False
    ocr: bool = False
    max_new_tokens: int = 16

    def text(self, example: Example) -> str:
        """The whole text beside the image."""
        question = example.question.capitalize() if self.capitalize else example.question
        tokens = example.extras.get("ocr_tokens") if self.ocr else None
        reference = f"\nReference OCR token: {', '.join(tokens)}" if tokens is not None else ""
        return f"{question}{reference}{self.suffix}"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's names and readers.

    Attributes:
        name: As in data specifications.
        hub_id: Default id on the hub.
        patterns: Names that the file of questions, or a folder of its parts, may have, with ``{split}``.
        image_folders: Where images lie besides the folder itself, given the split.
        rows: Reads a split's rows from the official files in a folder, telling problems as it goes.
        parse: Turns a row into an example whose image is the official file name, given the split. A row that does not fit raises pydantic's
            ``ValidationError``.
        aliases: Other names of splits.
        defaults: The split that is meant by ``train``, ``validation`` and ``test`` where a specification names none: the test split that is
            answered in public, not one whose answers are secret.
        hub_splits: Names of splits on the hub, where they differ.
        hub_configs: Configurations on the hub, given the split: of the questions, and of the images where those lie apart.
        prompt: How questions are put.
    """

    name: str
    hub_id: str
    patterns: tuple[str, ...]
    image_folders: Callable[[str], tuple[str, ...]]
    rows: Callable[[Path, str, Problems], Iterator[Any]]
    parse: Callable[[Any, str], Example]
    aliases: Mapping[str, str]
    defaults: Mapping[str, str]
    hub_splits: Mapping[str, str]
    hub_configs: Callable[[str], tuple[str | None, str | None]] = lambda split: (None, None)
    prompt: Prompt = field(default_factory=Prompt)

    def split(self, given: str | None, default: str) -> str:
        """The official name of the split that was asked for."""
        return self.aliases.get(given, given) if given else self.defaults.get(default, default)

    def splits(self, folder: Path) -> list[str]:
        """Splits whose questions lie in ``folder`` or one of its subfolders."""
        found = set()
        for before, _, after in (pattern.partition("{split}") for pattern in self.patterns):
            paths = (*folder.glob(f"{before}*{after}"), *folder.glob(f"*/{before}*{after}"))
            found |= {path.name[len(before) : len(path.name) - len(after)] for path in paths}
        return sorted(found)

    def read(self, folder: Path, split: str, problems: Problems) -> Iterator[Example]:
        """Examples of a split from the official files.

        Raises:
            DataError: The folder has no such split, or a file in it can't be read.
        """
        if split not in (there := self.splits(folder)):
            if not there:
                name = self.patterns[0].format(split=split)
                raise DataError(f"{folder} has no {name}, nor any other split of {self.name} as its authors ship it.")
            raise DataError(f"{self.name} in {folder} has no split '{split}'; it has {', '.join(there)}.")
        images = ImageFolder(folder, self.image_folders(split))
        for row in self.rows(folder, split, problems):
            example = self.parsed(row, split, problems)
            if example is None:
                continue
            try:
                path = images.find(str(example.image))
            except OutsideError as error:
                problems.add("image outside the folder", f"question {example.id}: {error}")
                continue
            if path is None:
                problems.add(f"image missing in {images}", example.image.name)
            else:
                yield replace(example, image=path)

    def parsed(self, row: Any, split: str, problems: Problems) -> Example | None:
        """The row as an example, or a problem more."""
        try:
            example = self.parse(row, split)
            return replace(example, prompt=self.prompt.text(example))
        except ValidationError as error:
            problems.add("malformed row", f"{_name(row)}: {complaint(error)}")
            return None


def complaint(error: ValidationError) -> str:
    """The first thing that is wrong with a row, in a few words."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "model_type":
        return f"{where or 'it'} is not an object with named fields"
    return f"{where}: {first['msg']}" if where else first["msg"]


def _name(row: Any) -> str:
    if isinstance(row, dict):
        for key in ("question_id", "id"):
            if isinstance(row.get(key), str | int):
                return f"question {row[key]}"
    return "a row"


def most_frequent(answers: Sequence[str]) -> str:
    """The answer that most people gave; of several, the first; empty if nobody gave any."""
    given = [answer.strip() for answer in answers if answer.strip()]
    return Counter(given).most_common(1)[0][0] if given else ""


def official_file(folder: Path, name: str) -> Path | None:
    """The file or folder of that name in ``folder`` or one of its subfolders; ``None``: there is none.

    Raises:
        DataError: It leads out of the folder, or several subfolders have one.
    """
    places = [folder / name] if (folder / name).exists() else sorted(folder.glob(f"*/{name}"))
    if len(places) > 1:
        raise DataError(f"{folder} has several {name}: {', '.join(map(str, places))}. Give the folder with the one to use.")
    return ImageFolder(folder).inside(places[0]) if places else None


def read_json(path: Path, problems: Problems) -> Any:
    """What a JSON file holds; of a key that occurs twice in one object, which is a problem, the first value.

    Raises:
        DataError: It can't be read, or is not JSON.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file, object_pairs_hook=distinct_keys(path.name, problems))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise DataError(f"{path} is not valid JSON: {error}. Is the download complete?") from error


class Doubtful(dict[str, Any]):
    """An object of which a key stood there twice; it has the first value."""


def distinct_keys(name: str, problems: Problems) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """How :mod:`json` makes objects of a file with that name: what stands under a key that was there before does not go silently."""

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            found = Doubtful()
            for key, value in pairs:
                if key in found:
                    problems.add("key that occurs twice in one object", f"{name}: {key}")
                else:
                    found[key] = value
        return found

    return made


def listed(path: Path, key: str, problems: Problems) -> list[Any]:
    """The list that an official file has under ``key``.

    Raises:
        DataError: There is no such list in it.
    """
    loaded = read_json(path, problems)
    found = loaded.get(key) if isinstance(loaded, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{path} has no list '{key}'; it is not in the benchmark's official format.")
    return found
