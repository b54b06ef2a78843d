"""Training state on disk: one safetensors file per stage, tensors with a JSON header, written aside and renamed into place."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infoprune.errors import CheckpointError
from infoprune.training.sharding import as_part

ASIDE = ".partial"
LOCK = "work.lock"


@dataclass(frozen=True)
class WorkFolder:
    """Where interrupted work leaves what it has.

    Attributes:
        path: The folder, created by :meth:`claim`.
    """

    path: Path

    def claim(self, fingerprint: dict[str, Any], may_change: Collection[str] = (), stage: str = "") -> list[str]:
        """Take the folder for one piece of work.

        Args:
            fingerprint: Settings of the work.
            may_change: Those that nothing but ``stage``, the last one, reads any more: where they differ, it starts again.
            stage: Its name.

        Returns:
            The settings of ``stage`` that differ.

        Raises:
            CheckpointError: It holds work with other settings (says which) or things that are nobody's work, it can't be written, or
                another run is in it.
        """
        text = json.dumps(fingerprint, indent=2, sort_keys=True, default=str)
        file = self.path / "work.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = file.read_text(encoding="utf-8") if file.is_file() else None
            if held is None and any(entry.name not in (file.with_suffix(ASIDE).name, LOCK) for entry in self.path.iterdir()):
                raise CheckpointError(
                    f"{self.path} holds files, but not the work.json that says what they are of. Move them away, or delete the folder."
                )
            _write_aside(file, text if held is None else held)  # that it can be written shall not show after hours
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise CheckpointError(f"Unfinished work can't be kept in {self.path}: {reason}. It must be a folder to write to.") from error
        differs = [] if held is None else self._differing(file, held, json.loads(text))
        if mine := [name for name in differs if name not in may_change]:
            raise CheckpointError(
                f"{self.path} holds interrupted work with other settings ({', '.join(mine)}). "
                "Run with those settings to finish it, or delete the folder to start again."
            )
        if differs:
            with self.held():
                self.file(stage).unlink(missing_ok=True)
                _write_aside(file, text)
        return differs

    def _differing(self, file: Path, held: str, now: dict[str, Any]) -> list[str]:
        try:
            known = json.loads(held)
        except ValueError as error:
            raise CheckpointError(f"{file} is not readable ({error}). Delete the folder {self.path} to start again.") from error
        return sorted(key for key in {*known, *now} if known.get(key) != now.get(key))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the claimed folder for the time of the block; the lock goes with the process, however that ends.

        Raises:
            CheckpointError: Another run is in it.
        """
        try:
            with FileLock(self.path / LOCK, timeout=0):
                yield
        except Timeout as error:
            raise CheckpointError(
                f"Another run is at work in {self.path}. Wait for it, stop it, or give this one another output folder."
            ) from error

    def discard(self) -> None:
        """Remove the folder: out of the way first, so that a removal that is interrupted leaves nothing to go on from."""
        aside = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        except OSError:  # its own folder can't be written to
            aside = self.path
        shutil.rmtree(aside, ignore_errors=True)

    def file(self, stage: str) -> Path:
        """State of one stage."""
        return self.path / f"{stage}.safetensors"


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_suffix(ASIDE)
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)


def save_state(path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and JSON-able ``meta``.

    Raises:
        CheckpointError: The file could not be written, e.g. because the disk is full; an earlier state stays in place.
    """
    aside = path.with_suffix(ASIDE)
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(held, aside, {"meta": json.dumps(meta), "checksum": _checksum(held)})
        aside.rename(path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(
            f"The training state could not be written to {path}: {error}. Is the disk full, or the folder "
            "no longer writable? What was saved before is still there."
        ) from error


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and meta of :func:`save_state`; ``None`` where there is no file.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            meta, checksum = json.loads(header["meta"]), header["checksum"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open has no items
        if _checksum(tensors) != checksum:
            raise ValueError("its checksum is another")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"The training state {path} is damaged ({error}). Delete it to train this stage again.") from error
    return tensors, meta


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of names and bytes: safetensors notices a file that is cut short, but not a bit that is another."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Adam's moments by name."""
    found = {}
    for name, parameter in parameters.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in optimizer.state.get(parameter, {}):
                found[f"{key}.{name}"] = optimizer.state[parameter][key]
    return found


def optimizer_updates(optimizer: torch.optim.Optimizer) -> int:
    """Updates that Adam's moments are of: fewer than the stage's where it started again."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def restore_optimizer_(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor], updates: int
) -> None:
    """Put Adam back to where :func:`optimizer_tensors` took it from, after ``updates``."""
    for name, parameter in parameters.items():
        if f"exp_avg.{name}" in tensors:
            moments = {key: as_part(tensors[f"{key}.{name}"], parameter).clone() for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(updates)), **moments}
