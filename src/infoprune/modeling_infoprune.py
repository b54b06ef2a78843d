"""Compressed vision-language models for Transformers.

This one file is what the library runs and what is copied into every checkpoint, so a checkpoint loads either with
``import infoprune`` or, without infoprune installed, with ``trust_remote_code=True``. It needs nothing but PyTorch and Transformers.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig

PREFIX = "InfoPrune"
PER_LAYER = "Reading global config value for per-layer attribute"


def _not_per_layer(record: logging.LogRecord) -> bool:
    """Whether a message is not Transformers' warning that stock code reads one value where layers differ.

    Here that is as it should be: stock modules are made alike, and then take on the plan's shapes.
    """
    return not str(record.msg).startswith(PER_LAYER)


logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(_not_per_layer)


class LowRankLinear(nn.Module):
    """A linear of rank ``rank``: ``up(down(x))``, bias on ``up``.

    Shapes: (..., in_features) -> (..., out_features).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.up(self.down(x))

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense linear with the same output."""
        weight = self.up.weight @ self.down.weight
        dense = nn.Linear(self.in_features, self.out_features, bias=self.up.bias is not None, device=weight.device, dtype=weight.dtype)
        dense.weight.copy_(weight)
        if self.up.bias is not None:
            dense.bias.copy_(self.up.bias)
        return dense


class LowRankGatedFFN(nn.Module):
    """A gated FFN whose gate and up projections share one rank-r map of the input: ``down(act(g) * u)``, (g, u) = gate_up(shared(x))."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, rank: int, act_fn: nn.Module, down_proj: nn.Module, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.hidden_size, self.intermediate_size, self.rank = hidden_size, intermediate_size, rank
        self.shared_proj = nn.Linear(hidden_size, rank, bias=False)
        self.gate_up_proj = nn.Linear(rank, 2 * intermediate_size, bias=bias)
        self.act_fn = act_fn
        self.down_proj = down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., hidden_size)."""
        gate, up = self.gate_up_proj(self.shared_proj(x)).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class Constant(nn.Module):
    """What is left of a block that was dropped whole: its mean output, the same at every position; without bias, nothing."""

    def __init__(self, hidden_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None

    def constant(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., hidden_size)."""
        return torch.zeros_like(hidden_states) if self.bias is None else self.bias.expand_as(hidden_states).clone()

    def forward(self, hidden_states: torch.Tensor) -> Any:
        """(..., hidden_size) -> (..., hidden_size)."""
        return self.constant(hidden_states)


class ConstantAttention(Constant):
    """A :class:`Constant` in the place of an attention block.

    ``alone``: the block returned nothing beside its output.
    """

    def __init__(self, hidden_size: int, *, alone: bool = False, bias: bool = True) -> None:
        super().__init__(hidden_size, bias=bias)
        self.alone = alone

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, None]:
        """(..., hidden_size) -> (..., hidden_size), and no attention weights."""
        constant = self.constant(hidden_states)
        return constant if self.alone else (constant, None)


class NarrowAttention(nn.Module):
    """Self-attention with one fused projection, for heads that no longer fill the width of the residual stream.

    Stands in for blocks (BLIP's) that derive the width of a head from the stream's. Scaled-dot-product attention without a mask.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = attention.num_heads, attention.head_dim, attention.scale
        self.dropout = attention.config.attention_dropout
        self.qkv, self.projection = attention.qkv, attention.projection

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """(rows, tokens, hidden_size) -> (rows, tokens, hidden_size), and no attention weights."""
        heads = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        context = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        return self.projection(context.transpose(1, 2).flatten(2)), None


# Names of the projections, tried in turn.
_OUT_PROJECTIONS = ("o_proj", "out_proj", "proj", "projection_layer", "projection")
_UP_PROJECTIONS, _DOWN_PROJECTIONS = ("up_proj", "fc1", "linear_fc1"), ("down_proj", "fc2", "linear_fc2")
_GATE_PROJECTION = "gate_proj"
_FUSED = "qkv"
ALONE = "proj"  # the output projection of blocks that return their output alone, the others a pair
_WIDE = "projection"  # that of blocks whose heads must fill the stream
_NORMS_BEFORE = (
    "input_layernorm", "layer_norm1", "norm1", "attention_norm", "layernorm_before", "rms_norm1", "self_attn_layer_norm",
)  # fmt: skip


def _name(module: nn.Module, names: tuple[str, ...]) -> str:
    return next(name for name in names if hasattr(module, name))


def _like(linear: nn.Linear, in_features: int, out_features: int, bias: bool) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=bias, device=linear.weight.device, dtype=linear.weight.dtype)


def norm_before(layer: nn.Module) -> str | None:
    """Name of the norm that a layer's attention block alone reads through; ``None``: the FFN shares it, or it stands behind the block."""
    norms = [name for name, _ in layer.named_children() if "norm" in name]
    own = next((name for name in _NORMS_BEFORE if name in norms), None)
    return own if len(norms) > 1 and getattr(layer, "do_layer_norm_before", True) else None


def shape_attention_(parent: nn.Module, name: str, keep: int, of: int, *, compensated: bool) -> None:
    """Give the attention block ``parent.name`` the shapes of ``keep`` out of ``of`` units, with uninitialised weights.

    A unit is a key/value head with its query heads or, with a single key/value head, a query head. Compensation puts means into the
    output projection's bias, so a compensated block has one. Without any unit only a constant is left, which needs no norm before it.
    """
    attention: Any = getattr(parent, name)
    out_name = _name(attention, _OUT_PROJECTIONS)
    out = getattr(attention, out_name)
    if keep == 0:
        constant = ConstantAttention(out.out_features, alone=out_name == ALONE, bias=out.bias is not None or compensated)
        setattr(parent, name, constant.to(device=out.weight.device, dtype=out.weight.dtype))
        if norm := norm_before(parent):
            setattr(parent, norm, nn.Identity())
        return
    width = out.in_features * keep // of
    if hasattr(attention, _FUSED):
        _shrink_(attention, _FUSED, keep, of)
    else:
        multi_query = attention.k_proj.out_features == attention.head_dim and attention.q_proj.out_features > attention.head_dim
        for projection in ("q_proj",) if multi_query else ("q_proj", "k_proj", "v_proj"):
            _shrink_(attention, projection, keep, of)
        if hasattr(attention, "num_key_value_groups"):
            attention.num_key_value_groups = width // attention.k_proj.out_features
        if hasattr(attention, "num_key_value_heads"):
            attention.num_key_value_heads = attention.k_proj.out_features // attention.head_dim
    setattr(attention, out_name, _like(out, width, out.out_features, out.bias is not None or compensated))
    for attribute in ("num_heads", "num_attention_heads"):
        if isinstance(getattr(attention, attribute, None), int):
            setattr(attention, attribute, width // attention.head_dim)
    if getattr(attention, "embed_dim", None) == out.in_features:  # some blocks reshape the heads' contexts to it
        attention.embed_dim = width
    if out_name == _WIDE:
        setattr(parent, name, NarrowAttention(attention))


def _shrink_(attention: nn.Module, name: str, keep: int, of: int) -> None:
    linear = getattr(attention, name)
    setattr(attention, name, _like(linear, linear.in_features, linear.out_features * keep // of, linear.bias is not None))


def shape_ffn_(parent: nn.Module, name: str, ranks: dict[str, Any]) -> None:
    """Give the FFN ``parent.name`` factorised linears of the stated ranks, or ``keep`` of its neurons, with uninitialised weights.

    Centring puts means into biases, so centred factors have one, and so has the down projection of fewer neurons, as is the rule;
    ``centred: False`` among the ranks leaves biases as they were.
    """
    centred = ranks.get("centred", True)
    ffn: Any = getattr(parent, name)
    up_name, down_name = _name(ffn, _UP_PROJECTIONS), _name(ffn, _DOWN_PROJECTIONS)
    if "keep" in ranks:
        gate = [_GATE_PROJECTION] if hasattr(ffn, _GATE_PROJECTION) else []
        _narrow_(ffn, [up_name, *gate], down_name, ranks["keep"], centred=centred)
        return
    reference = getattr(ffn, up_name).weight
    factory = {"device": reference.device, "dtype": reference.dtype}
    targets = {"down_rank": down_name, "up_rank": up_name, "gate_rank": _GATE_PROJECTION}
    for key, target in targets.items():
        if key in ranks:
            dense = getattr(ffn, target)
            bias = centred or dense.bias is not None
            setattr(ffn, target, LowRankLinear(dense.in_features, dense.out_features, ranks[key], bias=bias).to(**factory))
    if "joint_rank" in ranks:
        up = getattr(ffn, up_name)
        down = getattr(ffn, down_name)
        bias = centred or up.bias is not None
        joint = LowRankGatedFFN(up.in_features, up.out_features, ranks["joint_rank"], ffn.act_fn, nn.Identity(), bias=bias).to(**factory)
        joint.down_proj = down
        setattr(parent, name, joint)


def _narrow_(ffn: Any, inputs: list[str], down_name: str, keep: int, *, centred: bool) -> None:
    """Linears of ``keep`` neurons; with none, what reads the input passes it on and the down projection is a constant.

    The block itself stays, since some layers have no other FFN than two linears of their own.
    """
    down = getattr(ffn, down_name)
    bias = centred or down.bias is not None
    for name in inputs:
        linear = getattr(ffn, name)
        setattr(ffn, name, _like(linear, linear.in_features, keep, linear.bias is not None) if keep else nn.Identity())
    constant = Constant(down.out_features, bias=bias).to(device=down.weight.device, dtype=down.weight.dtype)
    setattr(ffn, down_name, _like(down, keep, down.out_features, bias) if keep else constant)
    if hasattr(ffn, "intermediate_size"):
        ffn.intermediate_size = keep


def shape_(model: nn.Module, shapes: dict[str, Any], prefix: str = "") -> None:
    """Give ``model`` the shapes of a plan; paths are relative to the conditional-generation model, ``prefix`` is stripped from them."""
    for path, head in shapes.get("heads", {}).items():
        parent, _, name = path.removeprefix(prefix).rpartition(".")
        shape_attention_(model.get_submodule(parent), name, head["keep"], head["of"], compensated=head["compensated"])
    for path, ranks in shapes.get("ffn", {}).items():
        parent, _, name = path.removeprefix(prefix).rpartition(".")
        shape_ffn_(model.get_submodule(parent), name, ranks)


def __getattr__(name: str) -> Any:
    """``InfoPruneX``, the compressed counterpart of Transformers' configuration or model ``X``; defined when it is first asked for."""
    dense = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if dense is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: Transformers {transformers.__version__} has no such class")
    defined = _configuration(dense) if issubclass(dense, PreTrainedConfig) else _model(dense)
    globals()[name] = defined
    return defined


def _configuration(dense: Any) -> Any:
    """A configuration with the shapes of a compression plan in ``infoprune``, under a model type of its own."""
    body = {"model_type": f"{PREFIX.lower()}_{dense.model_type}", "infoprune": None, "__annotations__": {"infoprune": dict | None}}
    return type(f"{PREFIX}{dense.__name__}", (dense,), body | {"__module__": __name__, "__doc__": f"Compressed {dense.__name__}."})


@contextmanager
def _uniform(config: Any) -> Iterator[None]:
    """Hide what the configuration says of single layers: stock modules are made alike, and take on the plan's shapes afterwards."""
    text = config.get_text_config(decoder=True)
    layers = text.to_dict().get("per_layer_config")
    text.per_layer_config = None
    try:
        yield
    finally:
        text.per_layer_config = layers


def _model(dense: Any) -> Any:
    """A model, with or without its language head, that takes on the shapes in its configuration."""
    prefix = "" if GenerationMixin in dense.__mro__ else "model."

    def __init__(self: Any, config: Any) -> None:
        with _uniform(config):
            dense.__init__(self, config)
        shape_(self, config.infoprune or {}, prefix)
        self.post_init()

    body = {"config_class": getattr(sys.modules[__name__], f"{PREFIX}{dense.config_class.__name__}"), "__init__": __init__}
    return type(f"{PREFIX}{dense.__name__}", (dense,), body | {"__module__": __name__, "__doc__": f"Compressed {dense.__name__}."})
