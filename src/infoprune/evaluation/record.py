"""Answers and scores on disk: a file that says what was asked of which model, and that interrupted work can go on from.

While questions are being asked, each process appends to a file of its own beside the final one, ``NAME.0.part``, and every append is on
the disk before the next batch begins. The final file is written aside and renamed. All have one form: a line of JSON that tells model, data
and settings, then a line per question.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout

from infoprune.data import Example
from infoprune.data.seen import image_digest
from infoprune.errors import DataError
from infoprune.model import VLM, precision_name


@dataclass(frozen=True)
class Kind:
    """What a file holds.

    Attributes:
        format: What its header says that it is.
        field: What a line calls the value that was found.
        noun: The values, for people.
        whole: Whether something that was read is such a value.
    """

    format: str
    field: str
    noun: str
    whole: Callable[[Any], bool]


def _is_scored(value: Any) -> bool:
    """Per model a dictionary, as :func:`infoprune.evaluation.quality.score` says; all but the first have a KL."""
    return (
        isinstance(value, list)
        and all(isinstance(own, dict) and {"tokens", "right"} <= own.keys() for own in value)
        and all(isinstance(own.get("kl"), list) for own in value[1:])
    )


ANSWERS = Kind("infoprune-answers-1", "answer", "answers", lambda value: isinstance(value, str))
SCORES = Kind("infoprune-scores-1", "scored", "scores", _is_scored)


@dataclass(frozen=True)
class RecordFile:
    """What was found for each of ``examples``, and what that depends on.

    Attributes:
        path: The final file.
        header: Fingerprint of model, data and settings, as :func:`fingerprint` makes it.
        examples: What is asked.
        kind: What is found.
    """

    path: Path
    header: dict[str, Any]
    examples: Sequence[Example]
    kind: Kind

    @contextmanager
    def held(self, process: int) -> Iterator[None]:
        """Keep other runs away from this process's part for the time of the block; the lock goes with the process, however that ends.

        Raises:
            DataError: Another run is writing, or nothing can be written.
        """
        lock = FileLock(self.path.with_name(f"{self.path.name}.{process}.lock"), timeout=0)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise DataError(f"Another run is writing {self.path}. Wait for it, stop it, or give another name.") from error
        except OSError as error:
            raise DataError(f"Cannot write {self.kind.noun} to {self.path}: {error}.") from error
        try:
            yield
        finally:
            with suppress(OSError):  # while it is held, so that nobody else's goes; some systems forbid that, and it stays
                Path(lock.lock_file).unlink()
            lock.release()

    def finished(self) -> list[Any] | None:
        """All values, if the final file is there.

        Raises:
            DataError: It is damaged, of something else, or of another model, other data or settings.
        """
        if not self.path.exists():
            return None
        found, size = self._read(self.path)
        if len(found) < len(self.examples) or size < self.path.stat().st_size:
            told = f"{len(found)} of {len(self.examples)} {self.kind.noun} can be read"
            raise DataError(f"{self.path} is damaged: {told}. Delete it to ask again.")
        return [found[index] for index in range(len(self.examples))]

    def resumed(self) -> dict[int, Any]:
        """What interrupted processes, however many they were, have found, by index.

        Raises:
            DataError: A part is of another model, other data or settings.
        """
        return {index: value for part in self._parts() for index, value in self._read(part)[0].items()}

    def appender(self, process: int) -> Callable[[dict[int, Any]], None]:
        """A function that puts values by index into this process's part, durably; a line there that a crash cut short is dropped.

        Raises:
            DataError: The part can't be written.
        """
        part = self.path.with_name(f"{self.path.name}.{process}.part")
        size = self._read(part)[1] if part.exists() else 0
        with _writing(part, "ab", self.kind.noun) as file:
            file.truncate(size)
            if size == 0:
                file.write(_line(self.header))

        def append(found: dict[int, Any]) -> None:
            with _writing(part, "ab", self.kind.noun) as file:
                file.writelines(self._value(*item) for item in found.items())

        return append

    def finish(self, found: Sequence[Any]) -> None:
        """Put the final file into place and remove the parts.

        Raises:
            DataError: It can't be written.
        """
        aside = self.path.with_name(f"{self.path.name}.partial")
        with _writing(aside, "wb", self.kind.noun) as file:
            file.write(_line(self.header))
            file.writelines(self._value(*item) for item in enumerate(found))
        aside.replace(self.path)
        self.tidy()

    def tidy(self) -> None:
        """Remove the parts, which the final file has replaced."""
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        own = re.compile(rf"{re.escape(self.path.name)}\.\d+\.part")
        return sorted(path for path in self.path.parent.glob("*.part") if own.fullmatch(path.name))

    def _value(self, index: int, value: Any) -> bytes:
        example = self.examples[index]
        known = {"id": example.id} if example.id is not None else {}
        return _line({"index": index, **known, "image": example.image.name, "question": example.question, self.kind.field: value})

    def _read(self, path: Path) -> tuple[dict[int, Any], int]:
        """Values by index up to the first line that is not whole, and the bytes up to there."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error}") from error
        first, _, rest = data.partition(b"\n")
        expected = _line(self.header)
        if first + b"\n" != expected:
            if expected.startswith(data) and path != self.path:
                return {}, 0  # stopped while the header was being written
            raise DataError(self._mismatch(path, first))
        found: dict[int, Any] = {}
        size = len(expected)
        for line in rest.splitlines(keepends=True):
            item = _parsed(line) if line.endswith(b"\n") else None
            if item is None or item.get("index") not in range(len(self.examples)) or not self.kind.whole(item.get(self.kind.field)):
                break
            found[item["index"]] = item[self.kind.field]
            size += len(line)
        return found, size

    def _mismatch(self, path: Path, first: bytes) -> str:
        held = _parsed(first)
        if held is None or held.get("format") != self.kind.format:
            return f"{path} is not a file of {self.kind.noun}. Give another name, or move that file away."
        differs = sorted(key for key in {*held, *self.header} if held.get(key) != self.header.get(key))
        return f"{path} holds {self.kind.noun} that differ in {', '.join(differs)}. Give another name, or delete that file to ask again."


@contextmanager
def _writing(path: Path, mode: str, noun: str) -> Iterator[IO[bytes]]:
    """An open file, on the disk for good when the block is left."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"Cannot write {noun} to {path}: {error}. Those that were recorded before are kept.") from error


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def fingerprint(vlm: VLM, examples: Sequence[Example], kind: Kind = ANSWERS, **settings: Any) -> dict[str, Any]:
    """What a file of ``kind`` depends on: model (configuration, weights, precision), processor, prompt, data and ``settings``.

    The data are known by questions, and names and contents of the image files; the batch size and the number of processes don't matter.
    """
    found = {example.image: image_digest(example.image) for example in examples if example.image.is_file()}
    asked = [(example.id, example.image.name, found.get(example.image), vlm.encoder.prompt_of(example)) for example in examples]
    images = getattr(vlm.processor, "image_processor", None)
    return {
        "format": kind.format,
        "model": weights_digest(vlm.model),
        "configuration": _digest(vlm.model.config.to_dict()),
        "dtype": precision_name(vlm.model.dtype),
        "generation": _digest(vlm.model.generation_config.to_diff_dict()),
        "processor": _digest(images.to_dict() if images is not None else None),
        "prompt": vlm.encoder.prompt("{question}"),
        "data": _digest(asked),
        "num_questions": len(examples),
        **settings,
    }


def score_fingerprint(models: Sequence[VLM], examples: Sequence[Example]) -> dict[str, Any]:
    """What scores of several models beside each other depend on, reference answers included."""
    against = [weights_digest(vlm.model) for vlm in models[:-1]]
    return fingerprint(models[-1], examples, SCORES, against=against, reference=_digest([example.answer for example in examples]))


def weights_digest(model: torch.nn.Module) -> str:
    """Digest of all weights, by name, shape, precision and value."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        add_tensor(digest, name, tensor)
    return digest.hexdigest()[:16]


def add_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Update a digest by a tensor's name, shape, precision and values."""
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:  # quantised weights are made of several tensors
        for part in flatten()[0]:
            add_tensor(digest, part, getattr(tensor, part))
    else:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _digest(value: Any) -> str:
    def told(item: Any) -> str:
        return re.sub(r" at 0x[0-9a-f]+", "", str(item))  # the same in every process

    return hashlib.sha256(json.dumps(_without_origin(value), sort_keys=True, default=told).encode()).hexdigest()[:16]


def _without_origin(value: Any) -> Any:
    """A configuration without the traces of where and by what it was saved."""
    if isinstance(value, (list, tuple)):
        return [_without_origin(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {str(key): _without_origin(item) for key, item in value.items() if key not in ("_name_or_path", "transformers_version")}
