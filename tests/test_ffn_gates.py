from __future__ import annotations

import sys

import pytest
import torch

import infoprune
from conftest import ALL, built
from infoprune.decide import decide
from infoprune.errors import BudgetError, InfoPruneError
from infoprune.evaluation.cost import ffn_flops
from infoprune.learned import with_choice
from infoprune.options import CompressionOptions
from infoprune.packing import answer_logits, batches
from infoprune.plan import FFNDecision
from infoprune.progress import SILENT
from infoprune.site_costs import FlopCosts
from infoprune.solve import solve_sites
from infoprune.steps import apply_decisions, calibrated, measure
from infoprune.training.data import hold_out
from infoprune.training.ffn_gates import STEEPNESS, FFNGates, FFNPart, ffn_parts, sizes_of
from infoprune.training.gates import HeadGates
from infoprune.training.heads import Choice, check_agreement, masked_logits
from infoprune.training.options import TrainingOptions
from infoprune.training.run import TrainingRun
from test_training import KINDS, QUICK, stopped_once, weights

GATED = QUICK | {"gate_ffn": True}
STRUCTURES = [
    {"ffn": "low-rank"},
    {"ffn": "low-rank", "structure": "separate", "shrinkage": 0.0},
    {"ffn": "low-rank", "centred": False},
    {"ffn": "width"},
    {"ffn": "width", "centred": False},
]


@pytest.fixture(params=[tiny for tiny in ALL if tiny.name in KINDS], ids=lambda tiny: tiny.name)
def vlm(request, monkeypatch):
    return built(request.param, monkeypatch)


def gated(vlm, questions, **fields):
    """All that gates on FFNs are made of, with heads that stay."""
    options = CompressionOptions(**{"flops": 0.8, "heads": "none", "rank_multiple": 2, "repair": False} | fields)
    statistics, inputs = calibrated(vlm, questions, options.needs)
    _, dense, workload = measure(vlm, questions)
    solved = solve_sites(vlm.model, vlm.architecture, statistics, options)
    parts = ffn_parts(vlm.model, solved, statistics, options, FlopCosts(workload))
    return options, statistics, inputs, solved, dense, workload, parts


@pytest.mark.parametrize("fields", STRUCTURES, ids=lambda fields: ", ".join(f"{k}={v}" for k, v in fields.items()))
def test_closed_gates_are_the_cut_ffns(vlm, questions, fields):
    options, statistics, inputs, solved, dense, workload, parts = gated(vlm, questions, **fields)
    decisions = decide(solved, FlopCosts(workload), dense.total, options)
    assert decisions.ffn
    small = apply_decisions(vlm, decisions, options, statistics, inputs)
    choice = Choice({}, sizes_of(decisions.ffn))
    masked = masked_logits(vlm.model, HeadGates([]), {}, choice, inputs[0], "least-squares", FFNGates(parts))
    with torch.no_grad():
        assert check_agreement(masked, answer_logits(small.model, inputs[0])) < 1e-4
        with pytest.raises(InfoPruneError, match="differs"):
            check_agreement(masked, answer_logits(vlm.model, inputs[0]))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("ffn", ["low-rank", "width"])
def test_open_gates_are_the_dense_model_and_nothing_stays_behind(vlm, questions, ffn):
    parts = gated(vlm, questions, ffn=ffn)[-1]
    batch = next(iter(batches(vlm.encoder, questions)))[0]
    dense = answer_logits(vlm.model, batch)
    gates, before = FFNGates(parts), hooks(vlm.model)
    with gates.attached(vlm.model):
        assert torch.equal(answer_logits(vlm.model, batch), dense)
        gates.close_({})
        torch.testing.assert_close(answer_logits(vlm.model, batch), dense, atol=1e-4, rtol=1e-4)
        gates.location.fill_(0.3 * STEEPNESS)
        gates.sample_("a")
        assert not torch.allclose(answer_logits(vlm.model, batch), dense, atol=1e-3)
        with gates.opened():
            assert torch.equal(answer_logits(vlm.model, batch), dense)
    assert torch.equal(answer_logits(vlm.model, batch), dense)
    assert hooks(vlm.model) == before


@pytest.mark.parametrize("fields", STRUCTURES[:4:3], ids=["low-rank", "width"])
def test_costs_are_the_flops_of_the_sizes(vlm, questions, fields):
    workload, parts = gated(vlm, questions, **fields)[-2:]
    for path in {part.path for part in parts}:
        own, site = [part for part in parts if part.path == path], vlm.architecture.site(path)
        for size in (2, 4):
            for part in own:
                names = dict.fromkeys(part.names, size)
                width = {"keep_neurons": tuple(range(size)), "num_neurons": site.intermediate_size}
                decision = FFNDecision(**(width if "keep_neurons" in names else names))
                saved = ffn_flops(site, None, workload) - ffn_flops(site, decision, workload)
                assert float(part.costs[size:].sum()) == pytest.approx(saved)
        assert sum(float(part.costs.sum()) for part in own) == pytest.approx(ffn_flops(site, None, workload))


def random_gates(seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for number, (directions, top) in enumerate([(24, 17), (24, 20), (64, 40), (16, 11)]):
        costs = torch.full((top + 1,), 10.0 * (number + 1), dtype=torch.float64)
        costs[top] = 3.0
        parts.append(FFNPart(f"ffn.{number}", "text", ("up_rank",), torch.arange(directions).clamp(max=top), costs, ()))
    gates = FFNGates(parts)
    with torch.no_grad():
        gates.location.copy_(STEEPNESS * (0.2 + 0.7 * torch.rand(len(parts), generator=generator)))
    return gates


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("multiple", [1, 4])
def test_sizes_fill_the_budget(share, multiple):
    gates = random_gates()
    budget = share * gates.dense
    sizes = gates.within(budget, multiple)
    assert budget - multiple * 40 < gates.cost_of(sizes) <= budget
    assert all(size["up_rank"] % multiple == 0 for size in sizes.values())
    before = {part.path: location for part, location in zip(gates.parts, gates.location.tolist(), strict=True)}
    found = sorted((sizes.get(p.path, {}).get("up_rank", p.steps) / p.steps, before[p.path]) for p in gates.parts)
    if share == 0.5 and multiple == 1:  # one shift keeps their order
        assert [location for _, location in found] == sorted(before.values())
    with pytest.raises(BudgetError, match="smallest FFNs"):
        gates.within(4 * multiple, multiple)


def test_expected_cost_is_the_mean_over_draws_and_its_gradient_opens():
    gates = random_gates()
    drawn = []
    with torch.no_grad():
        for number in range(3000):
            gates.sample_(f"{number}")
            open_ = [z > 0.5 for z in gates.values]
            first = [torch.stack([o[p.step == s].any() for s in range(p.steps)]) for p, o in zip(gates.parts, open_, strict=True)]
            drawn.append(sum(float(p.costs[f].sum()) for p, f in zip(gates.parts, first, strict=True)))
    assert float(gates.cost().detach()) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)
    gates.cost().backward()
    assert (gates.location.grad > 0).all()


def test_a_draw_is_a_size_with_a_soft_edge():
    gates = random_gates()
    gates.sample_("a")
    for part, z in zip(gates.parts, gates.values, strict=True):
        by_step = z[torch.argsort(part.step, stable=True)]
        assert (by_step.diff() <= 0).all() and (z[part.step == part.steps - 1].unique().numel() == 1)
    held = [z.clone() for z in gates.values]
    gates.sample_("a")
    assert all(torch.equal(a, b) for a, b in zip(held, gates.values, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(held, gates.sample_("b") or gates.values, strict=True))


def test_heads_and_ffns_draw_apart(gqa_vlm, questions, monkeypatch):
    seeds = {}
    for kind in (HeadGates, FFNGates):
        real = kind.sample_
        monkeypatch.setattr(
            kind, "sample_", lambda self, seed, real=real, kind=kind: seeds.setdefault(kind, []).append(seed) or real(self, seed)
        )
    infoprune.compress(gqa_vlm, questions, **QUICK, ffn="width", gate_ffn=True)
    assert seeds[HeadGates] and not {*seeds[HeadGates]} & {*seeds[FFNGates]}


def test_sizes_that_were_started_from_come_back(gqa_vlm, questions):
    for fields in STRUCTURES[:4]:
        options, _, _, solved, dense, workload, parts = gated(gqa_vlm, questions, **fields)
        decisions = decide(solved, FlopCosts(workload), dense.total, options)
        gates = FFNGates(parts, sizes_of(decisions.ffn))
        sizes = {(part.path, part.names): part.size_of(x, 1) for part, x in zip(parts, gates.location.tolist(), strict=True)}
        asked = sizes_of(decisions.ffn)
        assert sizes == {(p.path, p.names): asked.get(p.path, {}).get(p.names[0], p.steps) for p in parts}
        settled = decide(with_choice(solved, Choice({}, asked), options), FlopCosts(workload), dense.total, options)
        assert settled.ffn == decisions.ffn and settled.predicted_cost == pytest.approx(decisions.predicted_cost)
        assert settled.predicted_loss == pytest.approx(decisions.predicted_loss)


@pytest.mark.parametrize("flops", [0.6, 0.7, 0.75, 0.8])
def test_gates_that_have_not_moved_choose_what_they_start_from(gqa_vlm, questions, monkeypatch, flops):
    given = GATED | {"ffn": "width", "flops": flops, "gate_steps": 1, "gate_rate": 1e-9}
    free = infoprune.compress(gqa_vlm, hold_out(questions, 0)[0], **given | {"heads": "information-loss", "gate_ffn": False}).vlm.plan
    monkeypatch.setattr(TrainingRun, "best_cut", lambda self, cut, names: ("trained", {}))
    found = infoprune.compress(gqa_vlm, questions, **given).vlm.plan
    assert found.heads == free.heads
    sizes, wanted = sizes_of(found.ffn), sizes_of(free.ffn)
    assert sizes.keys() == wanted.keys()
    assert all(abs(sizes[path]["keep_neurons"] - wanted[path]["keep_neurons"]) <= 2 for path in sizes)  # one multiple


@pytest.mark.parametrize("ffn", ["low-rank", "width"])
def test_sizes_are_learned_with_the_heads(vlm, questions, ffn, monkeypatch):
    real = TrainingRun.best_cut
    monkeypatch.setattr(TrainingRun, "best_cut", lambda self, cut, names: ("trained", real(self, cut, names)[1]))
    result = infoprune.compress(vlm, questions, ffn=ffn, **GATED | {"gate_rate": 2.0, "flops": 0.8})
    heads = result.training["heads"]
    assert 0.75 < result.flops_ratio <= 0.8
    assert heads["agreement"] < 1e-4 and "sizes" in heads and {"trained", "start"} <= set(heads["cut"])
    assert sizes_of(result.vlm.plan.ffn) == heads["sizes"]


def test_sizes_move_where_they_are_needed(gqa_vlm, questions):
    """Where the objective asks for one FFN's output alone, that FFN ends larger than it started, at the cost of the others."""
    parts = gated(gqa_vlm, questions, ffn="width", towers=("text",))[-1]
    uniform = {part.path: {"keep_neurons": part.steps // 2} for part in parts}
    needed = parts[0].path  # what comes behind it does not change what it writes
    gates = FFNGates(parts, uniform)
    optimizer = torch.optim.Adam([gates.location], lr=1.0)
    batch = next(iter(batches(gqa_vlm.encoder, questions)))[0]
    outputs = []
    hook = gqa_vlm.model.get_submodule(needed).register_forward_hook(lambda m, a, out: outputs.append(out))
    with torch.no_grad():
        answer_logits(gqa_vlm.model, batch)
    wanted = outputs.pop().detach()
    target = float(gates.cost().detach())
    with gates.attached(gqa_vlm.model):
        for step in range(40):
            gates.sample_(f"{step}")
            answer_logits(gqa_vlm.model, batch)
            lost = (outputs.pop() - wanted).square().sum() / wanted.square().sum()
            loss = lost + 100 * (gates.cost().float() / target - 1).square()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    hook.remove()
    sizes = gates.within(target, 1)
    kept = {part.path: sizes.get(part.path, {}).get("keep_neurons", part.steps) / part.steps for part in parts}
    assert kept[needed] > 0.55 and min(kept.values()) < 0.5


def test_interrupted_gates_end_with_the_same_weights(gqa_vlm, questions, tmp_path, monkeypatch):
    options = GATED | {"ffn": "low-rank", "gate_rate": 2.0}
    whole = infoprune.compress(gqa_vlm, questions, **options)
    resumed = stopped_once(monkeypatch, ("gates", 5), lambda: infoprune.compress(gqa_vlm, questions, work=tmp_path / "work", **options))
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)
    assert resumed.training["heads"]["sizes"] == whole.training["heads"]["sizes"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"heads": "information-loss", "recovery": "full"}, "gate_ffn needs heads=trained, not heads=information-loss"),
        ({"ffn": "none"}, "gate_ffn needs ffn=low-rank or ffn=width, not ffn=none"),
        ({"structure": "best"}, "gate_ffn needs structure=joint or separate, not structure=best"),
        ({"allocation": "uniform"}, "gate_ffn needs allocation=global, not allocation=uniform"),
        ({"shard": True}, "gate_ffn excludes shard"),
        ({"gate_lora": 4}, "gate_ffn excludes gate_lora"),
        ({"gate_cost": "time"}, "gate_ffn excludes gate_cost"),
        ({"attention_share": 0.5}, "gate_ffn excludes attention_share"),
    ],
)
def test_what_gates_on_ffns_exclude_is_told_before_anything_runs(gqa_vlm, questions, monkeypatch, fields, told):
    monkeypatch.setattr(sys.modules["infoprune.compress"], "calibrated", lambda *a: pytest.fail("calibrated"))
    with pytest.raises(InfoPruneError, match=told):
        infoprune.compress(gqa_vlm, questions, progress=SILENT, **GATED | fields)


def test_options_of_gates_on_ffns():
    assert not TrainingOptions().gate_ffn and TrainingOptions(gate_ffn=True).gate_ffn
