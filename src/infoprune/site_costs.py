"""What sites cost under a decision: counted FLOPs, or seconds that a table of this machine holds. Deciding knows no more of either."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from infoprune.architecture import AttentionSite, FFNSite, TowerName
from infoprune.evaluation.cost import Workload, attention_flops, ffn_flops
from infoprune.plan import FFNDecision
from infoprune.timing.table import CostTable


class SiteCosts(Protocol):
    """Costs of sites for one example, in a unit that adds up."""

    def attention(self, site: AttentionSite, kept: int) -> float:
        """Of an attention block with ``kept`` units."""
        ...

    def ffn(self, site: FFNSite, decision: FFNDecision | None) -> float:
        """Of an FFN's linears under a decision."""
        ...

    def linears(self, site: FFNSite) -> tuple[float, float]:
        """Of a dense FFN's input linears, and of its down projection; together its dense cost."""
        ...


@dataclass(frozen=True)
class FlopCosts:
    """FLOPs over a workload."""

    workload: Workload

    def attention(self, site: AttentionSite, kept: int) -> float:
        """FLOPs of an attention block with ``kept`` units."""
        return attention_flops(site, kept, self.workload)

    def ffn(self, site: FFNSite, decision: FFNDecision | None) -> float:
        """FLOPs of an FFN under a decision."""
        return ffn_flops(site, decision, self.workload)

    def linears(self, site: FFNSite) -> tuple[float, float]:
        """The same for every linear, all having as many weights."""
        one = ffn_flops(site, None, self.workload) / (site.num_inputs + 1)
        return site.num_inputs * one, one


@dataclass(frozen=True)
class TimeCosts:
    """Seconds over a workload, looked up in a table: vision sites run once, text sites over the prompt and then token by token."""

    table: CostTable
    workload: Workload

    def attention(self, site: AttentionSite, kept: int) -> float:
        """Seconds of an attention block with ``kept`` units."""
        runs = runs_of(site.tower, self.workload)
        return sum(run.times * self.table.curves[attention_name(site, run, self.workload)].at(kept) for run in runs)

    def ffn(self, site: FFNSite, decision: FFNDecision | None) -> float:
        """Seconds of an FFN's linears under a decision, and of what is between them where its width may change."""
        if decision is not None and decision.keep_neurons is not None:
            width = len(decision.keep_neurons)
            return self._of_width(site, width) if width else 0.0
        if decision is None:
            return self._of_width(site, site.intermediate_size)
        ranks = {} if decision is None else decision.ranks
        down = self._linear(site, DOWN, ranks.get("down_rank"))
        if "joint_rank" in ranks:
            return down + self._seconds(site, JOINT, ranks["joint_rank"])
        inputs = ("up_rank", "gate_rank")[: site.num_inputs]
        return down + sum(self._linear(site, UP, ranks.get(name)) for name in inputs)

    def _of_width(self, site: FFNSite, width: int) -> float:
        between = self._seconds(site, BETWEEN, width) if self._may_narrow(site) else 0.0
        return site.num_inputs * self._seconds(site, UP, width) + between + self._seconds(site, DOWN, width)

    def linears(self, site: FFNSite) -> tuple[float, float]:
        """Seconds of a dense FFN's input linears, and of its down projection."""
        return site.num_inputs * self._linear(site, UP, None), self._linear(site, DOWN, None)

    def _linear(self, site: FFNSite, role: str, rank: int | None) -> float:
        return self._seconds(site, role, site.intermediate_size) if rank is None else self._seconds(site, f"{role} factors", rank)

    def _may_narrow(self, site: FFNSite) -> bool:
        return len(self.table.curves[ffn_name(site, BETWEEN, runs_of(site.tower, self.workload)[0])].sizes) > 1

    def _seconds(self, site: FFNSite, form: str, size: int) -> float:
        return sum(run.times * self.table.curves[ffn_name(site, form, run)].at(size) for run in runs_of(site.tower, self.workload))


# --- names of what a table holds ---------------------------------------------------------------------------------------------------

UP, DOWN, JOINT = "up", "down", "gate and up factors"
BETWEEN = "activation"  # of as many neurons, and the product with the gate; no cost where neurons stay: ranks leave it as it is


@dataclass(frozen=True)
class Run:
    """How often a tower's layers run for one example, and on how many tokens at once."""

    step: bool
    tokens: int
    times: int


def runs_of(tower: TowerName, workload: Workload) -> tuple[Run, ...]:
    """The runs of one example: one pass over image or prompt, and in the language model a step for every token after the first."""
    if tower == "vision":
        return (Run(False, workload.vision_tokens, 1),)
    steps = workload.answer_tokens - 1
    return (Run(False, workload.prompt_tokens, 1), *([Run(True, 1, steps)] if steps else []))


def attention_name(site: AttentionSite, run: Run, workload: Workload) -> str:
    """Blocks of the same name take the same time; the FLOPs tell windows and cross-attention apart."""
    shape = f"{site.num_units} units of {site.unit_width}, keys of {site.head_dim}, stream of {site.hidden_size}"
    what = f"{site.tower} {site.names.attention}: {shape}, {workload.attention[site.path]} FLOPs"
    return f"{what}, {'step' if run.step else 'pass'}"


def ffn_name(site: FFNSite, form: str, run: Run) -> str:
    """Linears of the same name take the same time."""
    return f"{form}: stream of {site.hidden_size}, inner width {site.intermediate_size}, {run.tokens} tokens"
