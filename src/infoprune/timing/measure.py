"""Measure the table that a model's decisions need, or find it among those that were measured before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infoprune.architecture import AttentionSite, FFNSite
from infoprune.evaluation.cost import Workload, num_parameters
from infoprune.evaluation.latency import answering
from infoprune.model import VLM
from infoprune.modeling_infoprune import LowRankLinear
from infoprune.plan import max_rank
from infoprune.progress import SILENT, Progress
from infoprune.site_costs import BETWEEN, DOWN, JOINT, UP, Run, attention_name, ffn_name, runs_of
from infoprune.solve import SolvedSite
from infoprune.timing.inside import Inside
from infoprune.timing.stopwatch import Work, median_seconds
from infoprune.timing.table import CostTable, Curve, Machine, Wanted, read_table, write_table
from infoprune.timing.works import PASS, STEP, Between, BlockCall, calls_of, on_noise

POINTS = 8  # of a curve, at most
REPEATS, WARMUP = 20, 2
LIMIT = 60.0  # seconds, after which a few repeats do


@dataclass(frozen=True)
class Subject:
    """One curve to measure.

    Attributes:
        name: Of the curve.
        sizes: Its points.
        work: Makes what is timed at a size, from what attention blocks are called with.
    """

    name: str
    sizes: tuple[int, ...]
    work: Callable[[int, dict[tuple[str, str], BlockCall]], Work]


@torch.no_grad()
def cost_table(
    vlm: VLM,
    solved: Sequence[SolvedSite],
    workload: Workload,
    probe: dict[str, torch.Tensor],
    *,
    multiple: int,
    folder: Path,
    progress: Progress = SILENT,
) -> CostTable:
    """What time the dense model takes on this machine, and its sites under the decisions that may be made about them.

    Sites of the same shape are measured once: alone, and dense ones inside the model, to which the curves are then brought
    (:mod:`infoprune.timing.inside`). All is measured in the same rounds, the whole model's time included, and kept together: a table is
    consistent in itself on a machine whose speed changes from hour to hour.

    Args:
        vlm: The dense model; nothing of it changes.
        solved: The sites that may be cut.
        workload: The example.
        probe: Its inputs.
        multiple: Ranks are multiples of this.
        folder: Where tables are kept.
        progress: Shows the rounds.
    """
    subjects = merged(subject for item in solved for subject in _subjects(vlm.model, item, workload, multiple))
    wanted = Wanted(
        machine=Machine.here(vlm.device, next(vlm.model.parameters()).dtype),
        model=f"{vlm.model.config.model_type}, {num_parameters(vlm.model)} parameters",
        vision_tokens=workload.vision_tokens,
        prompt_tokens=workload.prompt_tokens,
        answer_tokens=workload.answer_tokens,
        sizes={name: subject.sizes for name, subject in subjects.items()},
    )
    found = read_table(folder, wanted)
    if found is None:
        found = _measured(vlm, list(subjects.values()), [item.site for item in solved], wanted, workload, probe, progress)
        write_table(folder, found)
    return found


def merged(subjects: Iterable[Subject]) -> dict[str, Subject]:
    """One curve a name, over all sizes that a site of that shape may take: some must keep a unit, others none."""
    found: dict[str, Subject] = {}
    for subject in subjects:
        known = found.get(subject.name, subject)
        widest = min(known, subject, key=lambda s: s.sizes[0])  # its work knows the smallest size
        found[subject.name] = replace(widest, sizes=tuple(sorted({*known.sizes, *subject.sizes})))
    return found


def _measured(
    vlm: VLM, subjects: Sequence[Subject], sites: Sequence[AttentionSite | FFNSite], wanted: Wanted, workload: Workload,
    probe: dict[str, torch.Tensor], progress: Progress,
) -> CostTable:  # fmt: skip
    assert vlm.architecture is not None
    blocks = [site for site in sites if isinstance(site, AttentionSite)]
    calls = calls_of(vlm.model, blocks, probe, vlm.architecture.family if wanted.answer_tokens > 1 else None)
    works = [subject.work(size, calls) for subject in subjects for size in subject.sizes]

    def answer() -> Any:
        vlm.model(**probe, use_cache=True, logits_to_keep=1)  # a model that is served finds its own weights and code in the caches
        return answering(vlm.model, probe, wanted.answer_tokens)

    inside = Inside(vlm.model, sites)
    with progress.task("timing this machine", REPEATS + WARMUP) as advance:
        end_to_end, _, *rest = median_seconds(
            [answer, inside.work(answer), *works], vlm.device, repeats=REPEATS, warmup=WARMUP, limit=LIMIT, after_round=lambda: advance(1)
        )
    seconds = iter(rest)
    curves = {subject.name: Curve.through(subject.sizes, [next(seconds) for _ in subject.sizes]) for subject in subjects}
    return CostTable(wanted=wanted, end_to_end=end_to_end, curves=inside.brought(curves, workload))


def spaced(least: int, most: int, multiple: int = 1) -> tuple[int, ...]:
    """At most :data:`POINTS` multiples from ``least`` to ``most``, evenly spaced; ``most`` itself where there is none."""
    low, high = -(-least // multiple), most // multiple
    if high < low:
        return (most,)
    steps = min(high - low, POINTS - 1)
    return tuple(multiple * (low + (high - low) * step // steps) for step in range(steps + 1)) if steps else (multiple * low,)


def _subjects(model: nn.Module, item: SolvedSite, workload: Workload, multiple: int) -> list[Subject]:
    runs = runs_of(item.site.tower, workload)
    if isinstance(item.site, AttentionSite):
        return [_block(item.site, run, workload) for run in runs]
    return [subject for run in runs for subject in _linears(model, item, item.site, run, multiple)]


def _block(site: AttentionSite, run: Run, workload: Workload) -> Subject:
    key = site.path, STEP if run.step else PASS
    return Subject(
        attention_name(site, run, workload), spaced(site.min_units, site.num_units), lambda size, calls: calls[key].shaped(site, size)
    )


def _linears(model: Any, item: SolvedSite, site: FFNSite, run: Run, multiple: int) -> list[Subject]:
    """Dense linears, over the inner width where neurons may go, and their factors by the names of the ranks that the site may be given."""
    up, down = (model.get_submodule(f"{site.path}.{name}") for name in (site.names.up, site.names.down))
    d, m = site.hidden_size, site.intermediate_size

    def subject(form: str, sizes: tuple[int, ...], width: Callable[[int], int], make: Callable[[int], nn.Module]) -> Subject:
        return Subject(ffn_name(site, form, run), sizes, lambda size, _: on_noise(make(size).to(up.weight), run.tokens, width(size)))

    widths = (m,) if item.neurons is None else tuple(dict.fromkeys((*spaced(multiple, m, multiple), m)))
    found = [
        subject(UP, widths, lambda _: d, lambda size: nn.Linear(d, size, bias=up.bias is not None)),
        subject(BETWEEN, widths, lambda size: size, lambda _: Between(model.get_submodule(site.path), up.weight, site.gated)),
        subject(DOWN, widths, lambda size: size, lambda size: nn.Linear(size, d, bias=down.bias is not None)),
    ]
    factors: dict[str, tuple[str, int, Callable[[int], nn.Module]]] = {
        "up_rank": (f"{UP} factors", d, lambda rank: LowRankLinear(d, m, rank)),
        "down_rank": (f"{DOWN} factors", m, lambda rank: LowRankLinear(m, d, rank)),
        "joint_rank": (JOINT, d, lambda rank: nn.Sequential(nn.Linear(d, rank, bias=False), nn.Linear(rank, 2 * m))),
    }
    for name in sorted(factors.keys() & set(item.tails or {})):  # a gate's factors are those of an up projection
        form, width, make = factors[name]
        found.append(subject(form, spaced(multiple, max(max_rank(site, name), 1), multiple), lambda _, width=width: width, make))
    return found
