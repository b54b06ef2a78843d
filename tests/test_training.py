from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import infoprune
from conftest import ALL, built
from infoprune.calibrate import calibrate
from infoprune.cli import compress as compress_verb
from infoprune.cli import evaluate as evaluate_verb
from infoprune.cli.device import own_device
from infoprune.compress import logs_folder
from infoprune.criteria.heads import Block, Removal, block_of, compensate, removal_loss
from infoprune.decisions import Decisions
from infoprune.errors import BudgetError, CalibrationError, CheckpointError, DataError, InfoPruneError
from infoprune.evaluation.cost import Workload, attention_flops
from infoprune.learned import unit_percentiles
from infoprune.options import CompressionOptions
from infoprune.packing import answer_logits, batches
from infoprune.plan import CompressionPlan, HeadDecision
from infoprune.progress import SILENT
from infoprune.solve import SolvedSite, block_of_model
from infoprune.steps import apply_decisions, measure
from infoprune.training import objective
from infoprune.training.costs import Costs, flop_costs, time_costs
from infoprune.training.data import Stream, hold_out, images_of_rows, rows_of
from infoprune.training.gates import HeadGates, deterministic_gate, hard_concrete, open_probability, start_locations
from infoprune.training.heads import BestGates, Choice, GateStage, binarise, check_agreement, masked_logits
from infoprune.training.loop import Processes, check_finite, one_cycle, wants_bfloat16
from infoprune.training.options import TrainingOptions
from infoprune.training.recovery import (
    Best,
    RecoveryStage,
    Validated,
    add_lora,
    cut_towers,
    layer_weights,
    relative_groups,
    typical_magnitude,
    validated,
)
from infoprune.training.run import TrainingRun, _is_test, split
from infoprune.training.state import WorkFolder, save_state
from infoprune.training.structure import Channel, closed, dense_structure, structure_of
from infoprune.training.thinned import Thinning
from test_families import inputs_of, statistics_of
from tiny_models import examples

QUICK = {
    "gate_steps": 8,
    "recovery_steps": 6,
    "images_per_step": 2,
    "gate_images_per_step": 2,
    "evaluate_every": 3,
    "refresh": 3,
    "precision": "fp32",
}
QUICK |= {"checkpoint_every": 2, "examples": 6, "rank_multiple": 2, "heads": "trained", "flops": 0.7}


# One family of every kind that training could tell apart: what its heads and layers are made of, and whether rows are shared.
KINDS = ("llava-clip-llama-mha", "llava-dinov2-mistral-mqa", "idefics3", "gemma3", "qwen2.5-vl", "mllama", "blip2-opt", "ovis2")


@pytest.fixture(params=[tiny for tiny in ALL if tiny.name in KINDS], ids=lambda tiny: tiny.name)
def vlm(request, monkeypatch):
    return built(request.param, monkeypatch)


def blocks_of(vlm, questions):
    statistics = statistics_of(vlm, questions)
    return {
        s.path: block_of(s, statistics.sites[s.path], vlm.model.get_submodule(f"{s.path}.{s.names.out}").weight.detach())
        for s in vlm.architecture.attention
    }


# --- gates -------------------------------------------------------------------------------------------------------------------------


def test_open_probability_against_monte_carlo():
    log_alpha = torch.tensor([-3.0, -1.6, 0.0, 2.5])
    torch.manual_seed(0)
    z = hard_concrete(log_alpha.expand(200_000, 4), torch.rand(200_000, 4).clamp(1e-6, 1 - 1e-6))
    assert z.min() == 0 and z.max() == 1
    torch.testing.assert_close((z > 0.5).float().mean(0), open_probability(log_alpha), atol=4e-3, rtol=0)


def test_test_time_gates_reach_both_ends():
    assert deterministic_gate(torch.tensor([-9.0, 0.0, 9.0])).tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_draws_depend_on_the_seed_alone(vlm):
    gates = HeadGates(list(vlm.architecture.attention), initial=0.0)
    first = gates.sample_("a")
    torch.rand(3)
    again = {path: z.clone() for path, z in gates.sample_("a").items()}
    assert all(torch.equal(first[path], again[path]) for path in first)
    other = gates.sample_("b")
    assert any(not torch.equal(first[path], other[path]) for path in first)


@torch.no_grad()
def test_open_gates_are_the_dense_model_and_nothing_stays_behind(vlm, questions):
    inputs = inputs_of(vlm, questions)
    dense = vlm.model(**inputs).logits
    blocks = blocks_of(vlm, questions)
    gates = HeadGates(list(vlm.architecture.attention))
    for site in gates.sites:
        gates.connect_(site.path, Channel.of(blocks[site.path], "least-squares"))
    with gates.attached(vlm.model):
        assert torch.equal(vlm.model(**inputs).logits, dense)
        gates.values = {site.path: torch.ones(site.num_units) for site in gates.sites}
        torch.testing.assert_close(vlm.model(**inputs).logits, dense)
        gates.values = {site.path: torch.zeros(site.num_units) for site in gates.sites}
        closed = vlm.model(**inputs).logits
        assert not torch.allclose(closed, dense, atol=1e-3)
        with gates.opened():
            assert torch.equal(vlm.model(**inputs).logits, dense)
    assert torch.equal(vlm.model(**inputs).logits, dense)


@pytest.mark.parametrize("compensation", ["least-squares", "mean", "none"])
def test_masked_equals_compacted(vlm, questions, compensation):
    statistics = statistics_of(vlm, questions)
    batch = next(iter(batches(vlm.encoder, questions)))[0]
    blocks = blocks_of(vlm, questions)
    sites = list(vlm.architecture.attention)
    kept = {site.path: list(range(0, site.num_units, 2)) for site in sites}
    heads = {s.path: HeadDecision(keep_units=tuple(kept[s.path]), num_units=s.num_units, compensate=compensation) for s in sites}
    options = CompressionOptions(flops=0.5, repair=False, compensate=compensation)
    small = apply_decisions(vlm, Decisions(heads, {}, 0.0), options, statistics, [batch])
    masked = masked_logits(vlm.model, HeadGates(sites), blocks, Choice(kept), batch, compensation)
    with torch.no_grad():
        assert check_agreement(masked, answer_logits(small.model, batch)) < 1e-4
        with pytest.raises(InfoPruneError, match="differs"):
            check_agreement(masked, answer_logits(vlm.model, batch))


# --- structure ---------------------------------------------------------------------------------------------------------------------


def test_closed_gates_leave_what_compensation_leaves(gqa_vlm, questions):
    for block in blocks_of(gqa_vlm, questions).values():
        kept = list(range(1, block.site.num_units))
        contexts = block.mean + torch.randn(7, len(block.mean), dtype=torch.float64)
        k = block.index(kept)
        for compensation in ("least-squares", "mean", "none"):
            weight, bias = compensate(block, kept, compensation)
            expected = contexts[:, k] @ weight.T + (0 if bias is None else bias)
            gates = torch.tensor([float(u in kept) for u in range(block.site.num_units)], dtype=torch.float64)
            found = [closed(block, kept, compensation), Channel.of(block, compensation).stand_in(gates)]
            for stand_in in found:
                torch.testing.assert_close(stand_in.replace(contexts) @ block.out.T, expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("kept", [[0, 2, 3], [1], [0, 1, 2, 3]])
def test_one_gate_that_moves_does_what_the_set_wise_loss_charges(kept):
    """Variance that is lost at the block's output, of every unit shut or opened apart, without anything refreshed."""
    block = collinear_block()
    channel = Channel.of(block, "least-squares")
    mixture, eye = torch.linalg.cholesky(block.covariance), torch.eye(len(block.mean), dtype=torch.float64)

    def lost(units):
        gates = torch.tensor([float(u in units) for u in range(4)], dtype=torch.float64)
        missing = eye - channel.stand_in(gates).replace(block.mean + eye) + block.mean  # rows: what a unit vector is replaced by
        return 0.5 * float((block.out @ missing.T @ mixture).square().sum())

    for unit in range(4):
        flipped = [u for u in range(4) if (u in kept) != (u == unit)]
        removed = [u for u in range(4) if u not in flipped]
        if flipped:
            assert lost(flipped) == pytest.approx(removal_loss(block, removed) if removed else 0.0, rel=1e-8, abs=1e-10)


def test_half_open_gates_pass_what_the_channel_lets_through():
    """Monte Carlo: least squares from noisy contexts, and the covariance of the estimate."""
    block, z = collinear_block(), torch.tensor([0.9, 0.5, 0.0, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)

    def draw(covariance):
        return torch.randn(400_000, len(covariance), dtype=torch.float64, generator=generator) @ torch.linalg.cholesky(covariance).T

    contexts = draw(block.covariance)
    noise = torch.cat([draw(block.covariance[block.columns(u)][:, block.columns(u)]) for u in range(4)], 1)
    wide = z.repeat_interleave(5)
    seen = wide * contexts + (1 - wide.square()).sqrt() * noise
    fitted = torch.linalg.solve(seen.T @ seen, seen.T @ contexts)
    channel = Channel.of(block, "least-squares")
    sent = channel.stand_in(z).replace(block.mean + contexts[:50]) - block.mean
    half = (z < 1).repeat_interleave(5)
    torch.testing.assert_close(sent[:, half], (wide * contexts[:50] @ fitted)[:, half], atol=0.05, rtol=0.05)
    assert torch.equal(sent[:, ~half], (block.mean + contexts[:50] - block.mean)[:, ~half])
    estimate = seen @ fitted
    torch.testing.assert_close(channel.passed(z), estimate.T @ estimate / len(estimate), atol=0.1, rtol=0.05)
    directions = torch.randn(20, 6, dtype=torch.float64, generator=generator)
    for compensation in ("least-squares", "mean"):
        other = Channel.of(block, compensation)
        expected = (directions.T @ other.passed(z) @ directions).diagonal()
        torch.testing.assert_close(other.energies(z, directions), expected)


def test_what_stands_in_is_differentiable_in_gates_and_contexts():
    block = collinear_block()
    for compensation in ("least-squares", "mean", "none"):
        channel = Channel.of(block, compensation)
        z = torch.tensor([0.9, 0.5, 0.3, 0.7], dtype=torch.float64, requires_grad=True)
        contexts = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
        directions = torch.randn(20, 6, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda z, c, channel=channel: channel.stand_in(z).replace(c), (z, contexts))
        assert torch.autograd.gradcheck(lambda z, channel=channel, d=directions: channel.energies(z, d), (z,))


@pytest.mark.parametrize("location", [-30.0, 30.0])
def test_draws_that_are_clamped_in_all_blocks_have_a_backward_pass_all_the_same(gqa_vlm, questions, location):
    """Or processes that share a model would wait for it."""
    gates = HeadGates(list(gqa_vlm.architecture.attention), initial=location)
    for path, block in blocks_of(gqa_vlm, questions).items():
        gates.connect_(path, Channel.of(block, "least-squares"))
    reached = []
    gqa_vlm.model.requires_grad_(False)
    first = gqa_vlm.architecture.attention[0]
    with gates.attached(gqa_vlm.model):
        gates.sample_("a")
        out = gqa_vlm.model.get_submodule(f"{first.path}.{first.names.out}")
        out.register_forward_hook(lambda module, args, output: output.register_hook(reached.append) and None)
        answer_logits(gqa_vlm.model, next(iter(batches(gqa_vlm.encoder, questions)))[0]).sum().backward()
    assert reached and gates.log_alpha.grad is not None and not gates.log_alpha.grad.any()


def test_terms_of_weight_zero_are_not_computed(gqa_vlm, questions):
    heads = infoprune.compress(gqa_vlm, questions, rate_weight=0.0, ks_weight=0.0, **QUICK).training["heads"]
    assert len(heads["history"]) == QUICK["gate_steps"]
    assert all({"cross_entropy", "budget", "cost"} <= step.keys() and not {"rate", "ks"} & step.keys() for step in heads["history"])


def test_without_the_ks_term_all_but_the_spectra_is_found():
    block, z = random_block(4, 5, 16), torch.tensor([0.9, 0.2, 0.9, 0.9])
    channel = Channel.of(block, "least-squares")
    whole, found = (structure_of(block, dense_structure(block), channel, z, spectra) for spectra in (True, False))
    for name in ("snr", "spectrum"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert found.directions.numel() == 0 < whole.directions.numel()


@pytest.mark.parametrize("compensation", ["least-squares", "none"])
def test_structure_at_the_ends(vlm, questions, compensation):
    for block in blocks_of(vlm, questions).values():
        n = block.site.num_units
        channel = Channel.of(block, compensation).to(torch.device("cpu"), torch.float32)
        found = structure_of(block, dense_structure(block), channel, torch.ones(n))
        assert found.ks(torch.ones(n)) == pytest.approx(0, abs=1e-4)
        assert float(found.rate(torch.zeros(n))) == 0
        rates = [float(found.rate(torch.full((n,), z))) for z in (0.0, 0.3, 0.7, 1.0)]
        assert rates == sorted(rates)
        assert 0 <= float(found.ks(torch.full((n,), 0.2))) <= 1


def random_block(units, width, hidden):
    n = units * width
    generator = torch.Generator().manual_seed(0)
    contexts, out = (torch.randn(rows, n, dtype=torch.float64, generator=generator) for rows in (4 * n, hidden))
    site = SimpleNamespace(num_units=units, unit_width=width, hidden_size=hidden, head_dim=width)
    return Block(site, contexts.T @ contexts / len(contexts), contexts.mean(0), out, torch.eye(hidden, dtype=torch.float64))


def collinear_block():
    """Contexts of four units of width 5 that mostly say the same."""
    block = random_block(4, 5, 12)
    common = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return replace(block, covariance=0.1 * block.covariance + common @ common.T)


@pytest.mark.parametrize("z", [[0.0, 0.0, 0.0, 0.0], [0.9, 0.2, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
@pytest.mark.parametrize("compensation", ["least-squares", "mean", "none"])
@pytest.mark.parametrize("hidden", [12, 30])
def test_directions_are_those_of_the_gated_output(hidden, compensation, z):
    block, gates = random_block(4, 5, hidden), torch.tensor(z)
    channel = Channel.of(block, compensation)
    passed = block.out @ channel.passed(gates.double()) @ block.out.T
    found = structure_of(block, dense_structure(block), channel, gates)
    energies = channel.energies(gates.double(), found.directions.double())
    torch.testing.assert_close(energies, torch.linalg.eigvalsh(passed).flip(0), atol=1e-4, rtol=1e-4)


def test_a_refresh_makes_nothing_larger_than_one_map():
    block, sizes = random_block(8, 16, 128), []
    dense = dense_structure(block)

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **kwargs or {})
            sizes.extend(piece.numel() for piece in (made if isinstance(made, tuple) else (made,)) if isinstance(piece, torch.Tensor))
            return made

    with Sizes():
        structure_of(block, dense, Channel.of(block, "least-squares"), torch.linspace(0, 1, 8))
    assert max(sizes) == 128 * 128


def test_ks_gradient_is_that_of_the_true_spectrum(gqa_vlm, questions):
    block = next(iter(blocks_of(gqa_vlm, questions).values()))
    z = torch.tensor([0.9, 0.3, 0.6, 0.8][: block.site.num_units], dtype=torch.float32)

    def exact(gates):  # spectrum of the gated output, from scratch
        scale = gates.double().repeat_interleave(block.site.unit_width)
        weight = block.out * scale
        energies = torch.linalg.eigvalsh(weight @ block.covariance @ weight.T).flip(0).clamp_min(0)
        dense = torch.linalg.eigvalsh(block.out @ block.covariance @ block.out.T).flip(0).clamp_min(0)
        return float(((energies / energies.sum()).cumsum(0) - (dense / dense.sum()).cumsum(0)).abs().max())

    channel = Channel.of(block, "none").to(torch.device("cpu"), torch.float32)
    found = structure_of(block, dense_structure(block), channel, z)
    assert float(found.ks(z)) == pytest.approx(exact(z), abs=1e-4)
    leaf = z.clone().requires_grad_(True)
    found.ks(leaf).backward()
    for unit in range(len(z)):
        step = torch.zeros_like(z).index_fill_(0, torch.tensor([unit]), 1e-3)
        numeric = (exact(z + step) - exact(z - step)) / 2e-3
        assert float(leaf.grad[unit]) == pytest.approx(numeric, abs=2e-3)


# --- objective ---------------------------------------------------------------------------------------------------------------------


def test_terms_vanish_where_nothing_was_lost():
    torch.manual_seed(0)
    logits, hidden = torch.randn(5, 7), [torch.randn(2, 3, 4)]
    valid = torch.ones(2, 3, dtype=torch.bool)
    assert float(objective.distillation(logits, logits, 2.0)) == pytest.approx(0, abs=1e-5)
    assert float(objective.distillation(logits, logits.flip(1), 2.0)) > 0
    assert float(objective.hidden_distance(hidden, hidden, valid)) == 0
    half = valid.clone()
    half[0] = False
    assert float(objective.hidden_distance([0 * hidden[0]], hidden, half)) == pytest.approx(1.5)  # three real tokens at distance 1
    assert float(objective.hidden_distance([1e4 * hidden[0]], hidden, half)) == pytest.approx(3, rel=1e-3)  # bounded, one a token


def test_budget_multipliers_push_towards_the_target():
    budget = objective.Budget(0.5)
    cost = torch.tensor(0.8, requires_grad=True)
    budget.ascend(0.8, 1.0)
    budget.penalty(cost).backward()
    assert cost.grad > 0
    for _ in range(5):
        budget.ascend(0.2, 1.0)
    assert budget.linear < 0


def test_one_cycle():
    rates = [one_cycle(step, 100) for step in range(100)]
    assert max(rates) == 1 and rates.index(1) == 9 and 0 <= rates[-1] < 0.01 and rates[0] == pytest.approx(0.1)


# --- data --------------------------------------------------------------------------------------------------------------------------


def test_stream_is_a_function_of_the_step(questions):
    rows = rows_of(questions, 2, share_prefix=True)
    assert [len(row) for row in rows] == [2, 1] * 6
    stream = Stream(rows, 4, seed=3)
    assert stream.step(2) == Stream(rows, 4, seed=3).step(2)
    first_epoch = [row for step in range(3) for row in stream.step(step)]
    assert sorted(map(str, first_epoch)) == sorted(map(str, rows))
    assert stream.step(0) != stream.step(3)


def test_held_out_images_are_disjoint(questions):
    train, held = hold_out(questions, 0)
    assert held and not {e.image for e in train} & {e.image for e in held} and len(train) + len(held) == len(questions)
    with pytest.raises(DataError, match="two images"):
        hold_out(questions[:3], 0)


def test_gates_that_start_all_equal_start_from_the_same_choice(gqa_vlm, questions, monkeypatch):
    starts, real = [], TrainingRun.learn_heads

    def watched(self, vlm, *args, **options):
        learned = real(self, vlm, *args, **options)
        starts.append((vlm.architecture, learned.start))
        return learned

    monkeypatch.setattr(TrainingRun, "learn_heads", watched)
    for prior in (30.0, 0.0):
        infoprune.compress(gqa_vlm, questions, **QUICK | {"gate_steps": 1, "gate_prior": prior})
    assert starts[0] == starts[1]


def test_validation_has_at_most_as_many_questions_as_are_allowed(gqa_vlm, questions):
    for most in (1, 4, 5, 100):
        options = TrainingOptions(validation_questions=most)
        train, validation = split(gqa_vlm.encoder, [*questions, *questions], options, 0, SILENT)
        assert 0 < len(validation) <= most and not {e.image for e in train} & {e.image for e in validation}


def test_copies_of_an_image_are_held_out_together(questions, tmp_path):
    copies = []
    for number, example in enumerate(questions):
        copies.append(replace(example, image=Path(shutil.copy(example.image, tmp_path / f"copy {number}{example.image.suffix}"))))
    train, held = hold_out([*questions, *copies], 0)
    seen = [{e.image.read_bytes() for e in part} for part in (train, held)]
    assert held and not seen[0] & seen[1] and len(train) + len(held) == 2 * len(questions)


# --- the whole -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recovery", ["full", "lora"])
def test_trained_heads_and_recovery(vlm, questions, tmp_path, recovery):
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    result = infoprune.compress(vlm, questions, **QUICK, recovery=recovery, recovery_rate=1e-2)
    assert all(p.requires_grad and p.grad is None for model in (vlm.model, result.vlm.model) for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in vlm.model.named_parameters())
    assert not any("lora" in name for name, _ in (*vlm.model.named_parameters(), *result.vlm.model.named_parameters()))
    assert result.flops_ratio <= 0.7 and result.vlm.plan.method["heads"] == "trained"
    heads, recovered = result.training["heads"], result.training["recovery"]
    assert {"cross_entropy", "distillation", "rate", "ks", "budget", "cost", "mu_1"} <= heads["history"][-1].keys()
    assert heads["agreement"] < 1e-4
    assert {"cross_entropy", "distillation", "hidden"} <= recovered["history"][0].keys()
    assert recovered["history"][-1]["cross_entropy"] < recovered["history"][0]["cross_entropy"]
    infoprune.save(result.vlm, tmp_path / "small", probe=result.probe, extra=result.as_dict())
    reloaded = infoprune.load(tmp_path / "small")
    assert torch.equal(reloaded.model(**result.probe).logits, result.vlm.model(**result.probe).logits)


def test_lora_trains_along_with_the_gates_and_is_left_behind(gqa_vlm, questions, monkeypatch):
    from infoprune.training import run as training_run

    before, added, real = {name: p.clone() for name, p in gqa_vlm.model.named_parameters()}, {}, training_run.add_lora
    gated = []

    def watched(model, *given):
        gated.append((model, {name: p.clone() for name, p in model.named_parameters()}))
        wrapper, lora = real(model, *given)
        added.update(lora)
        return wrapper, lora

    monkeypatch.setattr(training_run, "add_lora", watched)
    options = QUICK | {"repair": False}
    result = infoprune.compress(gqa_vlm, questions, **options, gate_lora=2, gate_lora_rate=1e-2)
    assert result.training["heads"]["agreement"] < 1e-4
    assert added and any(p.abs().max() > 0 for name, p in added.items() if "lora_B" in name)  # which starts at zero
    ((model, untouched),) = gated
    after = dict(model.named_parameters())
    assert after.keys() == untouched.keys() and all(torch.equal(after[name], p) for name, p in untouched.items())
    assert all(torch.equal(before[name], p) for name, p in gqa_vlm.model.named_parameters())
    assert not any("lora" in name or "base_layer" in name for name, _ in result.vlm.model.named_parameters())
    plan = result.vlm.plan
    whole = [s for s in gqa_vlm.architecture.attention if s.path not in plan.heads]
    queries = [f"{site.path}.{site.names.query}.weight" for site in whole]
    assert queries and all(torch.equal(weights(result)[name], before[name]) for name in queries)


@pytest.mark.parametrize(("given", "expected"), [({}, 1e-4), ({"gate_lora_rate": 3e-3}, 3e-3)])
def test_lora_along_with_the_gates_has_a_rate_of_its_own(gqa_vlm, questions, monkeypatch, given, expected):
    from infoprune.training import loop

    rates, real = [], loop._update

    def watched(stage, *rest):
        done = real(stage, *rest)
        rates.append((stage.name, [group["lr"] for group in stage.optimizer.param_groups]))
        return done

    monkeypatch.setattr(loop, "_update", watched)
    options = QUICK | {"gate_steps": 2, "recovery_steps": 1, "recovery": "full", "recovery_rate": 1e-2, "gate_rate": 0.2}
    infoprune.compress(gqa_vlm, questions, **options, gate_lora=2, **given)
    assert [r for name, r in rates if name == "gates"] == [pytest.approx([0.2, expected])] * 2


def test_gates_start_at_the_budget_in_the_order_of_the_ranking(vlm):
    sites = list(vlm.architecture.attention)
    workload = Workload(5, 20, 2, {s.path: 100_000 * s.num_units for s in sites})
    costs = flop_costs(sites, workload)
    torch.manual_seed(0)
    percentiles = torch.randperm(len(costs.unit)) / len(costs.unit)
    for spread in (0.0, 6.0):
        for target in (0.3, 0.8):
            found = start_locations(percentiles, spread, costs, target)
            assert float(costs.share(open_probability(found.double()))) == pytest.approx(target, abs=1e-5)
            order = torch.argsort(percentiles)
            stays = percentiles[order] > 1 - target
            below, above = found[order][~stays], found[order][stays]
            assert (found[order].diff() >= 0).all()
            for part in (below, above):
                assert float(part[-1] - part[0]) == pytest.approx(spread / 2, abs=spread / len(part) + 1e-4)
    assert float(open_probability(start_locations(percentiles, 6.0, costs, 1.0)).min()) > 0.999


def test_units_are_ranked_by_the_cheapest_choice_within_the_budget(gqa_vlm):
    sites = list(gqa_vlm.architecture.attention)[:3]
    units = sites[0].num_units
    orders = [list(range(site.num_units)) for site in sites]
    # the first block's units cost least nats one by one, but only with the last one does its large fixed cost go
    losses = [[0.0, *(0.1 * k for k in range(1, units + 1))], [0.0, *(1.0 * k for k in range(1, sites[1].num_units + 1))]]
    losses.append([0.0, *(9.0 * k for k in range(1, sites[2].num_units + 1))])
    solved = [SolvedSite(s, 1.0, Removal(order, loss)) for s, order, loss in zip(sites, orders, losses, strict=True)]
    owner = torch.tensor([number for number, s in enumerate(sites) for _ in range(s.num_units)])
    fixed = torch.tensor([100.0, 1.0, 1.0], dtype=torch.float64)
    costs = Costs(fixed, torch.ones(len(owner), dtype=torch.float64), owner, torch.tensor([False] * 3))
    whole = costs.dense - costs.block(0, units)
    percentiles = torch.tensor(unit_percentiles(solved, costs, whole / costs.dense))
    assert percentiles[owner == 0].max() < percentiles[owner > 0].min()
    gates = HeadGates(sites, start_locations(percentiles, 6.0, costs, whole / costs.dense))
    kept = binarise(gates, costs, whole / costs.dense)
    assert kept == {sites[0].path: [], **{s.path: list(range(s.num_units)) for s in sites[1:]}}


def test_gates_start_from_the_training_free_choice_and_keep_the_better_one(gqa_vlm, questions):
    given = QUICK | {"gate_steps": 4, "evaluate_every": 2}
    free = infoprune.compress(gqa_vlm, hold_out(questions, 0)[0], **given | {"heads": "information-loss"})
    unmoved = infoprune.compress(gqa_vlm, questions, **given | {"gate_rate": 1e-9})  # gates that can't move keep what they start from
    assert unmoved.vlm.plan.heads == free.vlm.plan.heads
    moved = infoprune.compress(gqa_vlm, questions, **given | {"gate_rate": 3.0, "gate_prior": 6.0})
    heads = moved.training["heads"]
    assert list(heads["validation"]) == [0, 2, 4]
    assert heads["kept_of_step"] == min(heads["validation"], key=heads["validation"].get)
    assert len(set(heads["validation"].values())) > 1


@pytest.mark.parametrize("better", ["trained", "start"])
def test_heads_are_those_whose_cut_model_answers_better(gqa_vlm, questions, monkeypatch, better):
    given = QUICK | {"gate_steps": 4, "evaluate_every": 2}
    free = infoprune.compress(gqa_vlm, hold_out(questions, 0)[0], **given | {"heads": "information-loss"})

    def update(self, choice, loss, step):  # the last choice, whatever it is worth with dense FFNs
        self.choice, self.loss, self.step = choice, loss, step
        self.losses[step] = loss

    seen = []

    def figures(vlm, examples, **options):
        seen.append({path: len(decision.keep_units) for path, decision in vlm.plan.heads.items()})
        best = better == ("trained", "start")[len(seen) - 1]
        return 50.0 if best else 50.2, 1.0 if best else 2.0  # a lucky question does not decide

    monkeypatch.setattr(BestGates, "update", update)
    monkeypatch.setattr("infoprune.training.run.validated", figures)
    found = infoprune.compress(gqa_vlm, questions, **given | {"gate_rate": 3.0, "gate_prior": 6.0})
    assert len(seen) == 2 and found.training["heads"]["kept"] == better
    assert (found.vlm.plan.heads == free.vlm.plan.heads) == (better == "start")
    assert found.flops_ratio <= given["flops"] and found.training["heads"]["agreement"] < 1e-4


def test_validation_of_text_gates_passes_each_image_through_the_tower_once(gqa_vlm, questions, monkeypatch):
    path, passes, real = gqa_vlm.architecture.family.vision, [], GateStage.validate

    def counted(self, step):
        hook = self.model.get_submodule(path).register_forward_hook(lambda *a: passes.append(step))
        try:
            return real(self, step)
        finally:
            hook.remove()

    monkeypatch.setattr(GateStage, "validate", counted)
    options = QUICK | {"seed": 2, "towers": ("text",), "flops": 0.85, "gate_rate": 3.0, "gate_prior": 0.5, "evaluate_every": 1}
    cached = infoprune.compress(gqa_vlm, questions, **options).training["heads"]["validation"]
    assert len(set(cached.values())) > 1 and passes == [0]  # gates changed, but all images are in the first validation's one batch
    passes.clear()
    monkeypatch.setattr("infoprune.training.run.VisionCache", lambda model: None)
    plain = infoprune.compress(gqa_vlm, questions, **options).training["heads"]["validation"]
    assert cached == pytest.approx(plain, rel=1e-5) and len(passes) > 2


def test_where_all_heads_stay_gates_do_not_train(gqa_vlm, questions):
    notes = []
    told = SimpleNamespace(note=notes.append, task=SILENT.task, status=SILENT.status)
    found = infoprune.compress(gqa_vlm, questions, **QUICK | {"attention_share": 1.0, "flops": 0.9}, progress=told)
    heads = found.training["heads"]
    assert any("nothing to choose" in note for note in notes) and heads["steps"] == 0 and heads["history"] == []
    assert not found.vlm.plan.heads and found.vlm.plan.ffn


def test_images_of_rows(vlm, questions):
    for share in (False, True):
        for batch, indices in batches(vlm.encoder, questions, images_per_batch=4, share_prefix=share):
            chosen = [questions[index] for index in indices]
            images = images_of_rows(batch, chosen)
            shared = share and vlm.encoder.shares_prefix
            assert images == (list(dict.fromkeys(e.image for e in chosen)) if shared else [e.image for e in chosen])


@pytest.mark.parametrize("flops", [0.9, 0.84])
def test_expected_cost_converges_and_binarisation_meets_the_budget(gqa_vlm, tmp_path, flops):
    options = QUICK | {"gate_steps": 120, "ffn": "none", "towers": ("text",), "refresh": 20, "flops": flops}
    result = infoprune.compress(gqa_vlm, examples(tmp_path), **options)
    heads = result.training["heads"]
    assert [step["cost"] for step in heads["history"][-20:]] == pytest.approx([heads["target_share"]] * 20, abs=0.03)
    assert result.flops_ratio <= flops


def test_gates_can_not_reach_what_the_rest_of_the_model_costs(gqa_vlm, tmp_path):
    with pytest.raises(InfoPruneError, match="out of reach"):
        infoprune.compress(gqa_vlm, examples(tmp_path), **QUICK | {"flops": 0.55, "ffn": "none", "towers": ("text",)})


def test_binarise_opens_again_what_still_fits():
    """Two blocks whose fixed cost is most of them: what the last unit of one sets free keeps the other whole."""
    sites = [SimpleNamespace(path=path, num_units=10, min_units=0) for path in "ab"]
    gates = HeadGates(sites, torch.tensor([*range(0, 20, 2), *range(1, 21, 2)]).float())
    owner = torch.arange(2).repeat_interleave(10)
    costs = Costs(
        torch.tensor([10.0, 10.0], dtype=torch.float64), torch.full((20,), 0.1, dtype=torch.float64), owner, torch.zeros(2).bool()
    )
    assert binarise(gates, costs, 0.55) == {"a": [], "b": list(range(10))}
    assert binarise(gates, costs, 10.55 / 22) == {"a": [], "b": list(range(5, 10))}


def test_binarise_keeps_the_most_open_units_within_the_target(vlm):
    sites = list(vlm.architecture.attention)
    gates = HeadGates(sites)
    torch.manual_seed(1)
    with torch.no_grad():
        gates.log_alpha.normal_()
    workload = Workload(5, 20, 2, {s.path: 100_000 * s.num_units for s in sites})
    costs = flop_costs(sites, workload)
    kept = binarise(gates, costs, 0.8)
    spent = sum(attention_flops(s, len(kept[s.path]), workload) for s in sites)
    assert spent <= 0.8 * costs.dense and all(len(kept[s.path]) >= s.min_units for s in sites)
    open_, shut = [], []
    for site, values in zip(sites, gates.by_site(gates.log_alpha.detach()).values(), strict=True):
        for unit in range(site.num_units):
            (open_ if unit in kept[site.path] else shut).append((float(values[unit]), len(kept[site.path]) > site.min_units))
    assert max(v for v, _ in shut) <= min(v for v, may_go in open_ if may_go)
    with pytest.raises(InfoPruneError, match="What must stay"):
        binarise(gates, costs, 0.01)


def test_expected_cost_of_a_block_is_gone_with_its_last_unit(vlm):
    sites = list(vlm.architecture.attention)
    workload = Workload(5, 20, 2, {s.path: 100_000 * s.num_units for s in sites})
    costs = flop_costs(sites, workload)
    kept = [1 if number % 2 else s.min_units for number, s in enumerate(sites)]
    open_ = torch.cat([(torch.arange(s.num_units) < k).double() for s, k in zip(sites, kept, strict=True)])
    exact = sum(attention_flops(s, k, workload) for s, k in zip(sites, kept, strict=True)) / costs.dense
    assert float(costs.share(open_)) == pytest.approx(exact, rel=1e-9)
    half = torch.full_like(open_, 0.5, requires_grad=True)
    costs.share(half).backward()
    assert (half.grad > 0).all() and float(costs.share(torch.ones_like(open_))) == pytest.approx(1)


def test_measured_costs(vlm, questions):
    sites = list(vlm.architecture.attention)
    probe, _, workload = measure(vlm, questions)
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    costs = time_costs(vlm.model, sites, probe, workload)
    assert costs.fixed.min() >= 0 and costs.unit.min() >= 0 and 0 < costs.dense < 10
    assert all(torch.equal(p, before[name]) for name, p in vlm.model.named_parameters())
    assert not any(m._forward_pre_hooks for m in vlm.model.modules())


@pytest.mark.parametrize("name", ["mllama", "qwen2.5-vl"])
def test_blocks_of_other_kinds_are_timed_apart(name, monkeypatch, tmp_path):
    """Cross-attention beside self-attention, windows beside whole images: of the same shape, not of the same cost."""
    vlm = built(next(tiny for tiny in ALL if tiny.name == name), monkeypatch)
    sites = list(vlm.architecture.attention)
    probe, _, workload = measure(vlm, examples(tmp_path, 2))
    lines = []
    monkeypatch.setattr("infoprune.training.costs._line", lambda call, site, device: lines.append(site) or (0.0, float(len(lines))))
    costs = time_costs(vlm.model, sites, probe, workload)
    step = {site.path: costs.block(number, 1) for number, site in enumerate(sites)}
    kinds = {(site.tower, site.names.attention, workload.attention[site.path]) for site in sites}
    assert len(lines) == len(kinds) == len(set(step.values())) > 2


def test_gates_may_pay_in_time(gqa_vlm, questions):
    result = infoprune.compress(gqa_vlm, questions, **QUICK, gate_cost="time", attention_share=0.5)
    assert result.flops_ratio == pytest.approx(0.7, abs=0.02)
    assert min(len(d.keep_units) for d in result.vlm.plan.heads.values()) < 2


def weights(result):
    return {name: p.detach().clone() for name, p in result.vlm.model.named_parameters()}


def stopped_once(monkeypatch, moment, run):
    """What ``run`` gives when it is called again after it was stopped at a stage's step."""
    from infoprune.training import loop

    real, (name, at) = loop._update, moment

    def stopping(stage, stream, encoder, device, step, *rest):
        if stage.name == name and step == at:
            raise KeyboardInterrupt
        return real(stage, stream, encoder, device, step, *rest)

    monkeypatch.setattr(loop, "_update", stopping)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(loop, "_update", real)
    return run()


@pytest.mark.parametrize("moment", [("gates", 3), ("gates", 4), ("recovery", 3), ("recovery", 5)])
def test_interrupted_training_ends_with_the_same_weights(gqa_vlm, questions, tmp_path, monkeypatch, moment):
    options = QUICK | {"recovery": "full"}
    whole = infoprune.compress(gqa_vlm, questions, **options)
    resumed = stopped_once(monkeypatch, moment, lambda: infoprune.compress(gqa_vlm, questions, work=tmp_path / "work", **options))
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    assert len(resumed.training["recovery"]["history"]) == options["recovery_steps"]


@pytest.mark.parametrize("at", [3, 4, 7])
def test_training_that_collapses_goes_back(gqa_vlm, questions, tmp_path, monkeypatch, at):
    from infoprune.training import recovery

    monkeypatch.setattr(recovery, "COLLAPSE", (0.0, 0.0))  # a model of random weights has nothing to lose: always
    notes = []
    told = SimpleNamespace(note=notes.append, task=SILENT.task, status=SILENT.status)
    options = QUICK | {"heads": "information-loss", "recovery": "full", "recovery_steps": 9}
    whole = infoprune.compress(gqa_vlm, questions, progress=told, **options)
    report = whole.training["recovery"]
    assert report["went_back"] == [3, 6] and len(report["history"]) == 9
    assert sum("lost its way" in note for note in notes) == len(report["went_back"])
    once = options | {"checkpoint_every": 1}
    resumed = stopped_once(monkeypatch, ("recovery", at), lambda: infoprune.compress(gqa_vlm, questions, work=tmp_path / "work", **once))
    assert resumed.training["recovery"]["went_back"] == report["went_back"]
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_after_going_back_steps_are_half_as_large(gqa_vlm, questions, monkeypatch):
    student = gqa_vlm.copy()
    parameters = layer_weights(student.model, gqa_vlm.architecture)
    options = TrainingOptions(recovery="full", recovery_steps=10, evaluate_every=2)
    stage = RecoveryStage(student, gqa_vlm, parameters, questions, options, autocast=False)
    stage.begin(0)
    stage.best.cross_entropy = 0.01
    before = {name: p.detach().clone() for name, p in parameters.items()}
    rate = stage.learning_rate(4)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(2.0)
    monkeypatch.setattr(stage, "validate", lambda step: Validated(90.0, 0.115, 1.0))
    assert not stage.end(1, {}) and not stage.went_back  # a little worse is noise
    monkeypatch.setattr(stage, "validate", lambda step: Validated(0.0, 0.125, 1.0))
    assert not stage.end(3, {})
    assert stage.went_back == [4] and stage.learning_rate(4) == rate / 2
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_the_best_weights_are_those_of_the_least_loss(gqa_vlm, questions):
    best = Best()
    assert best.update(Validated(99.8, 0.0067, 0.30), 40) and best.update(Validated(99.6, 0.0070, 0.11), 80)
    assert not best.update(Validated(100.0, 0.0001, 0.12), 120) and (best.step, best.worse, best.accuracy) == (80, 1, 99.6)
    student = gqa_vlm.copy()
    parameters = layer_weights(student.model, gqa_vlm.architecture)
    for weights in ({}, {"hidden_weight": 0.0}, {"hidden_weight": 0.0, "distillation_weight": 0.0}, {"cross_entropy_weight": 0.5}):
        options = TrainingOptions(recovery="full", **weights)
        stage = RecoveryStage(student, gqa_vlm, parameters, questions, options, autocast=False)
        same = stage.validate(0)
        accuracy, cross_entropy = validated(student, questions)
        assert (same.accuracy, same.cross_entropy) == pytest.approx((accuracy, cross_entropy), rel=1e-4)
        assert same.loss == pytest.approx(options.cross_entropy_weight * cross_entropy, rel=1e-4)  # nothing was cut: no distance
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(1.5)
        changed = stage.validate(1)
        further = changed.loss - options.cross_entropy_weight * changed.cross_entropy
        assert (further > 1e-4) == bool(options.hidden_weight or options.distillation_weight)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.div_(1.5)


def test_work_with_other_settings_is_not_mixed_up(gqa_vlm, questions, tmp_path):
    infoprune.compress(gqa_vlm, questions, work=tmp_path / "work", **QUICK)
    with pytest.raises(CheckpointError, match="gate_steps"):
        infoprune.compress(gqa_vlm, questions, work=tmp_path / "work", **QUICK | {"gate_steps": 9})
    asked = replace(gqa_vlm, encoder=replace(gqa_vlm.encoder, suffix=" !"))
    with pytest.raises(CheckpointError, match="prompt"):
        infoprune.compress(asked, questions, work=tmp_path / "work", **QUICK)
    (tmp_path / "work" / "gates.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        infoprune.compress(gqa_vlm, questions, work=tmp_path / "work", **QUICK)


def test_other_validation_questions_are_other_work(gqa_vlm, questions, jsonl, tmp_path):
    held = tmp_path / "held.jsonl"
    lines = jsonl.read_text().splitlines()
    given = QUICK | {"recovery": "full", "recovery_steps": 2, "validation": str(held)}
    held.write_text("\n".join(_absolute(line, jsonl.parent) for line in lines[:4]))
    infoprune.compress(gqa_vlm, questions[6:], work=tmp_path / "work", **given)
    held.write_text("\n".join(_absolute(line, jsonl.parent, answer="blue circle") for line in lines[:4]))
    with pytest.raises(CheckpointError, match=r"other settings \(validation questions\)"):
        infoprune.compress(gqa_vlm, questions[6:], work=tmp_path / "work", **given)


def _absolute(line, folder, **changed):
    record = json.loads(line)
    return json.dumps(record | {"image": str(folder / record["image"])} | changed)


def test_a_resumed_run_goes_on_with_the_times_that_were_measured_first(gqa_vlm, questions, tmp_path, monkeypatch):
    options = QUICK | {"gate_cost": "time", "attention_share": 0.5}
    measured = []

    def times(model, sites, probe, workload):
        found = flop_costs(sites, workload)
        measured.append(replace(found, unit=found.unit * (1 + 3 * len(measured) * torch.arange(len(found.unit)))))
        return measured[-1]

    monkeypatch.setattr(sys.modules["infoprune.trained_heads"], "time_costs", times)
    whole = infoprune.compress(gqa_vlm, questions, **options)
    measured.clear()
    resumed = stopped_once(monkeypatch, ("gates", 4), lambda: infoprune.compress(gqa_vlm, questions, work=tmp_path / "work", **options))
    assert len(measured) == 1
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))


def test_heads_that_the_budget_has_no_room_for_are_left_out(gqa_vlm, questions, monkeypatch):
    real, given = (
        sys.modules["infoprune.trained_heads"].decide,
        QUICK | {"gate_steps": 4, "evaluate_every": 2, "gate_rate": 3.0, "gate_prior": 6.0},
    )
    choices = []

    def no_room(solved, *rest):
        if solved[0].fixed is not None:
            choices.append(solved)
            if len(choices) == 2:  # the start was checked before gates trained; this is what they learned
                raise BudgetError("out of reach")
        return real(solved, *rest)

    def update(self, choice, loss, step):
        self.choice, self.loss, self.step = choice, loss, step

    monkeypatch.setattr(BestGates, "update", update)
    monkeypatch.setattr(sys.modules["infoprune.trained_heads"], "decide", no_room)
    found = infoprune.compress(gqa_vlm, questions, **given)
    assert found.training["heads"]["kept"] == "start" and list(found.training["heads"]["cut"]) == ["start"]


def test_without_a_head_that_can_go_none_are_trained(gqa_vlm, questions):
    whole = replace(gqa_vlm.architecture, attention=[replace(s, min_units=s.num_units) for s in gqa_vlm.architecture.attention])
    with pytest.raises(InfoPruneError, match="can lose a head"):
        infoprune.compress(replace(gqa_vlm, architecture=whole), questions, **QUICK)


def test_options_are_given_once(gqa_vlm, questions):
    with pytest.raises(InfoPruneError, match=r"CompressionOptions or its fields by keyword \(flops\)"):
        infoprune.compress(gqa_vlm, questions, options=infoprune.CompressionOptions(flops=0.5), flops=0.3)
    with pytest.raises(InfoPruneError, match=r"TrainingOptions or its fields by keyword \(recovery\)"):
        infoprune.compress(gqa_vlm, questions, flops=0.5, training=TrainingOptions(), recovery="full")


@pytest.mark.parametrize(("spec", "is_test"), [("vqav2@x", True), ("vqav2:train@x", False), ("textvqa", True), ("gqa", False),
                                               ("gqa:testdev", True), ("easy-vqa:test", True), ("own.jsonl", False)])  # fmt: skip
def test_validation_on_what_one_tests_on_is_told(spec, is_test):
    assert _is_test(spec) == is_test


def test_an_old_pytorch_is_told_before_any_work(gqa_vlm, questions, monkeypatch):
    monkeypatch.delattr("torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor")
    with pytest.raises(InfoPruneError, match="--shard needs a newer PyTorch"):
        infoprune.compress(gqa_vlm, questions, **QUICK, shard=True)


def test_full_recovery_takes_steps_relative_to_each_tensor():
    torch.manual_seed(0)
    small, massive = torch.randn(40, 50), torch.randn(2001)
    massive[0] = 1e4
    assert typical_magnitude(small) == pytest.approx(1.0, rel=0.1)
    assert typical_magnitude(100 * small) == pytest.approx(100 * typical_magnitude(small), rel=1e-5)
    assert typical_magnitude(massive) == pytest.approx(1.0, rel=0.1)  # the root mean square would be 224
    assert typical_magnitude(torch.zeros(3)) == 1e-3
    parameters = {"a": torch.nn.Parameter(small), "b": torch.nn.Parameter(100 * small)}
    optimizer = torch.optim.AdamW(relative_groups(parameters), weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["scale"]
    sum(p.square().sum() for p in parameters.values()).backward()
    optimizer.step()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in parameters.items()}
    assert moved["b"] == pytest.approx(100 * moved["a"], rel=1e-3)
    assert moved["a"] == pytest.approx(0.01 * typical_magnitude(before["a"]), rel=1e-3)


@pytest.mark.parametrize("recovery", ["full", "lora"])
def test_the_recovery_stage_scales_full_training_only(gqa_vlm, recovery):
    student = gqa_vlm.copy()
    parameters = layer_weights(student.model, gqa_vlm.architecture)
    stage = RecoveryStage(student, gqa_vlm, parameters, [], TrainingOptions(recovery=recovery), autocast=False)
    scales = {id(p): group.get("scale", 1.0) for group in stage.optimizer.param_groups for p in group["params"]}
    assert scales.keys() == {id(p) for p in parameters.values()}
    for parameter in parameters.values():
        assert scales[id(parameter)] == (typical_magnitude(parameter) if recovery == "full" else 1.0)


def test_biases_that_softmax_does_not_see_are_not_trained(gqa_vlm, questions):
    vlm = gqa_vlm.copy()
    trained = layer_weights(vlm.model, vlm.architecture)
    biases = {name: p for name, p in vlm.model.named_parameters() if name.endswith("k_proj.bias")}
    still = {name: p for name, p in biases.items() if name not in trained}
    assert still and all("vision_tower" in name for name in still)
    assert all("vision_tower" not in name for name in biases.keys() - still.keys())  # rotary positions turn those of the language model
    batch, _ = next(iter(batches(vlm.encoder, questions, share_prefix=True)))
    with torch.no_grad():
        before = answer_logits(vlm.model, batch)
        for parameter in still.values():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(answer_logits(vlm.model, batch), before, atol=1e-4, rtol=1e-4)
        next(iter(trained.values())).add_(1.0)
        assert (answer_logits(vlm.model, batch) - before).abs().max() > 1e-3


@pytest.mark.parametrize(("amx", "avx512"), [(False, False), (True, False), (False, True)])
def test_bfloat16_is_chosen_where_the_processor_multiplies_it(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    device = torch.device("cpu")
    assert wants_bfloat16("auto", device) == (amx or avx512)
    assert wants_bfloat16("bf16", device) and not wants_bfloat16("fp32", device)


def test_an_update_in_parts_is_the_same_update(vlm, questions, monkeypatch):
    from infoprune.training import loop

    sizes, real = [], loop.pack

    def watched(encoder, rows):
        sizes.append(len(rows))
        return real(encoder, rows)

    monkeypatch.setattr(loop, "pack", watched)
    runs = []
    for most in (8, 1):
        monkeypatch.setattr("infoprune.training.run.rows_that_fit", lambda vlm, architecture, rows, most, fitting=most: min(most, fitting))
        sizes.clear()
        runs.append(infoprune.compress(vlm, questions, **QUICK, recovery="full", recovery_rate=1e-3).training)
        gates = QUICK["gate_steps"] * QUICK["gate_images_per_step"]
        assert set(sizes[:gates]) == {1} and set(sizes[gates:]) == {min(most, 2)}  # every row has a draw of gates to itself
    whole, parts = (run["recovery"]["history"] for run in runs)
    for name in ("cross_entropy", "distillation"):
        assert [values[name] for values in parts] == pytest.approx([values[name] for values in whole], rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("recovery", ["full", "lora"])
def test_towers_that_may_not_be_cut_are_not_trained(vlm, questions, recovery, monkeypatch):
    family, caches, real = vlm.architecture.family, [], RecoveryStage.__init__

    def watched(self, *args, **options):
        real(self, *args, **options)
        caches.append(self.own_cache)

    monkeypatch.setattr(RecoveryStage, "__init__", watched)
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    options = QUICK | {"heads": "information-loss", "towers": ("text",), "flops": 0.9, "ffn": "low-rank"}
    found = weights(infoprune.compress(vlm, questions, **options, recovery=recovery, recovery_rate=1e-2))
    cut = weights(infoprune.compress(vlm, hold_out(questions, 0)[0], **options))

    def inside(name, *paths):
        return name.startswith(tuple(f"{path}." for path in paths))

    vision = [n for n in before if inside(n, family.vision) and not inside(n, *family.projector)]
    assert vision and all(torch.equal(found[name], before[name]) for name in vision)
    assert any(not torch.equal(found[name], cut[name]) for name in found if inside(name, family.text))
    moved = [n for n in before if inside(n, *family.projector) and not torch.equal(found[n], before[n])]
    assert bool(moved) == (recovery == "full")
    assert [cache is not None for cache in caches] == [recovery == "lora"]  # features change with the projector


def test_the_tower_that_is_cut_trains_alone(gqa_vlm):
    site = {s.tower: s for s in gqa_vlm.architecture.attention}
    for towers in ({"vision"}, {"text"}, {"vision", "text"}):
        heads = {site[t].path: HeadDecision(keep_units=(0,), num_units=site[t].num_units, compensate="none") for t in towers}
        plan = CompressionPlan(library="", model_type="", model_id="", heads=heads)
        assert cut_towers(plan, gqa_vlm.architecture) == towers
        vlm = gqa_vlm.copy()
        trained = layer_weights(vlm.model, vlm.architecture, towers)
        assert {"vision" if "vision_tower" in n else "text" for n in trained if "projector" not in n} == towers
        assert any("projector" in name for name in trained)
        wrapper, lora = add_lora(vlm.model, vlm.architecture, 2, 0, towers)
        assert {"vision" if "vision_tower" in name else "text" for name in lora} == towers
        wrapper.unload()
    assert cut_towers(None, gqa_vlm.architecture) == {"vision", "text"}
    assert cut_towers(CompressionPlan(library="", model_type="", model_id=""), gqa_vlm.architecture) == {"vision", "text"}


def test_a_frozen_tower_is_passed_once_per_image(gqa_vlm, questions):
    options = QUICK | {"heads": "information-loss", "towers": ("text",), "flops": 0.9, "evaluate_every": 1, "recovery": "lora"}
    path, passes, real = gqa_vlm.architecture.family.vision, [], RecoveryStage.validate

    def counted(self, step):
        hook = self.student.model.get_submodule(path).register_forward_hook(lambda *a: passes.append(step))
        try:
            return real(self, step)
        finally:
            hook.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecoveryStage, "validate", counted)
        cached = infoprune.compress(gqa_vlm, questions, **options).training["recovery"]["history"]
    assert passes == [0]  # all validation images in one batch, before the first step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infoprune.training.run.fixed_features", lambda *a: False)
        plain = infoprune.compress(gqa_vlm, questions, **options).training["recovery"]["history"]
    for step, other in zip(cached, plain, strict=True):
        assert step == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_early_stopping_keeps_the_best_weights(gqa_vlm, questions):
    quick = QUICK | {"recovery_steps": 40, "evaluate_every": 1, "heads": "information-loss"}
    result = infoprune.compress(gqa_vlm, questions, recovery="full", recovery_rate=1.0, patience=2, **quick)  # a rate that ruins it
    report = result.training["recovery"]
    assert len(report["history"]) < 40
    assert report["best"]["step"] <= len(report["history"]) - 2


def test_bad_training_options_are_refused():
    for bad in ({"recovery": "some"}, {"gate_steps": 0}, {"trackers": ("nope",)}, {"ks_weight": -1.0}, {"gate_lora_rate": 0.0}):
        with pytest.raises(InfoPruneError):
            TrainingOptions(**bad)
    with pytest.raises(InfoPruneError, match="tells training"):
        TrainingOptions(cross_entropy_weight=0.0, distillation_weight=0.0)
    with pytest.raises(InfoPruneError, match="budget"):
        infoprune.CompressionOptions(ks=0.1, heads="trained")


# --- trackers ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracked(monkeypatch):
    """Runs of a tracker that takes the place of TensorBoard's, the only one installed."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    runs = []

    class Recorder(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", True, None

        def __init__(self, run_name, logging_dir):
            super().__init__()
            self.folder, self.config, self.logged, self.finished = Path(logging_dir), None, [], 0
            runs.append(self)

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None, **_):
            assert not self.finished
            self.logged.append((step, values))

        def finish(self):
            self.finished += 1

    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    return runs


TRACKED = QUICK | {"gate_steps": 4, "recovery": "full", "recovery_steps": 3, "trackers": ("tensorboard",)}


@pytest.mark.parametrize("heads", ["trained", "information-loss"])
def test_trackers_see_one_rising_step_and_the_options(gqa_vlm, questions, tmp_path, tracked, heads):
    infoprune.compress(gqa_vlm, questions, work=tmp_path / "small.work", **TRACKED | {"heads": heads})
    (run,) = tracked
    stages = [name.split("/")[0] for _, values in run.logged for name in list(values)[:1]]
    assert stages == ["gates"] * (4 if heads == "trained" else 0) + ["recovery"] * 3
    assert [step for step, _ in run.logged] == list(range(len(stages)))
    assert run.folder == tmp_path / "small.logs" and run.finished == 1
    assert {type(value) for value in run.config.values()} <= {bool, int, float, str}
    asked = {"flops": 0.7, "recovery": "full", "towers": "vision, text", "repair": True, "trackers": "tensorboard"}
    assert asked.items() <= run.config.items() and "speedup" not in run.config


def test_trackers_finish_when_training_fails(gqa_vlm, questions, tmp_path, tracked, monkeypatch):
    from infoprune.training import loop

    def failing(*_):
        raise CalibrationError("NaN")

    monkeypatch.setattr(loop, "_update", failing)
    with pytest.raises(CalibrationError):
        infoprune.compress(gqa_vlm, questions, work=tmp_path / "work", **TRACKED)
    with pytest.raises(CheckpointError, match="other settings"):  # before any stage
        infoprune.compress(gqa_vlm, questions, work=tmp_path / "work", **TRACKED | {"gate_steps": 5})
    assert [run.finished for run in tracked] == [1, 1]


def test_trackers_that_are_not_installed_are_told_before_any_work(gqa_vlm, tmp_path, tracked):
    from infoprune.cli.compress import compress

    names = ["tensorboard", "wandb", "mlflow"]
    with pytest.raises(InfoPruneError, match="not installed: wandb, mlflow"):
        infoprune.compress(gqa_vlm, str(tmp_path / "no.jsonl"), **TRACKED | {"trackers": tuple(names)})
    with pytest.raises(InfoPruneError, match="not installed: wandb, mlflow"):
        compress(model=str(tmp_path / "no model"), output=tmp_path / "small", flops=0.7, recovery="full", tracker=names)
    assert not tracked


def test_logs_lie_beside_the_work_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [logs_folder(work) for work in (Path("small-0.5.work"), tmp_path / "run-0.5", Path("."), None)]
    assert found == [tmp_path / "small-0.5.logs", tmp_path / "run-0.5.logs", Path(f"{tmp_path}.logs"), Path("infoprune.logs")]


# --- the command line, killed and in parallel ----------------------------------------------------------------------------------------


def command(checkpoint, jsonl, out, **extra):
    options = {"flops": 0.7, "heads": "trained", "gate-steps": 6, "recovery": "full", "recovery-steps": 30, "images-per-step": 2}
    options |= {"rank-multiple": 2, "precision": "fp32", "examples": 6} | extra
    pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["-m", "infoprune", "compress", str(checkpoint), "--data", str(jsonl), "-o", str(out), *pairs]


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_killed_and_run_again(checkpoint, jsonl, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run([sys.executable, *command(checkpoint, jsonl, whole)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "whole.work").exists()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("checkpoint_every: 1\n")
    with subprocess.Popen([sys.executable, *command(checkpoint, jsonl, killed), "--recipe", recipe], stderr=subprocess.DEVNULL) as process:
        state = tmp_path / "killed.work" / "recovery.safetensors"
        limit = time.time() + 120
        while not state.exists() and time.time() < limit:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert state.exists() and not killed.exists()
    again = subprocess.run([sys.executable, *command(checkpoint, jsonl, killed), "--recipe", recipe], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "interrupted run" in again.stderr
    expected, found = tensors(whole), tensors(killed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert json.loads((killed / "report.json").read_text())["training"]["recovery"]["steps"] == 30


def test_a_model_is_spread_over_processes_and_comes_back():
    script = str(Path(__file__).with_name("spread_over_processes.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run(launch, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("spread") == 2


class Seen(Exception):
    """What a stage was given."""


@pytest.mark.parametrize("stage", ["GateStage", "RecoveryStage"])
def test_stages_compute_where_the_spread_copy_is(gqa_vlm, questions, monkeypatch, stage):
    @contextmanager
    def spread(self, vlm, dense):  # as on a machine with GPUs, of which the meta device plays the part
        yield replace(vlm, model=vlm.copy().model.to("meta"))

    def shown(*given, autocast, **options):
        found = {"autocast": autocast}
        if stage == "GateStage":
            batch, _ = next(iter(given[6]()))
            found |= {"gates": given[1].log_alpha.device.type, "targets": batch.targets.device.type}
            found |= {"taught": options["taught"](batch, []).device.type}
        raise Seen(found)

    monkeypatch.setattr(TrainingRun, "_spread", spread)
    monkeypatch.setattr("infoprune.training.run.wants_bfloat16", lambda precision, device: device.type)
    monkeypatch.setattr("infoprune.training.run.answer_logits", lambda model, batch: next(model.parameters()))
    monkeypatch.setattr(f"infoprune.training.run.{stage}", shown)
    processes = SimpleNamespace(count=2, index=0, agree=None, same=None)
    run = TrainingRun(TrainingOptions(recovery="full", shard=True), questions, questions, 0, processes, SILENT)
    sites = list(gqa_vlm.architecture.attention)
    costs = flop_costs(sites, Workload(5, 20, 2, {s.path: 100_000 * s.num_units for s in sites}))
    learning = (gqa_vlm, sites, {}, costs, 0.5, [0.5] * len(costs.unit), "none")
    with pytest.raises(Seen) as caught:
        run.learn_heads(*learning, teacher=gqa_vlm.copy()) if stage == "GateStage" else run.recover(gqa_vlm.copy(), gqa_vlm)
    assert set(caught.value.args[0].values()) == {"meta"}


@pytest.mark.parametrize(
    ("asked", "rank", "expected"),
    [("cuda", None, "cuda"), ("cuda", "1", "cuda:1"), ("cuda:0", "1", "cuda:0"), ("cpu", "1", "cpu"), ("mps", "1", "mps")],
)
def test_each_process_has_its_own_gpu(monkeypatch, asked, rank, expected):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert own_device(asked) == expected


@pytest.mark.parametrize("verb", ["compress", "evaluate"])
def test_commands_load_to_the_gpu_of_their_process(monkeypatch, tmp_path, jsonl, verb):
    def load(name, *, device, **options):
        raise Seen(device)

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("infoprune.load", load)
    monkeypatch.setattr("infoprune.model.load", load)
    monkeypatch.setattr("infoprune.model.check_device", lambda name: None)  # a machine with GPUs
    app = typer.Typer()
    (compress_verb if verb == "compress" else evaluate_verb).register(app)
    app.callback()(lambda: None)  # so that the one command keeps its name
    given = ["--flops", "0.5", "-o", str(tmp_path / "out")] if verb == "compress" else []
    found = CliRunner().invoke(app, [verb, "somewhere", "--data", str(jsonl), "--device", "cuda", *given])
    assert isinstance(found.exception, Seen) and found.exception.args == ("cuda:1",)


def test_spread_models_need_equal_parts_of_a_step():
    run = TrainingRun(TrainingOptions(shard=True), [], [], 0, SimpleNamespace(count=3, index=0), SILENT)
    with pytest.raises(InfoPruneError, match=r"equal parts.*images_per_step"):
        run.check_shares("images_per_step")
    replace(run, options=TrainingOptions()).check_shares("images_per_step")  # unequal parts are no harm where each has the whole model
    with pytest.raises(InfoPruneError, match="shard"):
        TrainingOptions(shard=True, gate_lora=2)


@pytest.mark.parametrize(
    ("fields", "named"), [({"heads": "trained"}, "gate_images_per_step"), ({"recovery": "full", "images_per_step": 4}, " images_per_step")]
)
def test_more_processes_than_images_of_a_step_are_told_before_any_work(monkeypatch, gqa_vlm, questions, fields, named):
    crowd = SimpleNamespace(count=5, index=0, end=lambda: None, wait=lambda: None)
    monkeypatch.setattr(Processes, "current", lambda *_: crowd)
    monkeypatch.setattr(sys.modules["infoprune.compress"], "_cut_free", lambda *_: pytest.fail("worked"))
    with pytest.raises(InfoPruneError, match=f"5 processes can't share 4 images per step; raise.*{named}"):
        infoprune.compress(gqa_vlm, questions, flops=0.7, **fields)


def test_processes_agree_on_what_the_first_found():
    class Sum:
        device = "cpu"

        def reduce(self, values, reduction):
            assert reduction == "sum"
            return values + torch.tensor([0.25, 3.0], dtype=torch.float64)  # what the others give: the first's figures and zeros

    second = Processes(Sum())
    Sum.num_processes, Sum.process_index = 2, 1
    assert second.agree(0.5, 7.0) == (0.25, 3.0)
    assert Processes().agree(0.5, 7.0) == (0.5, 7.0)


def history(folder):
    """Terms and norms of the gradients, step by step."""
    training = json.loads((folder / "report.json").read_text())["training"]
    return [step for stage in ("heads", "recovery") for step in training[stage]["history"]]


def test_two_processes_get_the_result_of_one(checkpoint, jsonl, tmp_path):
    one, two, spread = tmp_path / "one", tmp_path / "two", tmp_path / "spread"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    shared = [*launch, *command(checkpoint, jsonl, two)], [*launch, *command(checkpoint, jsonl, spread), "--shard"]
    for arguments in (command(checkpoint, jsonl, one), *shared):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    expected, told = tensors(one), history(one)
    for folder in (two, spread):
        # Weights alone would not tell a gradient that is off by a factor: Adam divides it out.
        for values, wanted in zip(history(folder), told, strict=True):
            assert values == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        found = tensors(folder)
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


# --- the model that gates train on -------------------------------------------------------------------------------------------------


def thinning_of(vlm):
    """Whole blocks gone where they may, a tower's first among them, and others thinned."""
    sites = tuple(vlm.architecture.attention)
    kept = {s.path: list(range(s.num_units))[(number + 1) % 3 :] for number, s in enumerate(sites)}
    return Thinning(sites, kept | {s.path: [] for s in sites if s.layer == 0 and not s.min_units})


def test_what_is_learned_of_the_units_that_are_left_is_told_of_all(vlm):
    thinning = thinning_of(vlm)
    sites, gone = thinning.sites, [path for path, kept in thinning.kept.items() if not kept]
    assert {s.path for s in sites} | set(gone) == set(thinning.kept) and all(s.num_units == len(thinning.kept[s.path]) for s in sites)
    workload = Workload(5, 20, 2, {s.path: 100_000 * s.num_units for s in thinning.dense})
    dense = flop_costs(thinning.dense, workload)
    left = thinning.costs(dense)
    cost = sum(dense.block(number, len(thinning.kept[s.path])) for number, s in enumerate(thinning.dense))
    assert left.dense == pytest.approx(cost) and len(left.unit) == sum(map(len, thinning.kept.values()))
    for number, site in enumerate(sites):
        assert left.block(number, 1) == pytest.approx(dense.block([s.path for s in thinning.dense].index(site.path), 1))
    first = Choice({site.path: [0] for site in sites})
    assert thinning.numbered(first).kept == {path: kept[:1] for path, kept in thinning.kept.items()}
    spread = thinning.spread([1.0] * len(left.unit))
    whole = [float(unit in thinning.kept[s.path]) for s in thinning.dense for unit in range(s.num_units)]
    assert spread == whole


@torch.no_grad()
def test_open_gates_on_a_thinned_model_leave_it_as_it_is(vlm, questions):
    """Also where grouped heads have one group left, which looks like heads that share one key."""
    thinning, inputs = thinning_of(vlm), inputs_of(vlm, questions)
    statistics = statistics_of(vlm, questions)
    heads = {
        s.path: HeadDecision(keep_units=tuple(thinning.kept[s.path]), num_units=s.num_units, compensate="least-squares")
        for s in thinning.dense
        if len(thinning.kept[s.path]) < s.num_units and len(thinning.kept[s.path]) >= s.min_units
    }
    thinning = replace(thinning, kept=thinning.kept | {s.path: list(range(s.num_units)) for s in thinning.dense if s.path not in heads})
    options = CompressionOptions(flops=0.9, repair=False)
    small = apply_decisions(vlm, Decisions(heads, {}, 0.0), options, statistics, [next(iter(batches(vlm.encoder, questions)))[0]])
    before = small.model(**inputs).logits
    left = replace(vlm.architecture, attention=tuple(thinning.sites), ffn=())
    found = calibrate(small.model, left, [b for b, _ in batches(vlm.encoder, questions)])
    gates = HeadGates(thinning.sites)
    for site in thinning.sites:
        block = block_of_model(small.model, site, found, options)
        assert len(block.covariance) == site.num_units * site.unit_width == block.out.shape[1]
        gates.connect_(site.path, Channel.of(block, "least-squares"))
    with gates.attached(small.model):
        gates.values = {site.path: torch.ones(site.num_units) for site in thinning.sites}
        assert torch.equal(small.model(**inputs).logits, before)
        gates.values = {site.path: torch.full((site.num_units,), 0.5) for site in thinning.sites}
        assert not torch.allclose(small.model(**inputs).logits, before, atol=1e-4)


@pytest.mark.parametrize("options", [{"attention_share": 0.01}, {"attention_share": 0.05, "gate_cost": "time"}, {"attention_share": 0.3}])
def test_vision_heads_alone_are_trained_as_far_as_any_stay(vlm, questions, options):
    """Down to none, with which there is nothing to train."""
    given = QUICK | {"towers": ("vision",), "flops": 0.93, "gate_steps": 2} | options
    if options["attention_share"] < 0.1 and any(s.min_units for s in vlm.architecture.attention if s.tower == "vision"):
        with pytest.raises(BudgetError, match="What must stay"):
            infoprune.compress(vlm, questions, **given)
        return
    found = infoprune.compress(vlm, questions, **given)
    assert found.flops_ratio <= 0.93 and found.training["heads"]["steps"] in (0, 2)


def test_the_spread_of_the_start_breaks_between_what_stays_and_what_goes():
    """Also where the units of one tower cost ten times those of the other."""
    owner = torch.arange(2).repeat_interleave(60)
    unit = torch.tensor([1.0, 10.0], dtype=torch.float64)[owner]
    costs = Costs(torch.zeros(2, dtype=torch.float64), unit, owner, torch.zeros(2).bool())
    percentiles = torch.cat([torch.arange(60, 120), torch.arange(60)]) / 120  # the cheap ones stay
    found = start_locations(percentiles, 30.0, costs, 60 / 660)
    stays, goes = found[:60], found[60:]
    assert float(stays.min()) > float(goes.max()) and (stays > 0).sum() >= 54 and (goes < 0).all()
    assert float(costs.share(open_probability(found.double()))) == pytest.approx(60 / 660, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"gate_lora": 2}, {"gate_ffn": True}], ids=["heads", "lora", "ffn"])
def test_the_dense_model_teaches(gqa_vlm, questions, monkeypatch, options):
    """Also gates that train on a model that is cut already."""
    found, real = [], GateStage._teacher

    def watched(self, batch, own, images):
        found.append((real(self, batch, own, images), batch, self.taught is None))
        return found[-1][0]

    asked = {parameter: parameter.requires_grad for parameter in gqa_vlm.model.parameters()}
    with monkeypatch.context() as patched:
        patched.setattr(GateStage, "_teacher", watched)
        infoprune.compress(gqa_vlm, questions, **QUICK | {"flops": 0.6} | options)
    assert found and all(itself == ("gate_ffn" in options) for *_, itself in found)
    for given, batch, _ in found:
        assert not given.requires_grad
        torch.testing.assert_close(given, answer_logits(gqa_vlm.model, batch), rtol=1e-4, atol=1e-4)
    assert {parameter: parameter.requires_grad for parameter in gqa_vlm.model.parameters()} == asked


def test_gates_train_on_a_model_with_the_ffns_that_are_aimed_at(gqa_vlm, questions, monkeypatch):
    seen, real = [], TrainingRun.learn_heads

    def watched(self, vlm, sites, *rest, **options):
        seen.append((vlm, sites))
        return real(self, vlm, sites, *rest, **options)

    monkeypatch.setattr(TrainingRun, "learn_heads", watched)
    found = infoprune.compress(gqa_vlm, questions, **QUICK | {"flops": 0.6})
    (gated, sites), heads = seen[0], found.training["heads"]
    widths = [gated.model.get_submodule(f"{s.path}.{s.names.down}").weight.shape[1] for s in gqa_vlm.architecture.ffn]
    assert any(width < s.intermediate_size for width, s in zip(widths, gqa_vlm.architecture.ffn, strict=True))
    kept = {path: set(decision.keep_units) for path, decision in found.vlm.plan.heads.items()}
    left = {site.path: set(site.kept) for site in sites}
    assert all(units <= left.get(path, set()) for path, units in kept.items())
    assert {path: len(z) for path, z in heads["gates"].items()} == {s.path: s.num_units for s in gqa_vlm.architecture.attention}
    assert all(len(values) == sum(s.num_units for s in gqa_vlm.architecture.attention) for values in heads["trajectory"])


def test_a_process_that_comes_late_does_not_read_what_the_first_has_written_meanwhile(questions, tmp_path):
    """It would leave out the broadcast in which the others wait for it."""
    told = iter([None, ["found by the first"]])
    processes = SimpleNamespace(count=2, index=1, same=lambda value: next(told), wait=lambda: None)
    work = WorkFolder(tmp_path)
    save_state(work.file("ranking"), {}, {"found": ["written meanwhile"]})
    run = TrainingRun(TrainingOptions(), questions, questions, 0, processes, SILENT, work)
    assert run.remembered("ranking", lambda: ["found by itself"]) == ["found by the first"]


def test_every_row_of_a_step_has_a_draw_to_itself(gqa_vlm, questions, tmp_path, monkeypatch):
    """Also where images of one name, in folders of their own, are asked the same."""
    copies = []
    for number, example in enumerate(questions[:3]):
        (tmp_path / str(number)).mkdir()
        copies.append(replace(questions[0], image=Path(shutil.copy(example.image, tmp_path / str(number) / "image.png"))))
    seeds, real = [], HeadGates.sample_

    def watched(self, seed):
        seeds.append(seed)
        return real(self, seed)

    monkeypatch.setattr(HeadGates, "sample_", watched)
    infoprune.compress(gqa_vlm, [*copies, *questions], **QUICK | {"flops": 0.6, "gate_images_per_step": 20})
    assert len(seeds) > 20 and len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_validation_that_is_no_number_ends_training(loss):
    with pytest.raises(CalibrationError, match="Validating gates at step 3 found a loss of"):
        check_finite("gates", 3, loss)
