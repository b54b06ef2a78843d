"""FLOPs: counted on the real model, and in closed form per site for the budget. FLOPs = 2 x multiply-accumulates."""

from __future__ import annotations

import math
import statistics as stats
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from infoprune.architecture import Architecture, AttentionSite, FamilyDeclaration, FFNSite
from infoprune.data import Example
from infoprune.freeze import frozen
from infoprune.plan import CompressionPlan, FFNDecision, ffn_parameters
from infoprune.prompts import PromptEncoder


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **options: Any) -> int:
    """FLOPs of attention with queries (..., heads, asking, width) on keys and values (..., asked, width), from their shapes."""
    *batch, asking, width = query
    return 2 * math.prod(batch) * asking * key[-2] * (width + value[-1])


# Attention kernels of CPUs and of Apple's GPUs, each one operator, which PyTorch's counter does not know, as it does those of CUDA.
_KERNELS = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math_for_mps")
KERNELS: dict[Any, Any] = {getattr(torch.ops.aten, name): _attention for name in _KERNELS if hasattr(torch.ops.aten, name)}


@dataclass(frozen=True)
class Workload:
    """The example whose cost is counted: image, prompt and answer.

    Attributes:
        vision_tokens: Tokens that pass each linear of the vision tower, over all tiles, class tokens included.
        prompt_tokens: Tokens that the language model reads at once, image tokens included.
        answer_tokens: Tokens generated, end-of-sequence included; all but the first take a decode step, at the context of the first one.
        attention: FLOPs of each dense attention block, by path, as counted: windows, cross-attention and caches make them differ.
    """

    vision_tokens: int
    prompt_tokens: int
    answer_tokens: int
    attention: dict[str, int]


@dataclass(frozen=True)
class Flops:
    """FLOPs of one example's parts.

    ``prefill`` is the language model's layers over the prompt, ``decode_step`` one further token, ``lm_head`` one position.
    """

    vision_tower: int
    projector: int
    prefill: int
    decode_step: int
    lm_head: int
    answer_tokens: int

    @property
    def total(self) -> int:
        """The whole workload."""
        decode = (self.answer_tokens - 1) * self.decode_step
        return self.vision_tower + self.projector + self.prefill + decode + self.answer_tokens * self.lm_head

    def as_dict(self) -> dict[str, int]:
        """Parts and total, for JSON."""
        return asdict(self) | {"total": self.total}


def typical_example(encoder: PromptEncoder, examples: Sequence[Example]) -> tuple[Example, int]:
    """The example of median prompt length, and the median number of answer tokens, of 64 that are spread evenly over all."""
    places = dict.fromkeys(round(place) for place in np.linspace(0, len(examples) - 1, min(len(examples), 64)))
    encoded = [(encoder.encode(examples[place], examples[place].load_image()), examples[place]) for place in places]
    by_length = sorted(encoded, key=lambda pair: len(pair[0].prompt))
    return by_length[len(by_length) // 2][1], int(stats.median(len(ids.answer) for ids, _ in encoded))


def prompt_inputs(encoder: PromptEncoder, example: Example) -> dict[str, torch.Tensor]:
    """Ordinary model inputs of one example's prompt."""
    return encoder.inputs([encoder.prompt_of(example)], [example.load_image()])


def count_flops(model: Any, family: FamilyDeclaration, inputs: dict[str, torch.Tensor], answer_tokens: int) -> Flops:
    """Run one prefill and one decode step under PyTorch's FLOP counter.

    Args:
        model: A dense or compressed model.
        family: Its declaration; the paths are the same in both.
        inputs: Of :func:`prompt_inputs`.
        answer_tokens: See :class:`Workload`.
    """
    return _flops(family, _Counts(model, family, inputs), answer_tokens)


def count_workload(model: Any, architecture: Architecture, inputs: dict[str, torch.Tensor], answer_tokens: int) -> tuple[Flops, Workload]:
    """FLOPs of a dense model, and the workload that they are of; see :func:`count_flops`."""
    counts = _Counts(model, architecture.family, inputs, architecture.attention)
    vision = max(counts.tokens[site.path] for site in architecture.attention if site.tower == "vision")
    attention = {site.path: counts.prefill(site.path) + (answer_tokens - 1) * counts.decode(site.path) for site in architecture.attention}
    return _flops(architecture.family, counts, answer_tokens), Workload(vision, inputs["input_ids"].shape[1], answer_tokens, attention)


def _flops(family: FamilyDeclaration, counts: _Counts, answer_tokens: int) -> Flops:
    vision, projector, prefill, head = (family.own(part, counts.prefill) for part in family.parts)
    return Flops(vision, projector, prefill, family.own("prefill", counts.decode), head, answer_tokens)


class _Counts:
    """FLOPs of a model's modules in a prefill and in a decode step, and the tokens that reach attention ``sites``."""

    @torch.no_grad()
    def __init__(self, model: Any, family: FamilyDeclaration, inputs: dict[str, torch.Tensor], sites: Sequence[AttentionSite] = ()) -> None:
        self._model, self._decoder = model, family.decoder
        self.tokens: dict[str, int] = {}
        with frozen(model), ExitStack() as stack:  # the counter trips over parameters that are read through views, unless they are frozen
            for site in sites:
                module = model.get_submodule(f"{site.path}.{site.names.out}")
                stack.callback(module.register_forward_pre_hook(partial(self._see, site)).remove)
            with FlopCounterMode(display=False, custom_mapping=KERNELS) as self._prefill:
                output = model(**inputs, use_cache=True, logits_to_keep=1)
            step = decode_step(model, family, output)
            with FlopCounterMode(display=False, custom_mapping=KERNELS) as self._decode:
                step()

    def _see(self, site: AttentionSite, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.tokens.setdefault(site.path, args[0].numel() // args[0].shape[-1])

    def prefill(self, path: str) -> int:
        """FLOPs of the module at ``path`` over the prompt."""
        return _flops_of(self._prefill, self._model, path)

    def decode(self, path: str) -> int:
        """FLOPs of the module at ``path`` for one further token."""
        return _flops_of(self._decode, self._model.get_submodule(self._decoder), path.removeprefix(self._decoder).lstrip("."))


def _flops_of(counter: FlopCounterMode, called: nn.Module, path: str) -> int:
    """FLOPs of a module inside the one that was called."""
    return sum(counter.get_flop_counts().get(f"{type(called).__name__}.{path}".rstrip("."), {}).values())


def decode_step(model: Any, family: FamilyDeclaration, prefilled: Any) -> Callable[[], Any]:
    """One further token after a prefill with a cache, which gave the output ``prefilled``; the step itself is left to the caller."""
    token = prefilled.logits[:, -1:].argmax(-1)
    cache = getattr(prefilled, "language_model_outputs", prefilled).past_key_values
    return partial(model.get_submodule(family.decoder), input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def tokens_through(tower: str, workload: Workload) -> int:
    """Tokens that pass each linear of a tower for one example."""
    return workload.vision_tokens if tower == "vision" else workload.prompt_tokens + workload.answer_tokens - 1


def attention_flops(site: AttentionSite, kept: int, workload: Workload) -> int:
    """FLOPs of an attention block with ``kept`` units: projections, scores and weighted values.

    All of it is in proportion to the units, but for the key and value projections that the query heads of a multi-query block share.
    """
    if kept == 0:
        return 0
    shared = 4 * tokens_through(site.tower, workload) * site.head_dim * site.hidden_size if site.multi_query else 0
    return shared + (workload.attention[site.path] - shared) * kept // site.num_units


def ffn_flops(site: FFNSite, decision: FFNDecision | None, workload: Workload) -> int:
    """FLOPs of an FFN under a decision."""
    return 2 * tokens_through(site.tower, workload) * ffn_parameters(site, decision)


def predicted_flops(architecture: Architecture, plan: CompressionPlan | None, workload: Workload, dense_total: int) -> int:
    """FLOPs of the workload after ``plan``: closed form for the sites, the dense model's count for all else."""
    dense = sites_flops(architecture, None, workload)
    return dense_total - dense + sites_flops(architecture, plan, workload)


def sites_flops(architecture: Architecture, plan: CompressionPlan | None, workload: Workload) -> int:
    """FLOPs of all sites under ``plan`` (``None``: dense)."""
    heads, ffn = (plan.heads, plan.ffn) if plan else ({}, {})
    total = sum(
        attention_flops(s, len(heads[s.path].keep_units) if s.path in heads else s.num_units, workload) for s in architecture.attention
    )
    return total + sum(ffn_flops(s, ffn.get(s.path), workload) for s in architecture.ffn)


def num_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())
