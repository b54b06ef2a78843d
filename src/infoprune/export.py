"""Write a compressed model for other tools: as an ordinary dense checkpoint of its family."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from infoprune.architecture import Architecture, AttentionSite, FFNSite
from infoprune.checkpoint import check_output_folder, in_precision, restate_precision_, save_processor, written_aside
from infoprune.data.seen import write_seen
from infoprune.errors import CheckpointError
from infoprune.geometry import clear_geometry_
from infoprune.model import VLM, load, precision_name
from infoprune.modeling_infoprune import Constant, ConstantAttention, LowRankGatedFFN, LowRankLinear
from infoprune.older_readers import keep_original_names_, write_for_older_readers
from infoprune.plan import CompressionPlan, FFNDecision, HeadDecision
from infoprune.resolve import family_of, resolve
from infoprune.surgery import kept_places

TOLERANCE = 1e-4  # of the largest logit
FLAGS = {"attention": "attention_bias", "ffn": "mlp_bias"}  # what a configuration may call biases that its family usually goes without


@torch.no_grad()
def export_dense(
    vlm: VLM,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda message: None,
) -> Path:
    """Write a checkpoint of the stock family with the answers of a compressed model, in the size and at the speed of the dense one.

    Factorised linears are multiplied out, removed heads and neurons come back with zero weights, so any tool that knows the family can
    read it.

    Args:
        vlm: A compressed model, loaded from its folder in float32.
        folder: Where to.
        dtype: Precision of the written weights; ``None``: that of the compressed checkpoint.
        overwrite: Replace a folder that holds something.
        notify: Called with one line for people.

    Raises:
        CheckpointError: It is not compressed, or not in float32, its plan is of another model, the family has no place for a bias that
            compression added, or the written model differs.
        PlanError: Its plan does not fit the family.
    """
    if vlm.plan is None:
        raise CheckpointError(f"'{vlm.model_id}' is not a compressed checkpoint with its plan.json; there is nothing to make dense.")
    if vlm.model.dtype != torch.float32:
        raise CheckpointError("Dense checkpoints are made from a model in float32; load it so. What is written is another option's matter.")
    folder = check_output_folder(folder, source=vlm.model_id, overwrite=overwrite)
    stock = _stock(vlm)
    stock.generation_config = vlm.model.generation_config
    probe = probe_inputs(vlm)
    expected = vlm.model(**probe).logits
    _check_same(stock(**probe).logits, expected)
    written: torch.dtype = dtype or vlm.stored or stock.dtype
    keep_original_names_(stock)
    with written_aside(folder) as aside:
        stock.save_pretrained(aside, state_dict=in_precision(stock.state_dict(), written))
        restate_precision_(aside, written)
        save_processor(vlm.processor, aside)
        write_for_older_readers(aside, vlm.processor)
        (aside / "plan.json").write_text(vlm.plan.to_json(), encoding="utf-8")  # what tells it from other people's
        write_seen(aside, vlm.seen)
        notify(f"reloading the checkpoint ({precision_name(written)}) and comparing logits")
        _round_(stock, written)
        expected = stock(**probe).logits
        del stock  # before the other one is read: two dense models may not fit
        found = load(aside, device=str(vlm.device), trust_remote_code=vlm.trusted).model
        _check_same(found(**probe).logits, expected)
    return folder


def _round_(stock: Any, dtype: torch.dtype) -> None:
    """Round the weights to ``dtype``; those that change are replaced, not written to, since they may be those of the compressed model."""
    for name, value in stock.state_dict().items():
        rounded = value.to(dtype).to(value.dtype) if value.is_floating_point() else value
        if not torch.equal(rounded, value):
            stock.load_state_dict({name: rounded}, assign=True, strict=False)
    stock.tie_weights()


def _check_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise CheckpointError(f"The dense checkpoint's logits differ by {difference:.3g} of the largest one; nothing was kept.")


def probe_inputs(vlm: VLM, size: tuple[int, int] = (64, 48)) -> dict[str, torch.Tensor]:
    """A prompt about a noise image of ``size``, to compare models on."""
    inputs = vlm.encoder.inputs([vlm.encoder.prompt("What is in the image?")], [Image.effect_noise(size, 80).convert("RGB")])
    return {name: value.to(vlm.device) for name, value in inputs.items()}


def _stock(vlm: VLM) -> Any:
    """The stock model with the weights of the compressed one; biases are asked for in its configuration where they are needed."""
    assert vlm.plan is not None
    fields = {k: v for k, v in vlm.model.config.to_dict().items() if k not in ("model_type", "infoprune", "auto_map", "architectures")}
    config = CONFIG_MAPPING[family_of(vlm.model).model_type].from_dict(fields)
    clear_geometry_(config)
    stock, architecture = _empty(config, vlm.model.dtype)
    vlm.plan.check(architecture)
    state = _dense_state(vlm.model, stock, architecture, vlm.plan)
    lacking = [name for name, value in state.items() if name not in stock.state_dict() and bool(value.any())]
    if lacking:
        _ask_for_biases_(config, architecture, lacking, vlm.plan)
        stock, _ = _empty(config, vlm.model.dtype)
    complete = {n: state.get(n, torch.zeros(p.shape, dtype=vlm.model.dtype, device=vlm.device)) for n, p in stock.state_dict().items()}
    stock.load_state_dict(complete, assign=True)
    stock.tie_weights()
    return stock.to(vlm.device).eval()  # buffers that no checkpoint holds were made on the CPU


def _empty(config: Any, dtype: torch.dtype) -> tuple[Any, Architecture]:
    """A stock model whose parameters have shapes and no values, and its sites."""
    with init_empty_weights(include_buffers=False):
        stock = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return stock, resolve(stock)


def _ask_for_biases_(config: Any, architecture: Architecture, lacking: list[str], plan: CompressionPlan) -> None:
    """Switch on the biases that ``lacking`` weights need.

    Raises:
        CheckpointError: The configuration knows no such switch.
    """
    kinds: tuple[tuple[str, tuple[AttentionSite | FFNSite, ...]], ...] = (("attention", architecture.attention), ("ffn", architecture.ffn))
    switched = set()
    for kind, sites in kinds:
        for site in sites:
            names = [name for name in lacking if name.startswith(f"{site.path}.")]
            if not names or (site.tower, kind) in switched:
                continue
            part = config.vision_config if site.tower == "vision" else config.get_text_config()
            if getattr(part, FLAGS[kind], True):
                raise CheckpointError(
                    f"No dense checkpoint of the family can hold this model: compression added a bias, '{names[0]}', for which the "
                    f"configuration '{part.model_type}' has no place ({len(lacking)} in all). Compress the original again without them, "
                    f"with what else you asked for then:\n{_without_biases(plan)}"
                )
            setattr(part, FLAGS[kind], True)
            switched.add((site.tower, kind))


def _without_biases(plan: CompressionPlan) -> str:
    """The command that compresses as this plan did, but adds no biases."""
    data = plan.calibration.data if plan.calibration and plan.calibration.data != "examples" else "DATA"
    budget = [text for name, value in plan.budget.items() for text in (f"--{name}", f"{value:g}")]
    return shlex.join(
        ["infoprune", "compress", plan.model_id, "--data", data, *budget, "--compensate", "none", "--no-centred", "-o", "DIR"]
    )


def _dense_state(model: Any, stock: Any, architecture: Architecture, plan: CompressionPlan) -> dict[str, torch.Tensor]:
    """The compressed model's weights under the dense model's names and in its shapes, and biases that the latter may not know."""
    state = dict(model.state_dict())
    for site in (*architecture.attention, *architecture.ffn):
        if site.path not in plan.heads and site.path not in plan.ffn:
            continue
        block = model.get_submodule(site.path)
        if isinstance(site, AttentionSite):
            found = _attention(block, stock.get_submodule(site.path), site, plan.heads[site.path], model.device)
            replaced = [""]
        else:
            decision = plan.ffn[site.path]
            found = (
                _ffn(block, site)
                if decision.keep_neurons is None
                else _narrowed(block, stock.get_submodule(site.path), site, decision, model.device)
            )
            linears = [name for name, module in block.named_children() if isinstance(module, (nn.Linear, LowRankLinear, Constant))]
            # Where an FFN's linears are in the layer itself, an attention block that was dropped stands beside them.
            replaced = [f"{name}." for name in linears if f"{site.path}.{name}" not in plan.heads]
        state = {name: value for name, value in state.items() if not name.startswith(tuple(f"{site.path}.{part}" for part in replaced))}
        state |= {f"{site.path}.{name}": value for name, value in found.items()}
    return state


def _attention(block: Any, stock: nn.Module, site: AttentionSite, decision: HeadDecision, device: torch.device) -> dict[str, torch.Tensor]:
    names = site.names
    found = {name: torch.zeros(p.shape, device=device, dtype=p.dtype) for name, p in stock.named_parameters()}
    if isinstance(block, ConstantAttention):
        return found if block.bias is None else found | {f"{names.out}.bias": block.bias.detach()}
    columns, places = kept_places(site, decision.keep_units)
    for name, value in block.state_dict().items():
        linear = name.rpartition(".")[0]
        if name == f"{names.out}.weight":
            found[name][:, columns] = value
        elif linear in places:
            found[name][places[linear]] = value
        else:
            found[name] = value
    return found


def _narrowed(block: Any, stock: nn.Module, site: FFNSite, decision: FFNDecision, device: torch.device) -> dict[str, torch.Tensor]:
    """Zeros for the neurons that are gone; where all are, the constant that is left is the down projection's bias."""
    found, names, kept = {}, site.names, list(decision.keep_neurons or ())
    for name in (names.gate, names.up, names.down):
        if name is None:
            continue
        for key, parameter in stock.get_submodule(name).named_parameters():
            found[f"{name}.{key}"] = torch.zeros(parameter.shape, device=device, dtype=parameter.dtype)
        for key, value in block.get_submodule(name).state_dict().items():
            if name != names.down:
                found[f"{name}.{key}"][kept] = value
            elif key == "weight":
                found[f"{name}.{key}"][:, kept] = value
            else:
                found[f"{name}.{key}"] = value
    return found


def _ffn(block: Any, site: FFNSite) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    if isinstance(block, LowRankGatedFFN):
        weight, bias = block.gate_up_proj.weight @ block.shared_proj.weight, block.gate_up_proj.bias
        for name, rows in zip((site.names.gate, site.names.up), weight.chunk(2), strict=True):
            found[f"{name}.weight"] = rows.clone()
        for name, rows in zip((site.names.gate, site.names.up), bias.chunk(2) if bias is not None else (), strict=bias is not None):
            found[f"{name}.bias"] = rows.clone()
    for name, module in block.named_children():
        if isinstance(module, LowRankLinear):
            module = module.to_linear()
        if isinstance(module, nn.Linear) and name in (site.names.gate, site.names.up, site.names.down):
            found |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    return found
