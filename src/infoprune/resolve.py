"""Find a model's sites: declared paths, and numbers read off the actual modules.

A declaration that does not fit fails here and nowhere later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from torch import nn

from infoprune.architecture import Architecture, AttentionSite, FamilyDeclaration, FFNSite, TowerDeclaration, TowerName
from infoprune.errors import UnsupportedModelError
from infoprune.families import FAMILIES, REFUSED, REFUSED_TOWERS

COMPRESSED = "infoprune_"  # what compressed models put before their family's model type


def family_of(model: Any) -> FamilyDeclaration:
    """The family of a dense or compressed model, or of a configuration.

    Raises:
        UnsupportedModelError: It has no declaration.
    """
    model_type = str(getattr(getattr(model, "config", model), "model_type", type(model).__name__))
    family = FAMILIES.get(model_type.removeprefix(COMPRESSED))
    if family is None:
        reason = f": {REFUSED[model_type]}" if model_type in REFUSED else ""
        raise UnsupportedModelError(f"The model family '{model_type}' is not supported{reason}. Supported: {supported()}.")
    return family


def resolve(model: nn.Module) -> Architecture:
    """Find the sites of a vision-language model.

    Raises:
        UnsupportedModelError: The family or one of its towers has no declaration, the model was already compressed, or its
            modules are not what the declaration says.
    """
    family, config = family_of(model), cast(Any, model.config)
    if str(config.model_type).startswith(COMPRESSED):
        raise UnsupportedModelError("This model is already compressed. Compress the original model instead, with the smaller budget.")
    attention: list[AttentionSite] = []
    ffn: list[FFNSite] = []
    for tower, path, tower_config, declaration in towers_of(config):
        for number, (prefix, names) in enumerate(_layers(model, path, declaration)):
            if not getattr(model.get_submodule(prefix), "do_layer_norm_before", True):  # OPT may normalise behind its blocks
                names = replace(names, rescaled=True)
            attention.append(_attention_site(model, f"{prefix}.{names.attention}", tower, number, names, tower_config))
            ffn.append(_ffn_site(model, f"{prefix}.{names.ffn}".rstrip("."), tower, number, names))
    return Architecture(family, tuple(attention), tuple(ffn), config.image_token_id)


def towers_of(config: Any) -> list[tuple[TowerName, str, Any, TowerDeclaration]]:
    """Name, path, configuration and declaration of the two towers of a model, which need not be loaded.

    Raises:
        UnsupportedModelError: The family or one of its towers has no declaration.
    """
    family, found = family_of(config), []
    towers: tuple[tuple[TowerName, str, Any, dict[str, TowerDeclaration]], ...] = (
        ("vision", family.vision, config.vision_config, family.vision_towers),
        ("text", family.text, config.text_config, family.text_towers),
    )
    for tower, path, tower_config, kinds in towers:
        kind = tower_config.model_type
        if kind not in kinds:
            reason = f": {REFUSED_TOWERS[kind]}" if kind in REFUSED_TOWERS else ""
            raise UnsupportedModelError(
                f"The {tower} tower '{kind}' of this {family.model_type} model is not supported{reason}. Supported: {', '.join(kinds)}."
            )
        found.append((tower, path, tower_config, kinds[kind]))
    return found


def supported() -> str:
    """One line that names every supported family."""
    return f"{', '.join(FAMILIES)}; 'infoprune families' lists the towers that each may hold"


def _layers(model: nn.Module, tower: str, declaration: TowerDeclaration) -> Iterator[tuple[str, TowerDeclaration]]:
    """Path and kind of every layer of a tower, in the order of the forward pass."""
    kinds = (declaration, *declaration.others)
    for stack in dict.fromkeys(kind.layers for kind in kinds):
        layers: Any = _module(model, f"{tower}.{stack}")
        here = [kind for kind in kinds if kind.layers == stack]
        for index, layer in enumerate(layers):
            yield f"{tower}.{stack}.{index}", next((kind for kind in here if hasattr(layer, kind.attention)), here[0])


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
    out = _linear(model, f"{path}.{names.out}")
    projections = [_linear(model, f"{path}.{name}") for name in names.projections]
    parts = 3 // len(projections)  # of a fused linear
    query, key, value = (linear.out_features // parts for linear in projections * parts)
    head_dim = getattr(_module(model, path), "head_dim", None) or getattr(config, "head_dim", None) or query // config.num_attention_heads
    heads, key_value_heads = query // head_dim, key // head_dim
    if out.in_features != query or value != key or heads % key_value_heads:
        raise UnsupportedModelError(f"The projections of '{path}' do not have the shapes of grouped-query attention.")
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * (layer + 1)
    stays = names.stays or (tower == "text" and kinds[layer] not in kinds[:layer])
    site = AttentionSite(path, tower, layer, names, heads, key_value_heads, head_dim, projections[0].in_features, int(stays))
    return replace(site, min_units=site.num_units) if _normalised_together(_module(model, path), head_dim) else site


def _normalised_together(attention: Any, head_dim: int) -> bool:
    """Whether queries or keys of all heads share a norm, so that none can be removed without changing the others."""
    weights = (getattr(getattr(attention, norm, None), "weight", None) for norm in ("q_norm", "k_norm"))
    return any(weight is not None and weight.numel() != head_dim for weight in weights)


def _ffn_site(model: nn.Module, path: str, tower: TowerName, layer: int, names: TowerDeclaration) -> FFNSite:
    up, down = _linear(model, f"{path}.{names.up}"), _linear(model, f"{path}.{names.down}")
    gate = _linear(model, f"{path}.{names.gate}") if names.gate else up
    if gate.weight.shape != up.weight.shape or down.in_features != up.out_features or down.out_features != up.in_features:
        raise UnsupportedModelError(f"The linears of '{path}' do not have the shapes of a feed-forward block.")
    return FFNSite(path, tower, layer, names, up.in_features, up.out_features)
