"""What is timed: linears and their factors on noise, and attention blocks on what really reaches them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache

from infoprune.architecture import AttentionSite, FamilyDeclaration
from infoprune.evaluation.cost import decode_step
from infoprune.layers import stream_name
from infoprune.modeling_infoprune import norm_before, shape_attention_
from infoprune.timing.stopwatch import Work

ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "intermediate_act_fn")  # as Transformers' FFNs call theirs
PASS, STEP = "pass", "step"  # over the image or the prompt at once; over one further token


def on_noise(module: nn.Module, tokens: int, width: int) -> Work:
    """``module`` on (1, tokens, width) noise that was just written, as the layer before it would."""
    like = next(module.parameters())
    noise = torch.randn(1, tokens, width, device=like.device, dtype=like.dtype)

    def prepare() -> Any:
        hidden = noise.clone()
        return lambda: module(hidden)

    return prepare


class Between(nn.Module):
    """What an FFN does to its neurons between its linears, on what its input linears give."""

    def __init__(self, ffn: nn.Module, like: torch.Tensor, gated: bool) -> None:
        super().__init__()
        found = (getattr(ffn, name, None) for name in ACTIVATIONS)
        # Under another name, and for its time alone, any will do: all work element by element, and the curve is brought to the block.
        self.activation: Any = next((f for f in found if callable(f)), functional.gelu)
        self.gated = gated
        self.like = nn.Parameter(torch.empty(0, device=like.device, dtype=like.dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The neurons' values, from as many inputs."""
        return self.activation(hidden) * hidden if self.gated else self.activation(hidden)


@dataclass(frozen=True)
class BlockCall:
    """What an attention block was called with.

    Attributes:
        block: The dense block.
        norm: The norm that it alone reads through, which goes with its last unit.
        args, kwargs: Of its forward; a cache among them has moved on since.
        entry: The block's layer of that cache, as it was then.
    """

    block: Any
    norm: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    entry: Any = None

    def shaped(self, site: AttentionSite, units: int) -> Work:
        """The block with ``units`` of its units, in uninitialised weights, behind its norm, on the same inputs."""
        holder = nn.ModuleDict({"block": copy.deepcopy(self.block)})
        if units < site.num_units:
            shape_attention_(holder, "block", units, site.num_units, compensated=True)
        block, norm = holder["block"], copy.deepcopy(self.norm) if self.norm and units else nn.Identity()
        hidden, heads = self.args[0] if self.args else self.kwargs[stream_name(self.kwargs)], 1 if site.multi_query else units

        def prepare() -> Any:
            kwargs = {name: self._cache(value, heads) if isinstance(value, Cache) else value for name, value in self.kwargs.items()}
            return lambda: (norm(hidden), block(*self.args, **kwargs))[1]

        return prepare

    def _cache(self, cache: Any, heads: int) -> Any:
        """A cache as the block found it, with its first ``heads`` key/value heads; updates replace what it holds, and leave ours alone."""
        fresh, layer = copy.copy(cache), copy.copy(self.entry)
        layer.keys, layer.values = layer.keys[:, :heads].contiguous(), layer.values[:, :heads].contiguous()
        fresh.layers = list(cache.layers)
        fresh.layers[self.block.layer_idx] = layer
        return fresh


@torch.no_grad()
def calls_of(
    model: Any, sites: Sequence[AttentionSite], inputs: dict[str, torch.Tensor], family: FamilyDeclaration | None = None
) -> dict[tuple[str, str], BlockCall]:
    """What ``sites`` are called with, by path and :data:`PASS` or, where ``family`` is given and the block takes part, :data:`STEP`."""
    with _watched(model, sites) as found:
        model(**inputs, use_cache=False, logits_to_keep=1)
    calls = {(path, PASS): call for path, call in found.items()}
    if family is None:
        return calls
    step = decode_step(model, family, model(**inputs, use_cache=True, logits_to_keep=1))
    with _watched(model, sites) as found:
        step()
    return calls | {(path, STEP): call for path, call in found.items()}


@contextmanager
def _watched(model: nn.Module, sites: Sequence[AttentionSite]) -> Iterator[dict[str, BlockCall]]:
    """First calls of ``sites`` by path."""
    found: dict[str, BlockCall] = {}

    def see(path: str, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        layer = model.get_submodule(path.rpartition(".")[0])
        name = norm_before(layer)
        norm = layer.get_submodule(name) if name else None
        entry = None if cache is None else copy.copy(cache.layers[block.layer_idx])
        found.setdefault(path, BlockCall(block, norm, args, kwargs, entry))

    with ExitStack() as stack:
        for site in sites:
            block = model.get_submodule(site.path)
            stack.callback(block.register_forward_pre_hook(partial(see, site.path), with_kwargs=True).remove)
        yield found
