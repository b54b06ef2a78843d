"""Heads of every language layer in a configuration's own words, for tools that size caches by them without building the model.

Transformers keeps what differs between layers in ``per_layer_config``; its static caches read it, and so does vLLM's Transformers
backend. Our own classes shape modules by the plan alone.
"""

from __future__ import annotations

from typing import Any

from infoprune.plan import CompressionPlan


def layer_geometry(plan: CompressionPlan, tower: str, heads: int, key_value_heads: int | None) -> dict[int, dict[str, int]]:
    """What a plan leaves of each language layer's attention, by layer; layers that it does not name are as they were.

    A block that was dropped whole has no heads and never writes to a cache, but a cache without heads is nothing that any tool can
    allocate: it is said to have a single unit.

    Args:
        plan: The plan.
        tower: Path of the language model.
        heads, key_value_heads: Of every dense layer; ``None``: the configuration has no word for the latter, which are as many.
    """
    multi_query, found = key_value_heads == 1 and heads > 1, {}
    for path, decision in plan.heads.items():
        if not path.startswith(f"{tower}."):
            continue
        units = max(len(decision.keep_units), 1)
        layer = int(path.rsplit(".", 2)[1])
        found[layer] = {"num_attention_heads": heads * units // decision.num_units}
        if key_value_heads is not None:
            found[layer]["num_key_value_heads"] = 1 if multi_query else units
    return found


def state_geometry_(config: Any, plan: CompressionPlan, tower: str) -> None:
    """Write :func:`layer_geometry` into the language part of a configuration."""
    clear_geometry_(config)
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    named = hasattr(text, "num_key_value_heads")
    layers = layer_geometry(plan, tower, heads, (text.num_key_value_heads or heads) if named else None)
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
