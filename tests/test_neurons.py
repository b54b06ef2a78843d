from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from infoprune import widths
from infoprune.architecture import FFNSite
from infoprune.calibrate import calibrate
from infoprune.criteria.ffn import FFNOptions
from infoprune.criteria.neurons import RANKINGS, Neurons, neurons_of, rank_neurons
from infoprune.decide import decide
from infoprune.errors import InfoPruneError, PlanError
from infoprune.families.towers import LLAMA_STYLE
from infoprune.moments import DiagonalMoments, Moments
from infoprune.options import CompressionOptions
from infoprune.packing import answer_logits, batches
from infoprune.plan import ffn_parameters
from infoprune.repair import cut_and_repair_
from infoprune.saliency import weight_saliencies
from infoprune.site_costs import FlopCosts
from infoprune.site_statistics import SiteStatistics
from infoprune.solve import SolvedSite, solve_sites
from infoprune.steps import apply_decisions, measure
from infoprune.surgery import apply_, kept_places
from test_families import narrowing, plan_of
from test_repair import stream
from tiny_models import TINY, build

SITE = FFNSite("f", "text", 0, LLAMA_STYLE, 12, 40)


def random_neurons(seed: int = 0, site: FFNSite = SITE) -> tuple[Neurons, torch.Tensor]:
    """An FFN's neurons, and what its down projection reads."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z = normal(500, site.intermediate_size) * torch.rand(site.intermediate_size, generator=generator, dtype=torch.float64) + 0.5
    moments = DiagonalMoments(site.intermediate_size)
    moments.update(z)
    g = normal(300, site.hidden_size)
    inputs = tuple(normal(site.intermediate_size, site.hidden_size) for _ in range(2))
    down, saliency = normal(site.hidden_size, site.intermediate_size), normal(site.intermediate_size).abs()
    return Neurons(site, moments.variance, moments.variance, inputs, down, g.T @ g / 300, saliency), z


def solved(criterion: str, count: int = 3) -> list[SolvedSite]:
    sites = [FFNSite(f"f{n}", "text", n, LLAMA_STYLE, 12, 40) for n in range(count)]
    generator = torch.Generator().manual_seed(0)
    ranked = [rank_neurons(random_neurons(site.layer, site)[0], criterion, generator) for site in sites]
    return [SolvedSite(site, 7.0, neurons=removal) for site, removal in zip(sites, ranked, strict=True)]


def test_diagonal_moments_are_those_of_every_entry():
    torch.manual_seed(0)
    x, w = torch.randn(60, 4, dtype=torch.float64) + 3, torch.rand(60, dtype=torch.float64)
    whole, diagonal = Moments(4), DiagonalMoments(4)
    whole.update(x, w)
    for part in (slice(25), slice(25, None)):
        diagonal.update(x[part], w[part])
    torch.testing.assert_close(diagonal.mean, whole.mean)
    torch.testing.assert_close(diagonal.variance, whole.covariance.diagonal())
    torch.testing.assert_close(diagonal.second_moment, whole.second_moment.diagonal())


def test_energy_is_the_measured_loss_of_each_neuron_at_its_mean():
    neurons, z = random_neurons()
    removal = rank_neurons(neurons, "energy", torch.Generator())
    for neuron in (0, 7, 39):
        error = torch.outer(z[:, neuron] - z[:, neuron].mean(), neurons.down[:, neuron])
        measured = 0.5 * float(((error @ neurons.metric) * error).sum() / len(z))
        assert float(removal.scores[neuron]) == pytest.approx(measured, rel=1e-9)


def test_energy_counts_the_mean_where_nothing_is_left_in_its_place():
    _, z = random_neurons()
    statistics = SiteStatistics(neurons=DiagonalMoments(40))
    statistics.neurons.update(z)
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(12, 40, generator=generator)
    kept, gone = (neurons_of(SITE, statistics, (), down, "identity", centred) for centred in (True, False))
    measured = 0.5 * (z[:, :, None] * down.double().T).square().sum(2).mean(0)
    torch.testing.assert_close(RANKINGS["energy"](gone, generator), measured)
    assert (RANKINGS["energy"](kept, generator) < measured).all()


@pytest.mark.parametrize("criterion", RANKINGS)
def test_removals_are_nested_and_their_losses_grow(criterion):
    neurons, _ = random_neurons()
    removal = rank_neurons(neurons, criterion, torch.Generator().manual_seed(1))
    assert sorted(removal.order.tolist()) == list(range(40))
    assert (removal.scores[removal.order].diff() >= 0).all()
    assert removal.losses[0] == 0 and (removal.losses.diff() >= 0).all()
    total = rank_neurons(neurons, "energy", torch.Generator()).losses
    assert float(removal.losses[-1]) == pytest.approx(float(total[-1])) and (total <= removal.losses + 1e-12).all()


def test_fluctuation_is_energy_under_a_plain_metric_and_standardised_within_an_ffn():
    neurons, _ = random_neurons()
    plain = Neurons(SITE, neurons.variance, neurons.lost, neurons.inputs, neurons.down, 2 * torch.eye(12, dtype=torch.float64))
    found, energy = (rank_neurons(plain, name, torch.Generator()) for name in ("fluctuation", "energy"))
    assert torch.equal(found.order, energy.order)
    assert float(found.scores.mean()) == pytest.approx(0, abs=1e-12) and float(found.scores.std()) == pytest.approx(1)
    torch.testing.assert_close(found.scores * energy.scores.std() + energy.scores.mean(), energy.scores)


def test_random_depends_on_the_seed():
    neurons, _ = random_neurons()
    first, again, other = (rank_neurons(neurons, "random", torch.Generator().manual_seed(seed)).order for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- widths -----------------------------------------------------------------------------------------------------------------------


def cost(decision):
    return float(ffn_parameters(SITE, decision))


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_a_ladder_falls_in_cost_grows_in_loss_and_stays_short(multiple):
    item = solved("energy", 1)[0]
    options = widths.ladder(item, cost, multiple, 0.0)
    assert len(options) <= widths.MOST_OPTIONS
    assert options[-1].choice is None and options[-1].loss == 0 and options[-1].cost == cost(None)
    assert options[0].cost == 0 and options[0].choice == ("f0", 0)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(options))
    assert all(option.choice[1] % multiple == 0 for option in options[:-1])
    assert widths.ladder(item, cost, multiple, 0.3)[0].choice[1] >= 12
    kept = widths.decision(item, 8)
    assert set(kept.keep_neurons) == set(item.neurons.order[-8:].tolist()) and cost(kept) == cost(None) / 5


def test_one_ranking_takes_the_best_neurons_of_all_ffns():
    items = solved("fluctuation")
    found = widths.ranked(items, [40.0] * 3, 60.0, 1)
    assert sum(found.values()) == 60
    threshold = torch.cat([item.neurons.scores for item in items]).sort(descending=True).values[59]
    assert found == {item.site.path: int((item.neurons.scores >= threshold).sum()) for item in items}


def test_ranked_and_uniform_widths_keep_to_the_budget_in_multiples():
    items = solved("magnitude")
    for target in (30.0, 61.0, 119.0):
        found = widths.ranked(items, [40.0] * 3, target, 8)
        assert target - 8 < sum(found.values()) <= target and all(width % 8 == 0 and width for width in found.values())
    assert widths.ranked(items, [40.0] * 3, 120.0, 8) == dict.fromkeys(found, 40)
    assert widths.uniform(items, 0.5, 8) == dict.fromkeys(found, 16) and widths.uniform(items, 0.01, 8) == dict.fromkeys(found, 8)
    assert widths.uniform(items, 1.0, 16) == dict.fromkeys(found, 40)


# --- on models --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", TINY[1:3], ids=lambda tiny: tiny.name)  # grouped and multi-query heads
@pytest.mark.parametrize("recompute", [False, True])
def test_saliencies_equal_weights_times_gradients(tiny, recompute, questions):
    vlm = build(tiny)
    inputs = [b for b, _ in batches(vlm.encoder, questions, images_per_batch=2)]
    found = weight_saliencies(vlm.model, vlm.architecture, inputs, recompute=recompute)
    assert all(p.grad is None and p.requires_grad for p in vlm.model.parameters())
    losses = [nn.functional.cross_entropy(answer_logits(vlm.model, b), b.targets, reduction="sum") for b in inputs]
    (sum(losses) / sum(len(b.targets) for b in inputs)).backward()
    for site in vlm.architecture.ffn:
        block = vlm.model.get_submodule(site.path)
        product = {name: (m.weight * m.weight.grad).abs().double() for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        down = product.pop(site.names.down)
        torch.testing.assert_close(found[site.path], down.sum(0) + sum(p.sum(1) for p in product.values()), rtol=1e-4, atol=1e-9)
    for site in vlm.architecture.attention:
        block = vlm.model.get_submodule(site.path)
        rows = kept_places(site, range(site.num_units))[1]
        assert set(rows) == ({site.names.query} if site.multi_query else set(site.names.projections))
        linears = [getattr(block, name).weight for name in (*rows, site.names.out)]
        total = sum(float((w * w.grad).detach().abs().sum()) for w in linears)
        assert float(found[site.path].sum()) == pytest.approx(total, rel=1e-4)


def test_narrow_ffns_need_no_moments_of_factors(vlm, questions):
    inputs = [b for b, _ in batches(vlm.encoder, questions, images_per_batch=2)]
    options = CompressionOptions(flops=0.6)
    assert not options.needs.factors and CompressionOptions(flops=0.6, ffn="low-rank").needs.factors
    found = []
    for factors in (False, True):
        statistics = calibrate(vlm.model, vlm.architecture, inputs, **options.needs.moments | {"factors": factors})
        solved = solve_sites(vlm.model, vlm.architecture, statistics, options)
        _, dense, workload = measure(vlm, questions)
        decisions = decide(solved, FlopCosts(workload), dense.total, options)
        found.append(apply_decisions(vlm, decisions, options, statistics, inputs).model.state_dict())
        sites = [statistics.sites[site.path] for site in vlm.architecture.ffn]
        assert all(("input" in site.by_class) == factors == (site.input_gradient is not None) for site in sites)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@torch.no_grad()
def test_means_that_were_not_calibrated_are_asked_for(gqa_vlm, questions):
    with torch.enable_grad():
        statistics = calibrate(gqa_vlm.model, gqa_vlm.architecture, [b for b, _ in batches(gqa_vlm.encoder, questions)])
    plan = plan_of(gqa_vlm, heads=False, ffn=False).model_copy(update={"ffn": narrowing(gqa_vlm)})
    with pytest.raises(PlanError, match="were not calibrated"):
        apply_(gqa_vlm.model, gqa_vlm.architecture, plan, statistics)


@torch.no_grad()
@pytest.mark.parametrize("centred", [True, False])
def test_repair_refits_narrowed_ffns(questions, centred):
    vlm, plain = build(TINY[1]), build(TINY[1])
    inputs = [b for b, _ in batches(vlm.encoder, questions, images_per_batch=3)]
    with torch.enable_grad():
        statistics = calibrate(vlm.model, vlm.architecture, inputs, weighting="uniform", neurons=True)
    plan = plan_of(vlm, heads=False, ffn=False).model_copy(update={"ffn": narrowing(vlm), "method": {"centred": centred}})
    dense = stream(vlm.model, vlm, inputs)
    apply_(plain.model, vlm.architecture, plan, statistics)
    cut_and_repair_(vlm.model, vlm.architecture, plan, statistics, inputs, FFNOptions(centred=centred), ridge=1e-4)
    before, after = (float((stream(m.model, vlm, inputs) - dense).square().mean()) for m in (plain, vlm))
    assert after < before
    assert {n: p.shape for n, p in plain.model.named_parameters()} == {n: p.shape for n, p in vlm.model.named_parameters()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "width"), ({"flops": 0.9}, "width"), ({"heads": "none"}, "width"), ({"flops": None, "speedup": 1.2}, "width"),
     ({"flops": None, "max_drop": 1.0}, "width"), ({"heads": "trained"}, "width"), ({"neurons": "fluctuation"}, "width"),
     ({"flops": 0.2, "ffn": "low-rank"}, "low-rank"), ({"ks": 0.1, "flops": None}, "low-rank"), ({"ffn": "none"}, "none"),
     ({"structure": "separate"}, "low-rank"), ({"shrinkage": 0.0}, "low-rank"), ({"whitening": "none"}, "low-rank"),
     ({"allocation": "tolerance"}, "low-rank"), ({"layers": "block-influence"}, "low-rank")],
)  # fmt: skip
def test_ffns_keep_fewer_neurons_unless_an_option_is_about_ranks(given, expected):
    assert CompressionOptions(**({"flops": 0.5} | given)).ffn == expected


@pytest.mark.parametrize("shrinkage", [-0.1, 1.5])
def test_shrinkage_is_a_share(shrinkage):
    with pytest.raises(InfoPruneError, match="shrinkage must be within 0 to 1"):
        CompressionOptions(flops=0.5, shrinkage=shrinkage)
