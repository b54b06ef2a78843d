"""FLOPs: counted on the real model, and in closed form per site for the budget. FLOPs = 2 x multiply-accumulates."""

from __future__ import annotations

import statistics as stats
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from infoprune.architecture import Architecture, AttentionSite, FamilyDeclaration, FFNSite
from infoprune.data import Example
from infoprune.freeze import frozen
from infoprune.packing import PromptEncoder
from infoprune.plan import CompressionPlan, FFNDecision, ffn_parameters, head_parameters


@dataclass(frozen=True)
class Workload:
    """The example whose cost is counted: image, prompt and answer.

    Attributes:
        vision_sequences: Image tiles that pass the vision tower.
        vision_tokens: Tokens of one tile inside the vision tower, class token included.
        prompt_tokens: Tokens that the language model reads at once, image tokens included.
        answer_tokens: Tokens generated, end-of-sequence included; all but the first take a decode step.
    """

    vision_sequences: int
    vision_tokens: int
    prompt_tokens: int
    answer_tokens: int


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
    """The example of median prompt length among the first 64, and the median number of answer tokens."""
    encoded = [(encoder.encode(e, e.load_image()), e) for e in examples[:64]]
    by_length = sorted(encoded, key=lambda pair: len(pair[0].prompt))
    return by_length[len(by_length) // 2][1], int(stats.median(len(ids.answer) for ids, _ in encoded))


def prompt_inputs(encoder: PromptEncoder, example: Example) -> dict[str, torch.Tensor]:
    """Ordinary model inputs of one example's prompt."""
    return dict(encoder.processor(text=[encoder.prompt(example.question)], images=[[example.load_image()]], return_tensors="pt"))


@torch.no_grad()
def count_flops(model: Any, family: FamilyDeclaration, inputs: dict[str, torch.Tensor], answer_tokens: int) -> tuple[Flops, Workload]:
    """Run one prefill and one decode step under PyTorch's FLOP counter.

    Args:
        model: A dense or compressed model.
        family: Its declaration; the paths are the same in both.
        inputs: Of :func:`prompt_inputs`.
        answer_tokens: See :class:`Workload`.
    """
    seen: dict[str, torch.Size] = {}
    names = family.vision_towers[model.config.vision_config.model_type]
    layer = model.get_submodule(f"{family.vision}.{names.layers}.0")
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.setdefault("vision", (args[0] if args else kwargs["hidden_states"]).shape) and None,
        with_kwargs=True,
    )
    try:
        # The fused attention kernels are invisible to the counter on CPU; the plain one is counted. It trips over parameters that are read
        # through views, unless they are frozen.
        with frozen(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as prefill:
            output = model(**inputs, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
        with frozen(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as decode:
            model(input_ids=token, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    finally:
        hook.remove()
    root = type(model).__name__

    def part(counter: FlopCounterMode, path: str) -> int:
        return sum(counter.get_flop_counts().get(f"{root}.{path}", {}).values())

    flops = Flops(
        part(prefill, family.vision), part(prefill, family.projector), part(prefill, family.text),
        part(decode, family.text), part(prefill, "lm_head"), answer_tokens,
    )  # fmt: skip
    sequences, tokens = seen["vision"][0], seen["vision"][1]
    return flops, Workload(sequences, tokens, inputs["input_ids"].shape[1], answer_tokens)


def tokens_through(tower: str, workload: Workload) -> int:
    """Tokens that pass each linear of a tower for one example."""
    if tower == "vision":
        return workload.vision_sequences * workload.vision_tokens
    return workload.prompt_tokens + workload.answer_tokens - 1


def attention_flops(site: AttentionSite, kept: int, workload: Workload) -> int:
    """FLOPs of an attention block with ``kept`` units: projections, scores and weighted values (full square, as kernels compute it)."""
    width = kept * site.unit_width
    if site.tower == "vision":
        pairs = workload.vision_sequences * workload.vision_tokens**2
    else:  # every decode step is counted at the context of the first
        pairs = workload.prompt_tokens**2 + (workload.answer_tokens - 1) * (workload.prompt_tokens + 1)
    return 2 * tokens_through(site.tower, workload) * head_parameters(site, kept) + 4 * pairs * width


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
