"""How long sites take inside their model, and curves brought to that: alone, a block finds more of its weights in the caches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from infoprune.architecture import AttentionSite, FFNSite
from infoprune.evaluation.cost import Workload
from infoprune.modeling_infoprune import norm_before
from infoprune.site_costs import BETWEEN, DOWN, JOINT, UP, Run, attention_name, ffn_name, runs_of
from infoprune.timing.stopwatch import Work, clock_of, synchronizer
from infoprune.timing.table import Curve

FORMS = (UP, f"{UP} factors", JOINT, BETWEEN, DOWN, f"{DOWN} factors")  # of an FFN


@dataclass(frozen=True)
class Inside:
    """Stopwatches on the sites of a dense model.

    Attributes:
        model: It.
        sites: What is timed.
        seconds: By path and place of the call within an answer: those of every answer so far.
    """

    model: Any
    sites: Sequence[AttentionSite | FFNSite]
    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def work(self, answer: Callable[[], Callable[[], Any]]) -> Work:
        """``answer``, whose sites are timed along the way."""

        def prepare() -> Any:
            call = answer()

            def timed() -> None:
                with self._watched():
                    call()

            return timed

        return prepare

    @contextmanager
    def _watched(self) -> Iterator[None]:
        device = next(self.model.parameters()).device
        clock, sync = clock_of(device), synchronizer(device)
        calls: dict[str, int] = {}
        started: dict[str, float] = {}

        def start(path: str) -> None:
            if path not in started:  # by the first of what reads the site's input
                sync()
                started[path] = clock()

        def end(path: str) -> None:
            sync()
            number = calls[path] = calls.get(path, -1) + 1
            self.seconds.setdefault((path, number), []).append(clock() - started.pop(path))

        with ExitStack() as stack:
            for site in self.sites:
                first, last = _ends(self.model, site)
                for module in first:
                    stack.callback(module.register_forward_pre_hook(lambda *_, path=site.path: start(path)).remove)
                stack.callback(last.register_forward_hook(lambda *_, path=site.path: end(path)).remove)
            yield

    def of(self, site: AttentionSite | FFNSite, run: Run) -> float | None:
        """Median seconds of a site in a run; ``None`` where there was no such call, or none that the clock can see.

        Language models are called once for the prompt and then for every token; a vision tower once for everything, or once per image.
        """
        calls = {call: statistics.median(values) for (path, call), values in self.seconds.items() if path == site.path}
        if site.tower == "vision":
            return sum(calls.values()) or None
        found = [seconds for call, seconds in calls.items() if (call > 0) == run.step]
        return statistics.fmean(found) or None if found else None

    def brought(self, curves: dict[str, Curve], workload: Workload) -> dict[str, Curve]:
        """``curves`` scaled such that dense sites take what they take inside the model; those of one name as in their mean."""
        ratios: dict[str, list[float]] = {}
        for site in self.sites:
            for run in runs_of(site.tower, workload):
                inside = self.of(site, run)
                if inside is None:
                    continue
                if isinstance(site, AttentionSite):
                    names = [attention_name(site, run, workload)]
                    alone = curves[names[0]].at(site.num_units)
                else:
                    names = [name for form in FORMS if (name := ffn_name(site, form, run)) in curves]
                    parts = ((site.num_inputs, UP), (1, BETWEEN), (1, DOWN))
                    alone = sum(times * curves[ffn_name(site, form, run)].at(site.intermediate_size) for times, form in parts)
                for name in names:
                    ratios.setdefault(name, []).append(inside / alone)
        return {name: curve.scaled(statistics.fmean(ratios.get(name, [1.0]))) for name, curve in curves.items()}


def _ends(model: Any, site: AttentionSite | FFNSite) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    """What may run first of a site, its norm among it where that goes with the site, and what runs last."""
    block = model.get_submodule(site.path)
    if isinstance(site, AttentionSite):
        layer = model.get_submodule(site.path.rpartition(".")[0])
        norm = norm_before(layer)
        return [layer.get_submodule(norm), block] if norm else [block], block
    inputs = [site.names.up] + ([site.names.gate] if site.names.gate else [])
    return [block.get_submodule(name) for name in inputs], block.get_submodule(site.names.down)
