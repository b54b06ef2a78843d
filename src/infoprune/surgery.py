"""Cut a model by a plan: physical removal and factorisation, in place. The only module that changes weights without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from infoprune.architecture import Architecture, AttentionSite, FFNSite
from infoprune.criteria.ffn import Factorization, FFNOptions, factorize_down, factorize_inputs
from infoprune.criteria.heads import block_of, compensate
from infoprune.errors import PlanError
from infoprune.modeling_infoprune import shape_attention_, shape_ffn_
from infoprune.plan import CompressionPlan, FFNDecision, HeadDecision
from infoprune.site_statistics import SiteStatistics, Statistics


@torch.no_grad()
def apply_(
    model: nn.Module,
    architecture: Architecture,
    plan: CompressionPlan,
    statistics: Statistics,
    *,
    options: FFNOptions | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Cut ``model`` by ``plan``.

    Args:
        model: The dense model; changed in place.
        architecture: Its sites.
        plan: What to keep.
        statistics: Moments of the dense model, for compensation and factorisation; those of neurons where FFNs lose some under ``centred``.
        options: The FFN method; ``None`` takes it from ``plan.method``.
        progress: Called after each site.

    Raises:
        PlanError: The plan does not fit the model; nothing was changed.
    """
    plan.check(architecture)
    options = options or ffn_options(plan)
    for path, decision in plan.heads.items():
        prune_heads_(model, _attention(architecture, path), decision, statistics.sites[path])
        progress()
    for path, decision in plan.ffn.items():
        cut_ffn_(model, _ffn(architecture, path), decision, statistics.sites[path], options)
        progress()


def ffn_options(plan: CompressionPlan) -> FFNOptions:
    """The FFN method that a plan records."""
    method: dict[str, Any] = dict(plan.method)
    try:
        return FFNOptions(
            metric=method.get("ffn_metric", "task"), centred=bool(method.get("centred", True)),
            structure=method.get("structure", "joint"), whitening=method.get("whitening", "full"),
            shrinkage=float(method.get("shrinkage", 0.0)),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise PlanError(f"The plan's method is not usable: {error}") from error


def _attention(architecture: Architecture, path: str) -> AttentionSite:
    site = architecture.site(path)
    assert isinstance(site, AttentionSite)
    return site


def _ffn(architecture: Architecture, path: str) -> FFNSite:
    site = architecture.site(path)
    assert isinstance(site, FFNSite)
    return site


@torch.no_grad()
def prune_heads_(model: nn.Module, site: AttentionSite, decision: HeadDecision, statistics: SiteStatistics) -> None:
    """Remove the units that ``decision`` does not keep; rows of q, k, v and columns of the output projection go with them."""
    parent_path, _, name = site.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    attention: Any = getattr(parent, name)
    names = site.names
    old = {name: getattr(attention, name) for name in (*names.projections, names.out)}
    kept = list(decision.keep_units)
    rows = kept_places(site, kept)[1]
    weight, correction = compensate(block_of(site, statistics, old[names.out].weight.cpu()), kept, decision.compensate)
    shape_attention_(parent, name, len(kept), site.num_units, compensated=correction is not None)
    if not kept:
        _set_bias(getattr(parent, name), old[names.out].bias, correction)
        return
    for name, index in rows.items():
        new = getattr(attention, name)
        new.weight.copy_(old[name].weight[index])
        if new.bias is not None:
            new.bias.copy_(old[name].bias[index])
    out = getattr(attention, names.out)
    out.weight.copy_(weight)
    _set_bias(out, old[names.out].bias, correction)


def kept_places(site: AttentionSite, kept: Sequence[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Where the units ``kept`` are in the dense block: columns of the output projection, and rows of the input projections by name."""
    names, columns = site.names, _places(kept, site.unit_width)
    if names.qkv:
        return columns, {names.qkv: torch.cat([columns + part * site.num_units * site.unit_width for part in range(3)])}
    if site.multi_query:
        return columns, {names.query: columns}
    keys = _places(kept, site.head_dim)
    return columns, {names.query: columns, names.key: keys, names.value: keys}


def _places(units: Sequence[int], width: int) -> torch.Tensor:
    return torch.tensor([place for unit in units for place in range(unit * width, (unit + 1) * width)], dtype=torch.long)


def _set_bias(linear: Any, original: torch.Tensor | None, correction: torch.Tensor | None) -> None:
    if linear.bias is None:  # neither had the dense linear one, nor was anything centred or compensated
        return
    linear.bias.zero_()
    for part in (original, correction):
        if part is not None:
            linear.bias.add_(part.to(linear.bias.device, linear.bias.dtype))


def cut_ffn_(model: nn.Module, site: FFNSite, decision: FFNDecision, statistics: SiteStatistics, options: FFNOptions) -> None:
    """Cut one FFN as ``decision`` says: fewer neurons, or linears of lower rank."""
    cut_ = factorize_ffn_ if decision.keep_neurons is None else narrow_ffn_
    cut_(model, site, decision, statistics, options)


@torch.no_grad()
def narrow_ffn_(model: nn.Module, site: FFNSite, decision: FFNDecision, statistics: SiteStatistics, options: FFNOptions) -> None:
    """Remove the neurons that ``decision`` does not keep: rows of gate and up, columns of down.

    Under ``options.centred`` what the removed ones gave on average goes into the bias, b' = b + W_R E[z_R].

    Raises:
        PlanError: Their means are needed, and were not calibrated.
    """
    assert decision.keep_neurons is not None
    if options.centred and statistics.neurons is None:
        raise PlanError(f"The means of the neurons of '{site.path}' were not calibrated; ask for them, or set centred to false.")
    parent_path, _, name = site.path.rpartition(".")
    parent, names = model.get_submodule(parent_path), site.names
    ffn: Any = getattr(parent, name)
    old = {key: getattr(ffn, key) for key in (names.gate, names.up, names.down) if key}
    down, kept = old.pop(names.down), torch.tensor(decision.keep_neurons, dtype=torch.long)
    shape_ffn_(parent, name, decision.shapes | {"centred": options.centred})
    correction = None
    if options.centred and statistics.neurons is not None:
        lost = statistics.neurons.mean.clone()
        lost[kept] = 0
        correction = down.weight.cpu().double() @ lost
    writer = getattr(ffn, names.down)
    _set_bias(writer, down.bias, correction)
    if len(kept) == 0:
        return
    writer.weight.copy_(down.weight[:, kept])
    for key, linear in old.items():
        new = getattr(ffn, key)
        new.weight.copy_(linear.weight[kept])
        if new.bias is not None:
            new.bias.copy_(linear.bias[kept])


@torch.no_grad()
def factorize_ffn_(model: nn.Module, site: FFNSite, decision: FFNDecision, statistics: SiteStatistics, options: FFNOptions) -> None:
    """Replace linears of one FFN by low-rank ones."""
    parent_path, _, name = site.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    old: Any = getattr(parent, name)
    names = site.names
    dense = {key: getattr(old, key) for key in (names.gate, names.up, names.down) if key}
    solved = factorizations(site, statistics, dense, options, decision)
    shape_ffn_(parent, name, decision.shapes | {"centred": options.centred})
    new: Any = getattr(parent, name)
    targets = {"gate_rank": names.gate, "up_rank": names.up, "down_rank": names.down}
    for rank_name, factorization in solved.items():
        a, b, correction = factorization.factors(getattr(decision, rank_name))
        if rank_name == "joint_rank":
            assert names.gate is not None
            down, up = new.shared_proj, new.gate_up_proj
            biases = [dense[key].bias for key in (names.gate, names.up)]
            original = None if biases[0] is None else torch.cat(biases)
        else:
            key = targets[rank_name]
            assert key is not None
            down, up = getattr(new, key).down, getattr(new, key).up
            original = dense[key].bias
        down.weight.copy_(a)
        up.weight.copy_(b)
        _set_bias(up, original, correction)


def factorizations(
    site: FFNSite, statistics: SiteStatistics, dense: dict[str, nn.Linear], options: FFNOptions, decision: FFNDecision
) -> dict[str, Factorization]:
    """Solve the eigenproblems of exactly the linears that ``decision`` factorises, by the decision's field names."""
    names, solved = site.names, {}
    if decision.joint_rank is not None:
        assert names.gate is not None
        stacked = torch.cat([dense[names.gate].weight.cpu(), dense[names.up].weight.cpu()])
        solved["joint_rank"] = factorize_inputs(site, statistics, stacked, "joint", options)
    if decision.gate_rank is not None:
        assert names.gate is not None
        solved["gate_rank"] = factorize_inputs(site, statistics, dense[names.gate].weight.cpu(), "gate", options)
    if decision.up_rank is not None:
        solved["up_rank"] = factorize_inputs(site, statistics, dense[names.up].weight.cpu(), "up", options)
    if decision.down_rank is not None:
        down = dense[names.down]
        bias = None if down.bias is None else down.bias.cpu()
        solved["down_rank"] = factorize_down(statistics, down.weight.cpu(), bias, options)
    return solved
