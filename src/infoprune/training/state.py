"""Training state on disk: one safetensors file per stage, tensors with a JSON header, written aside and renamed into place."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infoprune.errors import CheckpointError
from infoprune.training.sharding import as_part


@dataclass(frozen=True)
class WorkFolder:
    """Where interrupted work leaves what it has.

    Attributes:
        path: The folder, created by :meth:`claim`.
    """

    path: Path

    def claim(self, fingerprint: dict[str, Any]) -> None:
        """Take the folder for one piece of work.

        Raises:
            CheckpointError: It holds work with other settings; says which.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "work.json"
        text = json.dumps(fingerprint, indent=2, sort_keys=True, default=str)
        if not file.is_file():
            _write_aside(file, text)
            return
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} is not readable ({error}). Delete the folder {self.path} to start again.") from error
        now = json.loads(text)
        differs = sorted(key for key in {*held, *now} if held.get(key) != now.get(key))
        if differs:
            raise CheckpointError(
                f"{self.path} holds interrupted work with other settings ({', '.join(differs)}). "
                "Run with those settings to finish it, or delete the folder to start again."
            )

    def file(self, stage: str) -> Path:
        """State of one stage."""
        return self.path / f"{stage}.safetensors"


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)


def save_state(path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and JSON-able ``meta``.

    Raises:
        CheckpointError: The file could not be written, e.g. because the disk is full; an earlier state stays in place.
    """
    aside = path.with_suffix(".partial")
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, aside, {"meta": json.dumps(meta)})
        aside.rename(path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"The training state could not be written to {path}: {error}. Is the disk full?") from error


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and meta of :func:`save_state`; ``None`` where there is no file.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["meta"])
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118 - safe_open has no items
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"The training state {path} is damaged ({error}). Delete it to train this stage again.") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Adam's moments by name."""
    found = {}
    for name, parameter in parameters.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in optimizer.state.get(parameter, {}):
                found[f"{key}.{name}"] = optimizer.state[parameter][key]
    return found


def restore_optimizer_(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor], step: int
) -> None:
    """Put Adam back to where :func:`optimizer_tensors` took it from, after ``step`` updates."""
    for name, parameter in parameters.items():
        if f"exp_avg.{name}" in tensors:
            moments = {key: as_part(tensors[f"{key}.{name}"], parameter).clone() for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
