"""Benchmarks by hub id, or from a local folder of parquet files, through ``datasets``; images are kept in the user's cache, by id."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from infoprune.data.benchmark import Benchmark
from infoprune.data.example import Example
from infoprune.data.images import formats, home_expanded
from infoprune.data.problems import Problems
from infoprune.errors import DataError, InfoPruneError

FORMATS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif", "AVIF": ".avif"}


def read(benchmark: Benchmark, source: str, split: str, problems: Problems, notify: Callable[[str], None]) -> Iterator[Example]:
    """Examples of a split, streamed.

    Args:
        benchmark: Which rows to expect.
        source: A hub id, or a local folder that ``datasets`` can load.
        split: The benchmark's own name of the split.
        problems: What is wrong with rows goes here.
        notify: Called with one line for people before a download.

    Raises:
        DataError: ``datasets`` is missing, nothing is there, or it has no such split.
    """
    store = ImageStore(_store_folder(source))
    notify(f"reading {benchmark.name} ({split}) from {source}; images go to {store.folder}")
    there = benchmark.hub_splits.get(split, split)
    questions, images = benchmark.hub_configs(split)
    if images is None:
        for row in _rows(source, questions, there):
            example = benchmark.parsed(row, split, problems)
            if example is not None:
                yield from _placed(example, _content(row), store, problems)
        return
    examples = [e for e in (benchmark.parsed(row, split, problems) for row in _rows(source, questions, there)) if e is not None]
    wanted = {_image_id(example) for example in examples}
    wanted -= {id for id in wanted if store.find(id) is not None}
    for row in _rows(source, images, there) if wanted else ():
        if row.get("id") in wanted:
            wanted.discard(row["id"])
            _kept(row["id"], _content(row), store, problems)
            if not wanted:
                break
    for example in examples:
        yield from _placed(example, None, store, problems)


def _placed(example: Example, content: bytes | None, store: ImageStore, problems: Problems) -> Iterator[Example]:
    name = _image_id(example)
    path = store.find(name, content) or _kept(name, content, store, problems)
    if path is not None:
        yield replace(example, image=path)


def _image_id(example: Example) -> str:
    return str(example.image).removesuffix(example.image.suffix)


def _kept(name: str, content: bytes | None, store: ImageStore, problems: Problems) -> Path | None:
    if content is None:
        problems.add("image missing", name)
        return None
    try:
        return store.keep(name, content)
    except DataError as error:
        problems.add("unreadable image", str(error))
        return None


class ImageStore:
    """A folder of images by id, each written once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known = {path.stem: path for path in folder.glob("*") if path.suffix in FORMATS.values()}

    def find(self, name: str, content: bytes | None = None) -> Path | None:
        """Where the image of that id was kept; ``None`` as well where it was another than ``content``."""
        path = self._known.get(name)
        return path if path is None or content is None or path.read_bytes() == content else None

    def keep(self, name: str, content: bytes) -> Path:
        """Write an image as it came, aside and then in place.

        Raises:
            DataError: The id is no file name, or the bytes are no image of a common format.
            InfoPruneError: The folder can't be written to.
        """
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise DataError(f"'{name}' is no image id")
        try:
            with Image.open(io.BytesIO(content), formats=formats()) as image:
                suffix = FORMATS[image.format or ""]
        except Exception as error:  # whatever Pillow's decoders think of what a stranger made
            raise DataError(f"{name} is not an image of a known format") from error
        target = self.folder / f"{name}{suffix}"
        aside = self.folder / f".{target.name}-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                aside.write_bytes(content)
                aside.replace(target)
            finally:
                aside.unlink(missing_ok=True)
        except OSError as error:
            raise InfoPruneError(
                f"Cannot keep images in {self.folder}: {error.strerror or error}. INFOPRUNE_CACHE names another."
            ) from error
        self._known[name] = target
        return target


def _store_folder(source: str) -> Path:
    from infoprune.demo.sources import cache_directory

    local = home_expanded(source)
    name = source.replace("/", "--")
    if os.path.isdir(local):  # the same id may mean another image elsewhere, or once the files here are others
        files = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in local.resolve().rglob("*.parquet"))
        name = f"{local.name}-{hashlib.sha256(repr((str(local.resolve()), files)).encode()).hexdigest()[:12]}"
    return cache_directory() / "images" / name


def _rows(source: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    """Rows of one split; images stay encoded."""
    datasets, local = _datasets(), home_expanded(source)
    files: dict[str, list[str]] = _parquet_files(local, config) if os.path.isdir(local) else {}
    with _told(source):
        there = list(files) or datasets.get_dataset_split_names(source, config)
    if split not in there:
        raise DataError(f"{source} has no split '{split}'; it has {', '.join(map(str, there))}.")
    with _told(source):
        arguments = {"path": "parquet", "data_files": files} if files else {"path": source, "name": config}
        stream = datasets.load_dataset(**arguments, split=split, streaming=True)
        if "image" in (stream.features or {}):
            stream = stream.cast_column("image", datasets.Image(decode=False))
        yield from stream


def _parquet_files(folder: Path, config: str | None) -> dict[str, list[str]]:
    """Files by split, as the hub names them: ``[CONFIG/][data/]SPLIT-00000-of-00001.parquet``."""
    place = folder if config is None else folder / config
    found: dict[str, list[str]] = {}
    for path in sorted((*place.glob("*.parquet"), *place.glob("data/*.parquet"))):
        found.setdefault(re.sub(r"-\d+-of-\d+.*", "", path.stem), []).append(str(path))
    if not found:
        raise DataError(f"{place} has no parquet files named as the hub names them, SPLIT-00000-of-00001.parquet.")
    return found


def _content(row: dict[str, Any]) -> bytes | None:
    image = row.get("image")
    return image.get("bytes") if isinstance(image, dict) else None


@contextmanager
def _told(source: str) -> Iterator[None]:
    try:
        yield
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # ``datasets`` has no family of exceptions of its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"Cannot read '{source}' with datasets: {reason}. It must be a folder here, or an id that the hub has.") from error


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise DataError("Reading from the hub or from parquet files needs 'datasets': pip install datasets") from error
