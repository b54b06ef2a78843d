"""YAML recipes: the compress verb's options in a file, checked key by key."""

from __future__ import annotations

import math
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from infoprune.errors import InfoPruneError
from infoprune.options import CompressionOptions
from infoprune.training.options import TrainingOptions

OTHER_KEYS = {"model", "data", "output", "method", "prompt_suffix", "device", "weights"}
WORDS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}


class _OneOfEach(yaml.SafeLoader):
    """Refuses keys that stand twice in a mapping, of which YAML's own loader takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """See PyYAML."""
        self.flatten_mapping(node)  # what merge keys (<<) stand for
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict[str, Any]:
    """Options from a YAML file, each of the type that its field has; lists become tuples.

    A number may be written in any way that ``float`` reads: YAML itself takes ``1e-3`` for a string. ``null`` is an option left open.

    Raises:
        InfoPruneError: Unreadable, not a mapping, a key that is no option (lists the known ones), or a value of another type.
    """
    known = dict.fromkeys(OTHER_KEYS, str) | get_type_hints(CompressionOptions) | get_type_hints(TrainingOptions)
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _OneOfEach)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or 2026-13-45 for a date
        raise InfoPruneError(f"Cannot read the recipe {path}: {error}") from error
    if not isinstance(loaded, dict):
        raise InfoPruneError(f"The recipe {path} must be a mapping of options to values.")
    unknown = sorted(set(map(str, loaded)) - set(known))
    if unknown:
        raise InfoPruneError(f"The recipe {path} has unknown keys: {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
    settings = {}
    for key, value in loaded.items():
        try:
            settings[key] = _as(known[key], value)
        except TypeError as error:
            raise InfoPruneError(f"The recipe {path} gives {key}={value!r}, which is not {_in_words(known[key])}.") from error
    return settings


def _as(kind: Any, value: Any) -> Any:
    """``value`` from YAML as ``kind``, the type hint of an option.

    Raises:
        TypeError: It is none.
    """
    choices = get_args(kind)
    if _is_union(kind):
        for choice in choices:
            try:
                return _as(choice, value)
            except TypeError:
                continue
    elif get_origin(kind) is Literal:
        if value in choices:
            return value
    elif get_origin(kind) is tuple:
        if isinstance(value, list):
            return tuple(_as(choices[0], item) for item in value)
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = _number(value)
        if math.isfinite(number):
            return number
    elif kind in (NoneType, str, bool, int) and type(value) is kind:  # True is an int to isinstance
        return value
    raise TypeError(kind)  # also where a recipe can't hold the type, such as questions in place of the name of their source


def _number(value: float | str) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _in_words(kind: Any) -> str:
    if _is_union(kind):
        return " or ".join(words for words in map(_in_words, get_args(kind)) if words)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"a list, each entry {_in_words(get_args(kind)[0])}"
    return WORDS.get(kind, "")


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)
