"""Measured time as a budget. Nothing here depends on how fast this machine is: tables are made up, or only their form is looked at."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import infoprune
from infoprune.architecture import AttentionSite
from infoprune.compress import compress
from infoprune.decide import decide
from infoprune.decisions import Decisions
from infoprune.errors import BudgetError, InfoPruneError
from infoprune.evaluation.cost import attention_flops, ffn_flops, predicted_flops
from infoprune.evaluation.latency import answering
from infoprune.options import CompressionOptions
from infoprune.plan import FFNDecision
from infoprune.site_costs import FlopCosts, TimeCosts, attention_name, ffn_name, runs_of
from infoprune.solve import solve_sites
from infoprune.speedup import CORRECTIONS, Speed, reach
from infoprune.steps import make_plan, measure
from infoprune.timing import measure as timing
from infoprune.timing.inside import FORMS, Inside
from infoprune.timing.measure import Subject, cost_table, merged, spaced
from infoprune.timing.stopwatch import median_seconds
from infoprune.timing.table import CostTable, Curve, Machine, Wanted, named_in, never_decreasing, read_table, write_table
from infoprune.timing.works import PASS, STEP, Between, calls_of
from test_families import inputs_of, statistics_of

# --- curves and tables -------------------------------------------------------------------------------------------------------------

measured = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8)


@given(measured)
def test_never_decreasing_values_are_the_nearest(values):
    found = never_decreasing(values)
    assert all(b >= a for a, b in itertools.pairwise(found)) and len(found) == len(values)
    assert sum(found) == pytest.approx(sum(values))
    if values == sorted(values):
        assert found == values
    distance = sum((a - b) ** 2 for a, b in zip(found, values, strict=True))
    others = (list(itertools.accumulate(values, max)), [sum(values) / len(values)] * len(values))
    for other in others:
        assert distance <= sum((a - b) ** 2 for a, b in zip(other, values, strict=True)) + 1e-12


@given(measured, st.integers(0, 100), st.integers(0, 100))
def test_curves_pass_through_their_points_and_never_fall(values, a, b):
    curve = Curve.through([3 + 5 * number for number in range(len(values))], values)
    assert [curve.at(size) for size in curve.sizes] == pytest.approx(list(curve.seconds))
    assert curve.at(min(a, b)) <= curve.at(max(a, b)) * (1 + 1e-12)
    assert curve.seconds[0] <= curve.at(a) * (1 + 1e-12) and curve.at(a) <= curve.seconds[-1] * (1 + 1e-12)


def test_between_two_points_a_curve_is_straight():
    curve = Curve(sizes=(8, 16), seconds=(1.0, 3.0))
    assert [curve.at(size) for size in (0, 8, 10, 16, 99)] == [1.0, 1.0, 1.5, 3.0, 3.0]


@pytest.mark.parametrize("bad", [
    {"sizes": (1, 1), "seconds": (1.0, 2.0)}, {"sizes": (2, 1), "seconds": (1.0, 2.0)}, {"sizes": (1, 2), "seconds": (2.0, 1.0)},
    {"sizes": (1, 2), "seconds": (1.0,)}, {"sizes": (), "seconds": ()}, {"sizes": (1,), "seconds": (0.0,)},
    {"sizes": (1,), "seconds": (math.inf,)}, {"sizes": (1,), "seconds": (math.nan,)}, {"sizes": (1,), "seconds": (1.0,), "more": 1},
])  # fmt: skip
def test_curves_that_can_not_be_are_refused(bad):
    with pytest.raises(ValidationError):
        Curve(**bad)


@given(st.integers(1, 64), st.integers(1, 400), st.integers(1, 16))
def test_grids_are_a_few_multiples_from_end_to_end(least, more, multiple):
    most = least + more
    sizes = spaced(least, most, multiple)
    assert 1 <= len(sizes) <= timing.POINTS and list(sizes) == sorted(set(sizes))
    if most // multiple * multiple >= least:
        assert all(size % multiple == 0 for size in sizes)
        assert sizes[0] < least + multiple and sizes[-1] > most - multiple and sizes[0] >= least and sizes[-1] <= most
    else:
        assert sizes == (most,)


def test_blocks_of_one_shape_are_timed_over_all_sizes_that_any_of_them_may_take():
    free, bound = (Subject("attention", tuple(range(least, 4)), lambda size, calls, by=least: by) for least in (0, 1))
    other = Subject("ffn", (8, 16), lambda size, calls: None)
    for order in ((free, bound, other), (bound, free, other)):
        found = merged(order)
        assert {name: subject.sizes for name, subject in found.items()} == {"attention": (0, 1, 2, 3), "ffn": (8, 16)}
        assert found["attention"].work(0, {}) == 0  # by the block that can be without any


def wanted_of(**changes):
    machine = Machine.here(torch.device("cpu"), torch.float32)
    fields = {"machine": machine, "model": "m", "vision_tokens": 3, "prompt_tokens": 4, "answer_tokens": 2, "sizes": {"a": (1, 2)}}
    return Wanted(**fields | changes)


def test_tables_are_kept_and_found_again(tmp_path):
    wanted = wanted_of()
    assert read_table(tmp_path / "cache", wanted) is None
    table = CostTable(wanted=wanted, end_to_end=0.5, curves={"a": Curve(sizes=(1, 2), seconds=(0.1, 0.2))})
    write_table(tmp_path / "cache", table)
    assert read_table(tmp_path / "cache", wanted) == table
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".json"]
    changes = {"threads": wanted.machine.threads + 1} | dict.fromkeys(
        ("processor", "device", "torch", "transformers", "infoprune", "dtype"), "x"
    )
    others = [wanted_of(machine=wanted.machine.model_copy(update={name: value})) for name, value in changes.items()]
    assert changes.keys() == Machine.model_fields.keys()
    for changed in (*others, wanted_of(answer_tokens=3), wanted_of(sizes={"a": (1, 3)}), wanted_of(model="n")):
        assert read_table(tmp_path / "cache", changed) is None


@pytest.mark.parametrize("change", [
    lambda text: "", lambda text: text[:-20], lambda text: text.replace('"version": 2', '"version": 3'), lambda text: "[1, 2]",
    lambda text: text.replace("0.1", "-0.1"), lambda text: text.replace("0.2", "0.05"), lambda text: text.replace("0.5", "NaN"),
    lambda text: text.replace('"version"', '"surprise": 1, "version"'), lambda text: text.replace('"a": {', '"b": {'),
    lambda text: text.replace('"threads": ', '"threads": 9'), lambda text: text.replace("0.1", '"0.1 s"'),
])  # fmt: skip
def test_tables_that_are_stale_or_broken_are_not_believed(tmp_path, change):
    wanted = wanted_of()
    write_table(tmp_path, CostTable(wanted=wanted, end_to_end=0.5, curves={"a": Curve(sizes=(1, 2), seconds=(0.1, 0.2))}))
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    file.write_text(change(text))
    assert file.read_text() != text and read_table(tmp_path, wanted) is None


def test_processors_are_told_apart_also_where_they_have_no_name():
    intel = "processor\t: 0\nmodel name\t: Some CPU @ 2.80GHz\nflags\t\t: fpu\n\nprocessor\t: 1\nmodel name\t: Some CPU @ 2.80GHz\n"
    core = "processor\t: {}\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\nCPU part\t: {}\n\n"
    alike, mixed = core.format(0, "0xd0c") + core.format(1, "0xd0c"), core.format(0, "0xd0c") + core.format(1, "0xd4f")
    assert named_in(intel) == "Some CPU @ 2.80GHz" and named_in("") == ""
    assert named_in(alike) == "CPU implementer 0x41, CPU part 0xd0c" and named_in(mixed).endswith("CPU part 0xd0c, CPU part 0xd4f")


def test_a_table_that_can_not_be_kept_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    write_table(tmp_path / "file", CostTable(wanted=wanted_of(sizes={}), end_to_end=0.5, curves={}))


def test_work_takes_turns():
    order, rounds = [], []

    def work(name):
        return lambda: (order.append(f"{name} prepared"), lambda: order.append(name))[1]

    found = median_seconds([work("a"), work("b")], torch.device("cpu"), repeats=2, warmup=1, after_round=lambda: rounds.append(1))
    assert order == ["a prepared", "a", "b prepared", "b"] * 3 and len(rounds) == 3
    assert len(found) == 2 and min(found) >= 0
    order.clear()
    median_seconds([work("a")], torch.device("cpu"), repeats=50, warmup=1, limit=0.0)
    assert len(order) == 2 * (1 + 5)


@pytest.mark.skipif(sys.platform == "win32", reason="counts the time of threads too coarsely")
def test_what_others_take_of_the_processor_does_not_count():
    (found,) = median_seconds([lambda: lambda: time.sleep(0.05)], torch.device("cpu"), repeats=3, warmup=0)
    assert found < 0.02


# --- what is timed -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_blocks_of_every_width_run_on_what_reaches_them(vlm, questions):
    sites = list(vlm.architecture.attention)
    probe, before = inputs_of(vlm, questions), {name: p.clone() for name, p in vlm.model.named_parameters()}
    logits = vlm.model(**probe).logits
    calls = calls_of(vlm.model, sites, probe, vlm.architecture.family)
    for site in sites:
        for kind in (PASS, STEP) if site.tower == "text" else (PASS,):
            call = calls[site.path, kind]
            tokens = []
            for units in range(site.min_units, site.num_units + 1):
                work = call.shaped(site, units)
                first, second = (work()() for _ in range(2))
                output = first[0] if isinstance(first, tuple) else first
                again = second[0] if isinstance(second, tuple) else second
                assert output.shape[-1] == site.hidden_size and output.shape == again.shape
                if units == site.num_units:
                    torch.testing.assert_close(output, again)  # the cache was as it was found
                tokens.append(output.numel())
            assert len(set(tokens)) == 1
    assert (sites[-1].path, STEP) in calls and (sites[0].path, STEP) not in calls
    assert torch.equal(vlm.model(**probe).logits, logits)
    assert all(torch.equal(p, before[name]) for name, p in vlm.model.named_parameters())
    assert not any(m._forward_pre_hooks for m in vlm.model.modules())


@torch.no_grad()
def test_what_is_between_linears_is_the_blocks_own(vlm, questions):
    seen, hooks = {}, []
    for site in vlm.architecture.ffn:
        for role in ("up", "gate", "down") if site.gated else ("up", "down"):
            name = f"{site.path}.{getattr(site.names, role)}"

            def keep(module, args, output, key=(site.path, role)):
                seen.setdefault(key, (args[0], output))

            hooks.append(vlm.model.get_submodule(name).register_forward_hook(keep))
    vlm.model(**inputs_of(vlm, questions))
    for hook in hooks:
        hook.remove()
    for site in vlm.architecture.ffn:
        up, neurons = seen[site.path, "up"][1], seen[site.path, "down"][0]
        between = Between(vlm.model.get_submodule(site.path), up, site.gated)
        found = between.activation(seen[site.path, "gate"][1]) * up if site.gated else between(up)
        torch.testing.assert_close(found, neurons)
        assert between(up).shape == up.shape


@torch.no_grad()
def test_dense_sites_cost_what_they_take_inside_the_model(vlm, questions):
    probe, sites = inputs_of(vlm, questions), [*vlm.architecture.attention, *vlm.architecture.ffn]
    inside = Inside(vlm.model, sites)
    answering(vlm.model, probe, 3)()  # models may put hooks of their own in place
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in vlm.model.modules())
    for _ in range(3):
        inside.work(lambda: answering(vlm.model, probe, 3))()()
    assert {path for path, _ in inside.seconds} == {site.path for site in sites}
    assert all(len(values) == 3 and min(values) > 0 for values in inside.seconds.values())
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in vlm.model.modules()) == hooks
    *_, workload = measure(vlm, questions)
    workload = dataclasses.replace(workload, answer_tokens=3)
    curves = {}
    for site in sites:
        for run in runs_of(site.tower, workload):
            if isinstance(site, AttentionSite):
                curves[attention_name(site, run, workload)] = Curve(sizes=(site.num_units,), seconds=(1.0,))
            else:
                curves |= {ffn_name(site, form, run): Curve(sizes=(site.intermediate_size,), seconds=(1.0,)) for form in FORMS}
    found, known = inside.brought(curves, workload), {}
    assert found.keys() == curves.keys()
    for site in sites:
        for run in runs_of(site.tower, workload):
            if (seconds := inside.of(site, run)) is None:  # an encoder's, in the steps of its decoder
                continue
            if isinstance(site, AttentionSite):
                known.setdefault((attention_name(site, run, workload), 1), []).append(seconds)
            else:
                for form in FORMS:
                    known.setdefault((ffn_name(site, form, run), site.num_inputs + 2), []).append(seconds)
    for (name, parts), seconds in known.items():
        assert found[name].seconds[0] == pytest.approx(sum(seconds) / len(seconds) / parts)


# --- costs and decisions -----------------------------------------------------------------------------------------------------------


def solved_of(vlm, questions, options):
    statistics = statistics_of(vlm, questions, branches=options.structure != "joint", neurons=options.ffn == "width")
    probe, dense, workload = measure(vlm, questions)
    return solve_sites(vlm.model, vlm.architecture, statistics, options), probe, dense, workload


def made_up(monkeypatch, tmp_path, vlm, solved, probe, workload, seconds, *, rest=0.0):
    """A table whose entries are ``seconds(name, size)``; all but the sites takes ``rest``."""

    def invented(vlm, subjects, sites, wanted, workload, probe, progress):
        curves = {s.name: Curve.through(s.sizes, [seconds(s.name, size) for size in s.sizes]) for s in subjects}
        return CostTable(wanted=wanted, end_to_end=1.0, curves=curves)

    monkeypatch.setattr(timing, "_measured", invented)
    table = cost_table(vlm, solved, workload, probe, multiple=2, folder=tmp_path / "tables")
    costs = TimeCosts(table, workload)
    sites = sum(costs.attention(i.site, i.site.num_units) if isinstance(i.site, AttentionSite) else costs.ffn(i.site, None) for i in solved)
    return table.model_copy(update={"end_to_end": sites + rest}), costs


def by_kind(attention, factors, dense=1.0):
    """Seconds in proportion to ``attention`` per unit, and to ``factors`` per rank; dense linears take ``dense``."""

    def seconds(name, size):
        return 1e-6 + (attention * size if "units of" in name else factors * size if "factors" in name else dense)

    return seconds


def test_flops_cost_what_they_did(vlm, questions):
    *_, workload = measure(vlm, questions)
    costs = FlopCosts(workload)
    for site in vlm.architecture.attention:
        assert [costs.attention(site, k) for k in range(site.num_units + 1)] == [
            attention_flops(site, k, workload) for k in range(site.num_units + 1)
        ]
    for site in vlm.architecture.ffn:
        dense = ffn_flops(site, None, workload)
        assert costs.ffn(site, None) == dense and sum(costs.linears(site)) == pytest.approx(dense)
        assert costs.linears(site) == (site.num_inputs * (dense / (site.num_inputs + 1)), dense / (site.num_inputs + 1))
        assert costs.ffn(site, FFNDecision(down_rank=3)) == ffn_flops(site, FFNDecision(down_rank=3), workload)


@pytest.mark.parametrize("fields", [{}, {"ffn": "low-rank"}, {"heads": "energy"}, {"structure": "best"}, {"allocation": "uniform"}])
def test_what_is_decided_costs_what_is_predicted(gqa_vlm, questions, fields, monkeypatch, tmp_path):
    options = CompressionOptions(flops=0.7, rank_multiple=2, **fields)
    solved, probe, dense, workload = solved_of(gqa_vlm, questions, options)
    decisions = decide(solved, FlopCosts(workload), dense.total, options)
    plan = make_plan(gqa_vlm, decisions, options)
    assert decisions.predicted_cost == pytest.approx(predicted_flops(gqa_vlm.architecture, plan, workload, dense.total), rel=1e-9)
    table, costs = made_up(monkeypatch, tmp_path, gqa_vlm, solved, probe, workload, by_kind(0.5, 0.05))
    faster = dataclasses.replace(options, flops=None, speedup=1.3)
    decisions = decide(solved, costs, table.end_to_end, faster)
    spent = sum(
        costs.attention(s, len(decisions.heads[s.path].keep_units) if s.path in decisions.heads else s.num_units)
        for s in gqa_vlm.architecture.attention
    )
    spent += sum(costs.ffn(s, decisions.ffn.get(s.path)) for s in gqa_vlm.architecture.ffn)
    assert decisions.predicted_cost == pytest.approx(spent)
    if "allocation" not in fields:
        assert decisions.predicted_cost is not None and decisions.predicted_cost <= table.end_to_end / 1.3
    assert make_plan(gqa_vlm, decisions, faster).budget == {"speedup": 1.3}


def test_fewer_neurons_save_what_is_between_the_linears(gqa_vlm, questions, monkeypatch, tmp_path):
    def priced(ffn):
        options = CompressionOptions(speedup=1.5, rank_multiple=2, ffn=ffn)
        solved, probe, _, workload = solved_of(gqa_vlm, questions, options)
        _, costs = made_up(
            monkeypatch, tmp_path / ffn, gqa_vlm, solved, probe, workload, lambda name, size: 100.0 + size if "activation" in name else 1.0
        )
        return costs

    def kept(site, width):
        return FFNDecision(keep_neurons=tuple(range(width)), num_neurons=site.intermediate_size)

    for site in gqa_vlm.architecture.ffn:
        assert priced("low-rank").ffn(site, None) == sum(priced("low-rank").linears(site))  # ranks leave it as it is
        costs = priced("width")
        runs = costs.linears(site)[1]  # passes and steps, at one second a linear
        for width in (2, site.intermediate_size):
            found = costs.ffn(site, kept(site, width))
            assert found == pytest.approx(runs * (site.num_inputs + 1 + 100.0 + width))
        assert costs.ffn(site, None) == costs.ffn(site, kept(site, site.intermediate_size))
        assert costs.ffn(site, kept(site, 0)) == 0


def test_what_the_table_says_is_dear_goes(gqa_vlm, questions, monkeypatch, tmp_path):
    options = CompressionOptions(speedup=1.5, rank_multiple=2, floor=0.0, ffn="low-rank")
    solved, probe, _, workload = solved_of(gqa_vlm, questions, options)
    table, costs = made_up(monkeypatch, tmp_path, gqa_vlm, solved, probe, workload, by_kind(10.0, 1.0))
    heads = decide(solved, costs, table.end_to_end, options)  # any factors take longer than a dense linear
    assert heads.heads and not heads.ffn
    table, costs = made_up(monkeypatch, tmp_path / "2", gqa_vlm, solved, probe, workload, by_kind(0.0, 0.02))
    ranks = decide(solved, costs, table.end_to_end, options)  # blocks take the same however many units they have
    assert ranks.ffn and not ranks.heads


def test_time_is_a_pass_and_steps(gqa_vlm, questions, monkeypatch, tmp_path):
    options = CompressionOptions(speedup=1.5, rank_multiple=2, ffn="low-rank")
    solved, probe, _, workload = solved_of(gqa_vlm, questions, options)
    workload = dataclasses.replace(workload, answer_tokens=4)

    def seconds(name, size):
        return 100.0 if ", step" in name or ", 1 tokens" in name else 1.0

    _, costs = made_up(monkeypatch, tmp_path, gqa_vlm, solved, probe, workload, seconds)
    passes = {"vision": 1.0, "text": 1.0 + 3 * 100.0}
    for site in gqa_vlm.architecture.attention:
        assert costs.attention(site, 1) == passes[site.tower]
    for site in gqa_vlm.architecture.ffn:
        assert costs.linears(site) == (site.num_inputs * passes[site.tower], passes[site.tower])
        assert costs.ffn(site, None) == sum(costs.linears(site))
        inputs = {"joint_rank": 2} if site.gated else {"up_rank": 2}
        assert costs.ffn(site, FFNDecision(**inputs, down_rank=2)) == 2 * passes[site.tower]


@pytest.mark.parametrize("fields", [{"allocation": "uniform"}, {"heads": "random"}])
def test_nothing_is_taken_that_is_no_faster(gqa_vlm, questions, fields, monkeypatch, tmp_path):
    options = CompressionOptions(speedup=1.0001, rank_multiple=2, ffn="low-rank", **fields)
    solved, probe, _, workload = solved_of(gqa_vlm, questions, options)
    table, costs = made_up(monkeypatch, tmp_path, gqa_vlm, solved, probe, workload, lambda name, size: 1.0 + ("factors" in name))
    with pytest.raises(BudgetError, match=r"largest speed-up .* is 1, "):
        decide(solved, costs, table.end_to_end, options)
    table, costs = made_up(
        monkeypatch, tmp_path / "2", gqa_vlm, solved, probe, workload,
        lambda name, size: 2.0 if "factors" in name else 1.0 + ("vision" in name and size > 0),
    )  # fmt: skip
    decisions = decide(solved, costs, table.end_to_end, dataclasses.replace(options, speedup=1.01, floor=0.0, heads="information-loss",
                                                                            allocation="global"))  # fmt: skip
    assert decisions.heads and not decisions.ffn
    assert all(not d.keep_units and "vision" in path for path, d in decisions.heads.items())


FIXED_SHARES = [
    {"allocation": "uniform", "ffn": "low-rank"}, {"allocation": "uniform", "ffn": "width"}, {"heads": "random", "ffn": "low-rank"},
    {"heads": "random", "ffn": "width", "neurons": "random"}, {"allocation": "tolerance", "ffn": "low-rank"},
    {"allocation": "uniform", "heads": "none", "ffn": "low-rank"},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIXED_SHARES)
def test_shares_that_are_set_beforehand_meet_the_budget_all_the_same(gqa_vlm, questions, fields, monkeypatch, tmp_path):
    options = CompressionOptions(speedup=1.25, rank_multiple=2, **fields)
    solved, probe, dense, workload = solved_of(gqa_vlm, questions, options)

    def seconds(name, size):  # a third of every part's time does not fall with its size
        return 1.0 + size * (0.2 if "units of" in name else 0.06 if "factors" in name else 0.03)

    table, costs = made_up(monkeypatch, tmp_path, gqa_vlm, solved, probe, workload, seconds)
    found = decide(solved, costs, table.end_to_end, options)
    assert found.predicted_cost is not None and found.predicted_cost <= table.end_to_end / 1.25 * (1 + 1e-9)
    for share in (0.7, 0.8, 0.9):
        counted = dataclasses.replace(options, speedup=None, flops=share)
        found = decide(solved, FlopCosts(workload), dense.total, counted)
        assert found.predicted_cost is not None and found.predicted_cost <= share * dense.total * (1 + 1e-9)
    with pytest.raises(BudgetError, match="smallest share") as caught:
        decide(solved, FlopCosts(workload), dense.total, dataclasses.replace(options, speedup=None, flops=1e-4))
    least = float(str(caught.value).split("reaches is ")[1].split(". ")[0])
    decide(solved, FlopCosts(workload), dense.total, dataclasses.replace(options, speedup=None, flops=least))


@pytest.mark.parametrize("allocation", ["tolerance", "effective-rank"])
def test_rules_for_ranks_take_no_factors_that_are_no_faster(gqa_vlm, questions, allocation, monkeypatch, tmp_path):
    options = CompressionOptions(speedup=1.05, rank_multiple=2, ffn="low-rank", allocation=allocation, heads="none", floor=0.0)
    solved, probe, _, workload = solved_of(gqa_vlm, questions, options)
    width = gqa_vlm.architecture.ffn[0].hidden_size

    def seconds(name, size):  # factors of the vision tower take longer than its linears, whatever their rank
        slow = name.startswith(("up", "down")) and f"stream of {width}" in name
        return 5.0 + 0.1 * size if slow and "factors" in name else 1.0 if slow else 1e-3 + 0.05 * size

    vision = {s.hidden_size for s in gqa_vlm.architecture.ffn if s.tower == "vision"}
    text = {s.hidden_size for s in gqa_vlm.architecture.ffn if s.tower == "text"}
    assert vision == {width} and width not in text
    table, costs = made_up(monkeypatch, tmp_path, gqa_vlm, solved, probe, workload, seconds)
    found = decide(solved, costs, table.end_to_end, options)
    assert found.ffn and not any("vision" in path for path in found.ffn)


def test_nothing_to_cut_is_told(gqa_vlm, questions):
    *_, workload = measure(gqa_vlm, questions)
    with pytest.raises(BudgetError, match="nothing in this model that could be cut"):
        decide([], FlopCosts(workload), 1e9, CompressionOptions(flops=0.5))


def test_a_speed_up_out_of_reach_says_the_largest(gqa_vlm, questions, monkeypatch, tmp_path):
    options = CompressionOptions(speedup=50, rank_multiple=2, ffn="low-rank")
    solved, probe, _, workload = solved_of(gqa_vlm, questions, options)
    table, costs = made_up(monkeypatch, tmp_path, gqa_vlm, solved, probe, workload, by_kind(0.5, 0.02), rest=3.0)
    with pytest.raises(BudgetError, match=r"speedup=50 is out of reach: the largest speed-up .* is \d") as caught:
        decide(solved, costs, table.end_to_end, options)
    largest = float(str(caught.value).split("machine is ")[1].split(", ")[0])
    found = decide(solved, costs, table.end_to_end, dataclasses.replace(options, speedup=largest))
    assert found.predicted_cost is not None and found.predicted_cost <= table.end_to_end / largest
    with pytest.raises(BudgetError):
        decide(solved, costs, table.end_to_end, dataclasses.replace(options, speedup=largest + 0.002))


@pytest.mark.parametrize("fields", [{"speedup": 1.0}, {"speedup": 0.5}, {"speedup": math.inf}, {"speedup": math.nan},
    {"speedup": 2.0, "flops": 0.5}, {"speedup": 2.0, "max_drop": 1.0}, {"speedup": 2.0, "heads": "trained"}])  # fmt: skip
def test_bad_speed_ups_are_refused(fields):
    with pytest.raises(InfoPruneError):
        CompressionOptions(**fields)


# --- correction --------------------------------------------------------------------------------------------------------------------


def reached(asked, measured, *, limit=math.inf):
    """``reach`` where the parts take exactly what they should and the whole does not; budgets in the order they were tried."""
    budgets, notes = [], []
    cut: Any = lambda decisions: decisions.predicted_cost  # noqa: E731 - stands in for a model, of which nothing is looked at

    def decided(budget):
        if budget > limit:
            raise BudgetError("out of reach")
        budgets.append(budget)
        return Decisions({}, {}, 0.0, 1 / budget)

    def timed(cost: Any):
        return measured(1 / cost), 1.0

    model, decisions, speed = reach(asked, 1.0, decided, cut, timed, notes.append)
    assert model == decisions.predicted_cost == 1 / speed.attempts[speed.kept].budget
    assert Speed.from_dict(json.loads(json.dumps(speed.as_dict()))) == speed
    return speed, budgets, notes


def test_a_hit_is_not_corrected():
    speed, budgets, notes = reached(1.8, lambda s: 0.97 * s)
    assert budgets == [1.8] and speed.kept == 0 and len(notes) == 1
    assert speed.as_dict()["measured"] == pytest.approx(0.97 * 1.8) and speed.as_dict()["predicted"] == pytest.approx(1.8)


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_miss_is_corrected_both_ways(factor):
    speed, budgets, _ = reached(1.8, lambda s: factor * s)
    assert budgets == pytest.approx([1.8, 1.8 / factor]) and speed.kept == 1
    assert speed.attempts[1].measured == pytest.approx(1.8)


def test_a_miss_that_stays_is_told_and_the_nearest_cut_kept():
    speed, budgets, notes = reached(1.8, lambda s: min(s, 1.5))
    assert len(budgets) == 1 + CORRECTIONS and "was missed" in notes[-1]
    assert speed.attempts[speed.kept].measured == 1.5
    speed, budgets, notes = reached(1.8, lambda s: 0.8 * s, limit=2.0)
    assert len(budgets) == 1 and speed.kept == 0 and any("no further correction" in note for note in notes)
    with pytest.raises(BudgetError):
        reached(1.8, lambda s: s, limit=1.5)
    answers = iter([1.6, 2.0, 1.7])  # too slow, fast enough, too slow: what was asked for counts first
    speed, _, notes = reached(1.8, lambda s: next(answers))
    assert speed.kept == 1 and "was missed" not in notes[-1]


def test_cuts_in_large_pieces_are_timed_once_and_the_miss_is_told():
    notes = []
    cut: Any = lambda decisions: decisions.predicted_cost  # noqa: E731 - stands in for a model
    decided = lambda budget: Decisions({}, {}, 0.0, 1 / (2.0 if budget > 1.2 else 1.1))  # noqa: E731
    _, _, speed = reach(1.3, 1.0, decided, cut, lambda cost: (1 / cost, 1.0), notes.append)
    assert [attempt.measured for attempt in speed.attempts] == pytest.approx([2.0, 1.1])  # the correction goes below what lies between
    assert speed.kept == 0 and "2.00 times faster where 1.3 was asked for" in notes[-1]
    notes.clear()
    _, _, speed = reach(1.3, 1.0, lambda budget: Decisions({}, {}, 0.0, 0.5), cut, lambda cost: (1 / cost, 1.0), notes.append)
    assert len(speed.attempts) == 1 and any("pieces too large" in note for note in notes)


def test_a_correction_that_memory_is_not_enough_for_keeps_the_cut_before_it():
    notes, cuts = [], []

    def cut(decisions):
        cuts.append(decisions.predicted_cost)
        if len(cuts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cuts[0]

    def decided(budget):
        return Decisions({}, {}, 0.0, 1 / budget)

    model, _, speed = reach(1.8, 1.0, decided, cut, lambda cost: (0.8 / cost, 1.0), notes.append)
    assert model == cuts[0] and len(speed.attempts) == 1 and "memory is not enough" in notes[1]
    with pytest.raises(torch.OutOfMemoryError):  # the first one
        reach(1.8, 1.0, decided, cut, lambda cost: (0.8 / cost, 1.0), notes.append)


# --- the whole ---------------------------------------------------------------------------------------------------------------------


def test_compress_for_a_speed_up(gqa_vlm, questions, monkeypatch, tmp_path):
    monkeypatch.setenv("INFOPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "REPEATS", 5)
    before = {name: p.clone() for name, p in gqa_vlm.model.named_parameters()}
    result = compress(gqa_vlm, questions, speedup=1.0005, rank_multiple=2, ffn="low-rank", in_place=True)
    assert all(torch.equal(p, before[name]) for name, p in gqa_vlm.model.named_parameters())
    report = result.as_dict()["speedup"]
    assert {"asked", "predicted", "measured", "dense_ms", "compressed_ms", "attempts", "kept"} == report.keys()
    assert report["asked"] == 1.0005 and 1 <= len(report["attempts"]) <= 1 + CORRECTIONS
    plan = result.vlm.plan
    assert plan is not None and plan.budget == {"speedup": 1.0005} and (plan.heads or plan.ffn)
    assert result.flops_ratio < 1
    (file,) = (tmp_path / "cache" / "timing").iterdir()
    table = CostTable.model_validate_json(file.read_text())
    assert any("units of" in name for name in table.curves) and any("factors" in name for name in table.curves)
    infoprune.save(result.vlm, tmp_path / "out", probe=result.probe, extra=result.as_dict())
    assert "end to end" in (tmp_path / "out" / "README.md").read_text()
