"""YAML recipes: the compress verb's options in a file, checked key by key."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from infoprune.errors import InfoPruneError
from infoprune.options import BUDGETS, CompressionOptions
from infoprune.training.options import TrainingOptions

OTHER_KEYS = {"model", "data", "output", "method", "prompt_suffix", "device"}


def read_recipe(path: Path) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        InfoPruneError: Unreadable, not a mapping, or a key that is no option; lists the known ones.
    """
    known = {field.name: field.default for kind in (CompressionOptions, TrainingOptions) for field in fields(kind)}
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InfoPruneError(f"Cannot read the recipe {path}: {error}") from error
    if not isinstance(loaded, dict):
        raise InfoPruneError(f"The recipe {path} must be a mapping of options to values.")
    unknown = sorted(set(map(str, loaded)) - set(known) - OTHER_KEYS)
    if unknown:
        raise InfoPruneError(
            f"The recipe {path} has unknown keys: {', '.join(unknown)}. Known: {', '.join(sorted({*known, *OTHER_KEYS}))}."
        )
    for key, value in loaded.items():
        expected = (str,) if key in OTHER_KEYS else _kinds(key, known[key])
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            raise InfoPruneError(
                f"The recipe {path} gives {key}={value!r}, which is not a {' or '.join(kind.__name__ for kind in expected)}."
            )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in loaded.items()}


def _kinds(key: str, default: Any) -> tuple[type, ...]:
    if key in BUDGETS:
        return (int, float)
    if key in ("certify_images", "certify_per_image", "top_k"):
        return (int,)
    if key in ("validation", "certify", "certify_metric", "ffn"):
        return (str,)
    if isinstance(default, bool):
        return (bool,)
    if default is None or isinstance(default, float):  # what else has no default is a share or a rate
        return (int, float)
    return (list,) if isinstance(default, tuple) else (type(default),)
