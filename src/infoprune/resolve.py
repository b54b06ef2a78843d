"""Find a model's sites: declared paths, and numbers read off the actual modules.

A declaration that does not fit fails here and nowhere later.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from infoprune.architecture import Architecture, AttentionSite, FFNSite, TowerDeclaration, TowerName
from infoprune.errors import UnsupportedModelError
from infoprune.families import FAMILIES


def resolve(model: nn.Module) -> Architecture:
    """Find the sites of a vision-language model.

    Raises:
        UnsupportedModelError: The family or one of its towers has no declaration, the model was already compressed, or its
            modules are not what the declaration says.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    family = FAMILIES.get(model_type)
    if family is None:
        if str(model_type).startswith("infoprune_"):
            raise UnsupportedModelError("This model is already compressed. Compress the original model instead, with the smaller budget.")
        raise UnsupportedModelError(f"The model family '{model_type}' is not supported. Supported: {supported()}.")
    attention: list[AttentionSite] = []
    ffn: list[FFNSite] = []
    towers: tuple[tuple[TowerName, str, Any, dict[str, TowerDeclaration]], ...] = (
        ("vision", family.vision, config.vision_config, family.vision_towers),
        ("text", family.text, config.text_config, family.text_towers),
    )
    for tower, path, tower_config, kinds in towers:
        if tower_config.model_type not in kinds:
            raise UnsupportedModelError(
                f"The {tower} tower '{tower_config.model_type}' of this {model_type} model is not supported. Supported: {supported()}."
            )
        names = kinds[tower_config.model_type]
        layers: Any = _module(model, f"{path}.{names.layers}")
        for index in range(len(layers)):
            prefix = f"{path}.{names.layers}.{index}"
            attention.append(_attention_site(model, f"{prefix}.{names.attention}", tower, index, names, tower_config))
            ffn.append(_ffn_site(model, f"{prefix}.{names.ffn}", tower, index, names))
    return Architecture(family, tuple(attention), tuple(ffn), config.image_token_id, getattr(config.text_config, "sliding_window", None))


def supported() -> str:
    """One line that names every supported family with its towers."""
    return "; ".join(f"{name} (vision: {', '.join(f.vision_towers)}; text: {', '.join(f.text_towers)})" for name, f in FAMILIES.items())


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(f"This model has no module '{path}', which its family's declaration names ({error}).") from error


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = _module(model, path)
    if not isinstance(module, nn.Linear):
        raise UnsupportedModelError(
            f"'{path}' is a {type(module).__name__}, not a plain Linear. Quantised or wrapped models can't be compressed."
        )
    return module


def _attention_site(model: nn.Module, path: str, tower: TowerName, layer: int, names: TowerDeclaration, config: Any) -> AttentionSite:
    query, key, value, out = (_linear(model, f"{path}.{name}") for name in (names.query, names.key, names.value, names.out))
    head_dim = (
        getattr(_module(model, path), "head_dim", None)
        or getattr(config, "head_dim", None)
        or query.out_features // config.num_attention_heads
    )
    heads, key_value_heads = query.out_features // head_dim, key.out_features // head_dim
    for norm in ("q_norm", "k_norm"):
        weight = getattr(getattr(_module(model, path), norm, None), "weight", None)
        if weight is not None and weight.numel() != head_dim:
            raise UnsupportedModelError(f"'{path}.{norm}' normalises all heads together, so none of them can be removed.")
    if out.in_features != query.out_features or value.out_features != key.out_features or heads % key_value_heads:
        raise UnsupportedModelError(f"The projections of '{path}' do not have the shapes of grouped-query attention.")
    return AttentionSite(path, tower, layer, names, heads, key_value_heads, head_dim, query.in_features)


def _ffn_site(model: nn.Module, path: str, tower: TowerName, layer: int, names: TowerDeclaration) -> FFNSite:
    up, down = _linear(model, f"{path}.{names.up}"), _linear(model, f"{path}.{names.down}")
    gate = _linear(model, f"{path}.{names.gate}") if names.gate else up
    if gate.weight.shape != up.weight.shape or down.in_features != up.out_features or down.out_features != up.in_features:
        raise UnsupportedModelError(f"The linears of '{path}' do not have the shapes of a feed-forward block.")
    return FFNSite(path, tower, layer, names, up.in_features, up.out_features)
