"""What 3.2x fewer FLOPs mean for models of real size: tower by tower, in FLOPs, weights, key/value cache and time.

    python benchmarks/scale.py [--models NAME ...] [--factor 3.2] [--repeats N]

Configurations are the published ones, weights are random: costs do not depend on their values. One layer of each kind is built, run and
counted, and stands for all of its kind; everything else (embeddings, projector, language head) is there once, as in the real model. The
cut is uniform: every block keeps the share of its FLOPs that the budget leaves, FFNs with fewer neurons or of low rank. Times are of one
layer in float32 at a batch of one, dense and cut alternating, times the number of layers; no whole model of this size was run.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from common import log, write
from infoprune.architecture import Architecture, AttentionSite, FFNSite
from infoprune.evaluation.cost import Flops, Workload, attention_flops, count_workload, decode_step, ffn_flops
from infoprune.modeling_infoprune import shape_
from infoprune.plan import CompressionPlan, FFNDecision, HeadDecision, max_rank
from infoprune.resolve import resolve

PROMPT_TOKENS, ANSWER_TOKENS = 40, 16  # of text beside the image
RANK_MULTIPLE = 64  # of neurons, too
CUTS = FEWER, LOW_RANK = "fewer neurons", "low rank"
HALF = 2  # bytes of a weight or a cached value in the 16-bit formats that such models are served in
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Size:
    """One published model.

    Attributes:
        build: A model with one layer of each kind.
        inputs: Of one image and a prompt.
        vision, text: How many layers of each kind it has, in the order of the built ones.
        image: What the image is.
    """

    build: Callable[[], Any]
    inputs: Callable[[Any], Inputs]
    vision: tuple[int, ...]
    text: tuple[int, ...]
    image: str


def prompt(config: Any, image_tokens: int) -> Inputs:
    ids = torch.full((1, image_tokens + PROMPT_TOKENS), 5)
    ids[0, :image_tokens] = config.image_token_id
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def llava(hidden: int, intermediate: int, layers: int, heads: int) -> Size:
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
              "num_hidden_layers": 1, "image_size": 336, "patch_size": 14, "projection_dim": 768}  # fmt: skip
    text = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
            "num_key_value_heads": heads, "num_hidden_layers": 1, "vocab_size": 32064, "max_position_embeddings": 4096}  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, vision_feature_layer=-1)
    # The published models take features one layer before the last, which then need not run: 23 of 24 layers count.
    return Size(
        lambda: LlavaForConditionalGeneration(config), lambda m: prompt(config, 576) | {"pixel_values": torch.randn(1, 3, 336, 336)},
        (23,), (layers,), "336 x 336: 576 tokens",
    )  # fmt: skip


def smolvlm() -> Size:
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1, "image_size": 512,
              "patch_size": 16}  # fmt: skip
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
            "num_hidden_layers": 1, "vocab_size": 49280, "head_dim": 64, "max_position_embeddings": 8192}  # fmt: skip
    config = SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=4, image_token_id=49190, tie_word_embeddings=True)
    return Size(
        lambda: SmolVLMForConditionalGeneration(config),
        lambda m: prompt(config, 17 * 64) | {"pixel_values": torch.randn(1, 17, 3, 512, 512)},
        (12,), (30,), "2048 x 2048 in 17 tiles: 1,088 tokens",
    )  # fmt: skip


def qwen(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int, tied: bool) -> Size:
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "depth": 2, "out_hidden_size": hidden,
              "fullatt_block_indexes": [1]}  # fmt: skip
    text = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": key_value_heads,
            "num_hidden_layers": 1, "vocab_size": vocabulary,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}  # fmt: skip
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied)
    side = 64  # patches of 14 pixels
    return Size(
        lambda: Qwen2_5_VLForConditionalGeneration(config),
        lambda m: prompt(config, side * side // 4)
        | {"pixel_values": torch.randn(side * side, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, side, side]])},
        (28, 4), (layers,), "896 x 896: 1,024 tokens",
    )  # fmt: skip


MODELS: dict[str, Callable[[], Size]] = {
    "SmolVLM-256M": smolvlm,
    "Qwen2.5-VL-3B": lambda: qwen(2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-VL-7B": lambda: qwen(3584, 18944, 28, 28, 4, 152064, False),
    "LLaVA-1.5-7B": lambda: llava(4096, 11008, 32, 32),
    "LLaVA-1.5-13B": lambda: llava(5120, 13824, 40, 40),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--factor", type=float, default=3.2)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for row in measured(MODELS[name](), args.factor, args.repeats):
            rows.append({"method": "infoprune:uniform", "model": name} | row)
            log(f"{name}: {row}")
    write("scale", rows, seeds=[0], data="none", num_questions=0, factor=args.factor)


def measured(size: Size, factor: float, repeats: int) -> list[dict[str, Any]]:
    """A row for each way to cut FFNs."""
    torch.manual_seed(0)
    model = size.build().eval()
    architecture, inputs = resolve(model), size.inputs(model)
    flops, workload = count_workload(model, architecture, inputs, ANSWER_TOKENS)
    sites = (*architecture.attention, *architecture.ffn)
    times = {site.path: size_of(size, site) for site in sites}
    fixed, cuttable = split(architecture, flops, workload, times)
    total = fixed + sum(cuttable.values())
    share = (total / factor - fixed) / sum(cuttable.values())
    plans = {cut: uniform_plan(architecture, share, cut) for cut in CUTS}
    cut_models = []
    for plan in plans.values():
        cut_models.append(copy.deepcopy(model))
        shape_(cut_models[-1], plan.shapes())
    was, *now = layer_times([model, *cut_models], architecture, inputs, repeats)
    rows = []
    for (cut, plan), small, layers in zip(plans.items(), cut_models, now, strict=True):
        left = sum(cost(site, plan, workload) * times[site.path] for site in sites)
        row: dict[str, Any] = {
            "cut": cut, "image": size.image, "layers": {"vision": sum(size.vision), "text": sum(size.text)}, "dense_flops": total,
            "flops_ratio": (fixed + left) / total, "share_of_blocks": share, "largest_factor": total / fixed,
            "of_dense": {tower: sum(cuttable[s.path] for s in sites if s.tower == tower) / total for tower in ("vision", "text")},
        }  # fmt: skip
        for key, each in (("dense", model), ("compressed", small)):
            row[f"weights_gb_{key}"] = HALF * weights(each, architecture, times) / 1e9
            row[f"cache_kb_per_token_{key}"] = cache_bytes(architecture, times, None if each is model else plan) / 1e3
        for part in was:
            seconds = [sum(t * times[path] for path, t in found[part].items()) for found in (was, layers)]
            row[f"layers_ms_{part}"] = {"dense": 1000 * seconds[0], "compressed": 1000 * seconds[1]}
            row[f"speedup_{part}"] = seconds[0] / seconds[1]
        rows.append(row)
    return rows


def size_of(size: Size, site: AttentionSite | FFNSite) -> int:
    """How many layers the site stands for."""
    return (size.vision if site.tower == "vision" else size.text)[site.layer]


def split(architecture: Architecture, flops: Flops, workload: Workload, times: dict[str, int]) -> tuple[int, dict[str, int]]:
    """FLOPs of what is there once, and of each site times its number."""
    each = {site.path: cost(site, None, workload) for site in (*architecture.attention, *architecture.ffn)}
    return flops.total - sum(each.values()), {path: value * times[path] for path, value in each.items()}


def cost(site: AttentionSite | FFNSite, plan: CompressionPlan | None, workload: Workload) -> int:
    if isinstance(site, FFNSite):
        return ffn_flops(site, plan.ffn[site.path] if plan else None, workload)
    return attention_flops(site, len(plan.heads[site.path].keep_units) if plan else site.num_units, workload)


def uniform_plan(architecture: Architecture, share: float, cut: str) -> CompressionPlan:
    """Every block keeps ``share`` of its units, and every FFN neurons or ranks of that share of its FLOPs."""
    heads = {
        site.path: HeadDecision(keep_units=tuple(range(max(1, round(share * site.num_units)))), num_units=site.num_units)
        for site in architecture.attention
    }
    ffn = {}
    for site in architecture.ffn:
        if cut == FEWER:
            neurons = round(share * site.intermediate_size / RANK_MULTIPLE) * RANK_MULTIPLE
            ffn[site.path] = FFNDecision(keep_neurons=tuple(range(max(RANK_MULTIPLE, neurons))), num_neurons=site.intermediate_size)
        else:
            names = ("joint_rank" if site.gated else "up_rank", "down_rank")
            ffn[site.path] = FFNDecision(**{name: rank_at(share, max_rank(site, name)) for name in names})  # pyright: ignore[reportArgumentType]
    return CompressionPlan(library="", model_type=architecture.family.model_type, model_id="", heads=heads, ffn=ffn)


def rank_at(share: float, top: int) -> int:
    return max(RANK_MULTIPLE, round(share * (top + 1) / RANK_MULTIPLE) * RANK_MULTIPLE)


def weights(model: nn.Module, architecture: Architecture, times: dict[str, int]) -> int:
    """Parameters with every layer counted as often as it is there; tied ones once."""
    total = sum(p.numel() for p in model.parameters())
    for site in architecture.attention:
        layer = model.get_submodule(site.path.rpartition(".")[0])
        total += (times[site.path] - 1) * sum(p.numel() for p in layer.parameters())
    return total


def cache_bytes(architecture: Architecture, times: dict[str, int], plan: CompressionPlan | None) -> int:
    """Keys and values of one token."""
    found = 0
    for site in architecture.attention:
        if site.tower == "text":
            kept = len(plan.heads[site.path].keep_units) if plan else site.num_units
            found += times[site.path] * 2 * HALF * site.head_dim * site.num_key_value_heads * kept // site.num_units
    return found


@torch.no_grad()
def layer_times(models: list[Any], architecture: Architecture, inputs: Inputs, repeats: int) -> list[dict[str, dict[str, float]]]:
    """Median seconds of the layers of each model by part (``vision``, ``prefill``, ``decode``) and attention path."""
    samples: list[dict[str, dict[str, list[float]]]] = [{part: {} for part in ("vision", "prefill", "decode")} for _ in models]
    for repeat in range(repeats + 2):
        for model, found in zip(models, samples, strict=True):
            output, taken = stopwatch(model, architecture, lambda model=model: model(**inputs, use_cache=True, logits_to_keep=1))
            _, step = stopwatch(model, architecture, decode_step(model, architecture.family, output))
            if repeat < 2:
                continue
            for site in architecture.attention:
                part = "vision" if site.tower == "vision" else "prefill"
                found[part].setdefault(site.path, []).append(taken[site.path])
                if site.path in step:
                    found["decode"].setdefault(site.path, []).append(step[site.path])
    return [{part: {p: statistics.median(v) for p, v in paths.items()} for part, paths in found.items()} for found in samples]


def stopwatch(model: Any, architecture: Architecture, run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What ``run`` returns, and the seconds of each layer in it by the path of its attention block."""
    taken: dict[str, float] = {}
    handles = []
    for site in architecture.attention:
        layer = model.get_submodule(site.path.rpartition(".")[0])
        handles.append(layer.register_forward_pre_hook(lambda *_, path=site.path: taken.update({path: -time.perf_counter()})))
        handles.append(layer.register_forward_hook(lambda *_, path=site.path: taken.update({path: taken[path] + time.perf_counter()})))
    try:
        return run(), taken
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
