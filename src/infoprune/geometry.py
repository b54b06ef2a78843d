"""Heads and FFN widths of every language layer in a configuration's own words, for tools that read them without building the model.

Transformers keeps what differs between layers in ``per_layer_config``; its static caches read it, and so does vLLM's Transformers
backend. Our own classes shape modules by the plan alone.
"""

from __future__ import annotations

from typing import Any

from infoprune.plan import CompressionPlan


def layer_geometry(
    plan: CompressionPlan, tower: str, heads: int, key_value_heads: int | None, width: str = "intermediate_size"
) -> dict[int, dict[str, int]]:
    """What a plan leaves of each language layer's heads and neurons, by layer; layers that it does not name are as they were.

    A block that was dropped whole has no heads and never writes to a cache, but a cache without heads is nothing that any tool can
    allocate: it is said to have a single unit.

    Args:
        plan: The plan.
        tower: Path of the language model.
        heads, key_value_heads: Of every dense layer; ``None``: the configuration has no word for the latter, which are as many.
        width: The configuration's word for the number of an FFN's neurons; an FFN that was dropped whole has none.
    """
    multi_query = key_value_heads == 1 and heads > 1
    found: dict[int, dict[str, int]] = {}
    for path, decision in plan.heads.items():
        if not path.startswith(f"{tower}."):
            continue
        units = max(len(decision.keep_units), 1)
        layer = found.setdefault(_layer(path), {})
        layer["num_attention_heads"] = heads * units // decision.num_units
        if key_value_heads is not None:
            layer["num_key_value_heads"] = 1 if multi_query else units
    for path, decision in plan.ffn.items():
        if path.startswith(f"{tower}.") and decision.keep_neurons is not None:
            found.setdefault(_layer(path), {})[width] = len(decision.keep_neurons)
    return found


def _layer(path: str) -> int:
    """Index of the layer that a block is in, or that it is."""
    return int(next(part for part in reversed(path.split(".")) if part.isdigit()))


def state_geometry_(config: Any, plan: CompressionPlan, tower: str) -> None:
    """Write :func:`layer_geometry` into the language part of a configuration."""
    clear_geometry_(config)
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    named = hasattr(text, "num_key_value_heads")
    width = "intermediate_size" if hasattr(text, "intermediate_size") else "ffn_dim"
    layers = layer_geometry(plan, tower, heads, (text.num_key_value_heads or heads) if named else None, width)
    if layers:
        # Some families leave the width of a head to be derived from the number of heads, which no longer tells it.
        text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        text.per_layer_config = layers
        text.allow_global_per_layer_attribute_access = True


def clear_geometry_(config: Any) -> None:
    """Make the language part of a configuration that of the dense model again."""
    text = config.get_text_config(decoder=True)
    text.per_layer_config = None
    text.__dict__.pop("allow_global_per_layer_attribute_access", None)
