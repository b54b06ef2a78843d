"""Image files that may come from anywhere: none outside the folder given, none that unpacks to more than Pillow's limit."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from infoprune.errors import DataError

# Pillow knows formats whose decoders start other programs (EPS); these are pictures, and decoded here.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO")  # cameras' MPO comes with JPEG
ORIENTATION = 0x0112  # the EXIF tag, and what undoes its values
TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
THREADS = 16  # reading files waits for the disk, or for a network behind it


class OutsideError(DataError):
    """A path that leaves the folder it was given for."""


def home_expanded(path: str) -> Path:
    """With the home folder for ``~``; what names no user's home stays as it is."""
    return Path(os.path.expanduser(path))


@cache
def formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_mode(image: Image.Image) -> None:
    """Refuse pixels that are measurements, of which nobody says what is white.

    Raises:
        ValueError: They are 32-bit integers or floating point.
    """
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # as which older versions of Pillow open 16-bit PNGs
        raise ValueError(f"its pixels are numbers of mode '{image.mode}', not colours; convert it to 8 bits")


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture as viewers show it: turned as its camera says, on white where it is transparent, 16 bits scaled to 8.

    Raises:
        ValueError: See :func:`check_mode`.
    """
    check_mode(image)
    image.load()  # before the tag is read: Pillow turns TIFFs itself while it loads them, and takes the tag away
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    image = image if turn is None else image.transpose(turn)  # not by Pillow's exif_transpose, which fails on other tags that are damaged
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The image, its header read and its pixels not yet.

    Raises:
        DataError: The file is missing, is not an image, is cut short (while its pixels are read), or has too many pixels.
    """
    try:
        with Image.open(path, formats=formats()) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:  # Pillow only warns up to twice its limit
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels are more than Pillow's limit of {limit} (PIL.Image.MAX_IMAGE_PIXELS)"
                )
            yield image
    except Exception as error:  # Pillow's decoders raise what they like on files that were damaged or made up
        raise DataError(f"Cannot read the image {path}: {error}. Check that the path is right and the file is whole.") from error


def loaded(path: Path) -> Image.Image:
    """Read an image as RGB, as :func:`as_rgb` has it.

    Raises:
        DataError: See :func:`opened`.
    """
    with opened(path) as image:
        return as_rgb(image)


def sizes(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Width and height of each image, by its header.

    Raises:
        DataError: See :func:`opened`.
    """

    def size(path: Path) -> tuple[int, int]:
        with opened(path) as image:
            return image.size

    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(distinct, pool.map(size, distinct), strict=True))


def unreadable(paths: Iterable[Path]) -> dict[Path, str]:
    """Which of the images can't be read to their ends, and why."""

    def complaint(path: Path) -> str | None:
        try:
            with opened(path) as image:
                check_mode(image)
                image.getexif()
                image.draft("RGB", (1, 1))  # a JPEG's whole stream is read, its pixels are made at an eighth of the size
                image.load()
                return None
        except DataError as error:
            return str(error.__cause__)

    distinct = list(dict.fromkeys(paths))
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is an error here
        return {path: reason for path, reason in zip(distinct, pool.map(complaint, distinct), strict=True) if reason is not None}


def same_images(images: Iterable[Path], others: Iterable[Path]) -> set[Path]:
    """Which of ``images`` are among ``others``: by path, or by content under another name. Only files of equal size are read."""
    by_size: dict[int, set[Path]] = {}
    known = set(others)
    for path in known:
        by_size.setdefault(_size(path), set()).add(path)
    digests: dict[Path, bytes] = {}

    def digest(path: Path) -> bytes:
        if path not in digests:
            digests[path] = hashlib.sha256(path.read_bytes()).digest()
        return digests[path]

    return {
        image
        for image in set(images)
        if image in known or (_size(image) >= 0 and any(digest(image) == digest(other) for other in by_size.get(_size(image), ())))
    }


def identities(images: Sequence[Path]) -> list[str]:
    """What tells each image from others, whatever files are called: the same for copies. Only files of equal size are read."""
    sizes = {path: _size(path) for path in set(images)}
    common = Counter(sizes.values())

    def identity(path: Path) -> str:
        alone = sizes[path] < 0 or common[sizes[path]] == 1
        return str(path) if alone else hashlib.sha256(path.read_bytes()).hexdigest()

    known = {path: identity(path) for path in sizes}
    return [known[path] for path in images]


def _size(path: Path) -> int:
    """In bytes; -1 for what is not there, which whoever opens it says."""
    return path.stat().st_size if path.is_file() else -1


class ImageFolder:
    """Where a data set's images lie: in its folder, or in the subfolders that its authors use."""

    def __init__(self, root: Path, subfolders: Sequence[str] = ()) -> None:
        self._real = os.path.realpath(root)
        self._places = [root, *(root / name for name in subfolders if (root / name).is_dir())]
        self._found: dict[str, Path | None] = {}

    def find(self, name: str) -> Path | None:
        """The image called ``name``, a path relative to the folder or one of its subfolders; ``None``: there is none.

        Raises:
            OutsideError: The name, or a link of that name, leads out of the folder.
        """
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> Path | None:
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
            raise OutsideError(f"'{name}' leaves {self._places[0]}")
        for path in (place / name for place in self._places):
            if os.path.isfile(path):  # false, where Path's own raises: names that are too long, folders that can't be entered
                return self.inside(path)
        return None

    def inside(self, path: Path) -> Path:
        """``path`` itself, if it stays in the folder once links are followed.

        Raises:
            OutsideError: It does not.
        """
        real = os.path.realpath(path)
        if os.path.commonpath([real, self._real]) != self._real:
            raise OutsideError(f"'{path.name}' is a link to {real}, outside {self._places[0]}")
        return path

    def __str__(self) -> str:
        return ", ".join(str(place) for place in self._places)
