"""What can be cut in a model: declarations of families and towers, and the attention and FFN sites that they resolve to.

Data only. Families declare module paths (``infoprune.families``); ``infoprune.resolve`` reads everything with a number in it off the
actual modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

TowerName = Literal["vision", "text"]


@dataclass(frozen=True)
class TowerDeclaration:
    """Where one kind of tower keeps its parts; module names relative to the tower or the layer.

    Attributes:
        layers: Path of the layer list, relative to the tower.
        attention, ffn: Names of the two blocks inside a layer; no name for an FFN whose linears are in the layer itself.
        out: Name of the output projection inside the attention block; its input is the concatenation of the heads' contexts.
        query, key, value: Names of the input projections.
        qkv: Name of the one linear that holds all three, stacked in this order; ``None`` where they are apart.
        gate: Name of the gate projection inside the FFN, ``None`` for an FFN without gate.
        up, down: Names of the FFN's other two linears.
        rescaled: Whether the layer scales or normalises its blocks' outputs before it adds them to the residual stream.
        stays: Whether an attention block may be thinned but not dropped whole.
        others: Layers of other kinds in the same list, and further lists of layers behind it, in the order of the forward pass.
    """

    layers: str
    attention: str
    ffn: str
    out: str
    up: str
    down: str
    gate: str | None = None
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    qkv: str | None = None
    rescaled: bool = False
    stays: bool = False
    others: tuple[TowerDeclaration, ...] = ()

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the linears that make queries, keys and values."""
        return (self.qkv,) if self.qkv else (self.query, self.key, self.value)


@dataclass(frozen=True)
class FamilyDeclaration:
    """One model family: where its towers are and which kinds of tower it may hold.

    Attributes:
        model_type: ``config.model_type`` of the family.
        vision, text: Paths of the towers inside the conditional-generation model.
        projector: Paths of the modules between them; they may lie inside the vision tower.
        vision_towers, text_towers: Supported tower declarations by the sub-config's ``model_type``.
        shares_prefix: Whether questions on one image can share its tokens in one row: not where image tokens see the question.
        positions: Method of the base model that makes positions of more than one dimension; ``None``: they are counted one by one.
        token_types: Name of a further input with one entry per token, such as its type; ``None``: there is none.
        answer_type: Its value on answer tokens; ``None``: that of the last prompt token.
        head: Path of the language head. Inside the text tower, that one is a whole language model and decodes by itself.
        prompt: How a question is put where the processor has no chat template; without ``{image}`` if the processor marks the image itself.
        question_inputs: Names of inputs that are made of the question alone, (rows, length of their own), padded with zeros.
    """

    model_type: str
    vision: str
    text: str
    projector: tuple[str, ...]
    vision_towers: dict[str, TowerDeclaration]
    text_towers: dict[str, TowerDeclaration]
    shares_prefix: bool = True
    positions: str | None = None
    token_types: str | None = None
    answer_type: int | None = 0
    head: str = "lm_head"
    prompt: str = "{image}{question}"
    question_inputs: tuple[str, ...] = ()

    @property
    def decoder(self) -> str:
        """Path of the module that continues from a cache; empty for the whole model."""
        return self.head.rpartition(".")[0]

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Module paths of the parts that cost and time are broken down by."""
        return {"vision": (self.vision,), "projector": self.projector, "prefill": (self.text,), "lm_head": (self.head,)}

    def own(self, part: str, cost: Callable[[str], Any]) -> Any:
        """Cost of a part without the other parts that lie inside of it, from the ``cost`` of a module path."""
        paths = self.parts[part]
        others = (other for name, modules in self.parts.items() if name != part for other in modules)
        inside = [other for other in others if other.startswith(tuple(f"{path}." for path in paths))]
        costs = [*map(cost, paths), *(-cost(other) for other in inside)]
        return sum(costs[1:], costs[0])


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
        min_units: Units that must be kept. Mostly none: a block can be dropped whole. One where the declaration says so, and in the
            first language block of its kind, off which the key/value cache reads the length of the context. All where a norm runs over
            them.
    """

    path: str
    tower: TowerName
    layer: int
    names: TowerDeclaration
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    min_units: int = 0

    @property
    def stack(self) -> str:
        """Path of the list of layers that it is in."""
        return self.path.rsplit(".", 2)[0]

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
    """

    family: FamilyDeclaration
    attention: tuple[AttentionSite, ...]
    ffn: tuple[FFNSite, ...]
    image_token_id: int

    @property
    def layers(self) -> list[str]:
        """Paths of the layers of both towers."""
        inside = (*self.attention, *(site for site in self.ffn if site.names.ffn))
        alone = (site.path for site in self.ffn if not site.names.ffn)  # whose linears are in the layer itself
        return list(dict.fromkeys([*(site.path.rpartition(".")[0] for site in inside), *alone]))

    def site(self, path: str) -> AttentionSite | FFNSite:
        """The site at a module path.

        Raises:
            KeyError: There is none.
        """
        return {site.path: site for site in (*self.attention, *self.ffn)}[path]
