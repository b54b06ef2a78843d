"""Which images a model was made with: figures on them are no independent test of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from infoprune.data.example import Example
from infoprune.errors import CheckpointError

FILE = "images.json"  # beside the weights
DIGITS = 16  # of an image's SHA-256
USES = {"calibration": "calibrated on", "training": "trained on", "validation": "validated on"}
Seen = Mapping[str, Sequence[str]]  # digests of images by what they were used for, of USES


def image_digest(path: Path) -> str:
    """The first digits of the SHA-256 of an image file, as models and certificates name images; raises OSError if it can't be read."""
    found = path.stat()
    return _digest(path, found.st_size, found.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:DIGITS]


def digests(examples: Iterable[Example]) -> list[str]:
    """Of all images that the examples are about."""
    return sorted({image_digest(image) for image in {example.image for example in examples}})


def write_seen(folder: Path, seen: Seen) -> None:
    """Beside the weights in ``folder``, what they were made with, if that is known."""
    if seen:
        (folder / FILE).write_text(json.dumps(dict(seen), indent=1) + "\n", encoding="utf-8")


def read_seen(file: Path) -> dict[str, list[str]]:
    """What a checkpoint says of the images that it was made with.

    Raises:
        CheckpointError: It can't be read as that.
    """
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not found.keys() <= USES.keys():
            raise ValueError(f"it must map {', '.join(USES)} to lists")
        if not all(isinstance(d, str) and re.fullmatch(rf"[0-9a-f]{{{DIGITS}}}", d) for own in found.values() for d in list(own)):
            raise ValueError(f"images are named by {DIGITS} hexadecimal digits")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Restore it, or delete it to go without.") from error
    return found


def seen_warnings(seen: Seen, images: Iterable[Path]) -> list[str]:
    """One line for each use that any of ``images`` was put to."""
    distinct = set(images)
    found = [image_digest(path) for path in distinct] if seen else []
    told = []
    for use, known in ((use, set(known)) for use, known in seen.items()):
        if count := sum(digest in known for digest in found):
            told.append(
                f"{count:,} of the {len(distinct):,} images are among those that the model was {USES[use]}: its figures on them are no "
                "independent test."
            )
    return told
