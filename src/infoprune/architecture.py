"""What can be cut in a model: attention and FFN sites of both towers, resolved from the model itself.

Families declare module paths (``infoprune.families``); everything with a number in it is read off the actual modules, so a
declaration that does not fit fails here and nowhere later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from infoprune.errors import UnsupportedModelError

TowerName = Literal["vision", "text"]


@dataclass(frozen=True)
class TowerDeclaration:
    """Where one kind of tower keeps its parts; module names relative to the tower or the layer.

    Attributes:
        layers: Path of the layer list, relative to the tower.
        attention, ffn: Names of the two blocks inside a layer.
        out: Name of the output projection inside the attention block; its input is the concatenation of the heads' contexts.
        query, key, value: Names of the input projections.
        gate: Name of the gate projection inside the FFN, ``None`` for an FFN without gate.
        up, down: Names of the FFN's other two linears.
        activation: Attribute of the FFN that holds the activation function.
        head_count: Attributes of the attention module to set to the number of query heads after slicing.
    """

    layers: str
    attention: str
    ffn: str
    out: str
    up: str
    down: str
    activation: str
    gate: str | None = None
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    head_count: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilyDeclaration:
    """One model family: where its towers are and which kinds of tower it may hold.

    Attributes:
        model_type: ``config.model_type`` of the family.
        vision, text: Paths of the towers inside the conditional-generation model.
        projector: Path of the module between them.
        vision_towers, text_towers: Supported tower declarations by the sub-config's ``model_type``.
    """

    model_type: str
    vision: str
    text: str
    projector: str
    vision_towers: dict[str, TowerDeclaration]
    text_towers: dict[str, TowerDeclaration]


@dataclass(frozen=True)
class AttentionSite:
    """One attention block.

    A *unit* is what is removed as a whole: a key/value head with all its query heads; with a single key/value head
    (multi-query), one query head.

    Attributes:
        path: Module path of the attention block; unique.
        tower: Which tower it is in.
        layer: Index of its layer.
        names: The tower's declaration.
        num_heads, num_key_value_heads, head_dim: As in Transformers.
        hidden_size: Width of the residual stream.
    """

    path: str
    tower: TowerName
    layer: int
    names: TowerDeclaration
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int

    @property
    def multi_query(self) -> bool:
        """One key/value head shared by several query heads."""
        return self.num_key_value_heads == 1 and self.num_heads > 1

    @property
    def num_units(self) -> int:
        """How many units the block has."""
        return self.num_heads if self.multi_query else self.num_key_value_heads

    @property
    def unit_width(self) -> int:
        """Columns of the output projection that belong to one unit."""
        return self.num_heads * self.head_dim // self.num_units

    @property
    def parameters_per_unit(self) -> int:
        """Weights (without biases) that go with one unit."""
        query_and_out = 2 * self.unit_width * self.hidden_size
        return query_and_out if self.multi_query else query_and_out + 2 * self.head_dim * self.hidden_size


@dataclass(frozen=True)
class FFNSite:
    """One feed-forward block: ``down(act(up(x)))`` or ``down(act(gate(x)) * up(x))``."""

    path: str
    tower: TowerName
    layer: int
    names: TowerDeclaration
    hidden_size: int
    intermediate_size: int

    @property
    def gated(self) -> bool:
        """Whether the block has a gate projection."""
        return self.names.gate is not None

    @property
    def num_inputs(self) -> int:
        """Linears that read the block's input: 2 with a gate, else 1."""
        return 2 if self.gated else 1


@dataclass(frozen=True)
class Architecture:
    """All sites of a model, in the order of the forward pass.

    Attributes:
        family: The declaration it was resolved from.
        attention, ffn: The sites.
        image_token_id: Id that marks image tokens in the prompt.
        sliding_window: Longest context that plain causal attention covers exactly; ``None``: no limit.
    """

    family: FamilyDeclaration
    attention: tuple[AttentionSite, ...]
    ffn: tuple[FFNSite, ...]
    image_token_id: int
    sliding_window: int | None

    def site(self, path: str) -> AttentionSite | FFNSite:
        """The site at a module path.

        Raises:
            KeyError: There is none.
        """
        return {site.path: site for site in (*self.attention, *self.ffn)}[path]


def resolve(model: nn.Module) -> Architecture:
    """Find the sites of a vision-language model.

    Raises:
        UnsupportedModelError: The family or one of its towers has no declaration, the model was already compressed, or its
            modules are not what the declaration says.
    """
    from infoprune.families import FAMILIES

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
        layers = _module(model, f"{path}.{names.layers}")
        for index in range(len(layers)):  # type: ignore[arg-type]
            prefix = f"{path}.{names.layers}.{index}"
            attention.append(_attention_site(model, f"{prefix}.{names.attention}", tower, index, names, tower_config))
            ffn.append(_ffn_site(model, f"{prefix}.{names.ffn}", tower, index, names))
    return Architecture(family, tuple(attention), tuple(ffn), config.image_token_id, getattr(config.text_config, "sliding_window", None))


def supported() -> str:
    """One line that names every supported family with its towers."""
    from infoprune.families import FAMILIES

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
    if out.in_features != query.out_features or value.out_features != key.out_features or heads % key_value_heads:
        raise UnsupportedModelError(f"The projections of '{path}' do not have the shapes of grouped-query attention.")
    return AttentionSite(path, tower, layer, names, heads, key_value_heads, head_dim, query.in_features)


def _ffn_site(model: nn.Module, path: str, tower: TowerName, layer: int, names: TowerDeclaration) -> FFNSite:
    up, down = _linear(model, f"{path}.{names.up}"), _linear(model, f"{path}.{names.down}")
    gate = _linear(model, f"{path}.{names.gate}") if names.gate else up
    if gate.weight.shape != up.weight.shape or down.in_features != up.out_features or down.out_features != up.in_features:
        raise UnsupportedModelError(f"The linears of '{path}' do not have the shapes of a feed-forward block.")
    return FFNSite(path, tower, layer, names, up.in_features, up.out_features)
