from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from infoprune.architecture import AttentionSite, FFNSite
from infoprune.criteria.ffn import FFNOptions, factorize_down, factorize_inputs, shrunk
from infoprune.criteria.heads import (
    CRITERIA,
    RANKINGS,
    Block,
    block_of,
    compensate,
    conditional_rate_score,
    erank_score,
    fluctuation_score,
    information_loss,
    ks_score,
    rank_units,
    removal_loss,
    single_losses,
    taylor_score,
)
from infoprune.errors import CalibrationError
from infoprune.families.towers import CLIP_STYLE, LLAMA_STYLE
from infoprune.ks_rule import _removable
from infoprune.linalg import cholesky_factor, descending_eigvalsh, row_products
from infoprune.moments import Moments
from infoprune.options import CompressionOptions
from infoprune.site_statistics import SiteStatistics
from infoprune.spectrum import ks_distance

SITE = AttentionSite("a", "text", 0, LLAMA_STYLE, 4, 4, 5, 16, min_units=1)


def random_block(seed: int = 0, site: AttentionSite = SITE, duplicate: tuple[int, int] | None = None) -> tuple[Block, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(site.num_units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    n = site.num_units * site.unit_width
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    contexts = torch.randn(400, n, generator=generator, dtype=torch.float64) @ mix + 0.5
    if duplicate:
        a, b = (slice(u * site.unit_width, (u + 1) * site.unit_width) for u in duplicate)
        contexts[:, b] = contexts[:, a] + 1e-4 * torch.randn(400, site.unit_width, generator=generator, dtype=torch.float64)
    moments = Moments(n)
    moments.update(contexts)
    out = torch.randn(site.hidden_size, n, generator=generator, dtype=torch.float64)
    gradient = torch.randn(300, site.hidden_size, generator=generator, dtype=torch.float64)
    return Block(site, moments.covariance, moments.mean, out, gradient.T @ gradient / 300, saliency=saliency), contexts


def weighted_loss(block: Block, error: torch.Tensor) -> float:
    error = error - error.mean(0)
    return 0.5 * float(((error @ block.metric) * error).sum() / len(error))


def test_factors_exist_however_far_off_the_moments_are():
    """Fewer vectors than dimensions, in float32, about a large mean: eigenvalues below zero by more than the floor."""
    torch.manual_seed(0)
    x = torch.randn(60, 120) + 30 * torch.randn(120)
    moment = ((x.T @ x) / len(x) - torch.outer(x.mean(0), x.mean(0))).double()
    assert float(torch.linalg.eigvalsh(moment)[0]) < -1e-6 * float(moment.diagonal().max())
    factor = cholesky_factor(moment)
    assert torch.isfinite(factor).all()
    torch.testing.assert_close(factor @ factor.T, moment, atol=2e-2 * float(moment.diagonal().max()), rtol=0)


def test_greedy_losses_equal_the_schur_complement_of_each_set():
    block, _ = random_block()
    removal = information_loss(block)
    assert len(removal.order) == block.site.num_units - 1
    for k in range(1, len(removal.order) + 1):
        assert removal.losses[k] == pytest.approx(removal_loss(block, removal.order[:k]), rel=1e-8)


@pytest.mark.parametrize("compensation", ["least-squares", "mean", "none"])
def test_losses_along_a_given_order_equal_those_of_each_set(compensation):
    block, _ = random_block(5)
    removal = information_loss(block, compensation, [2, 0, 3])
    assert removal.order == [2, 0, 3] != information_loss(block, compensation).order and removal.losses[0] == 0
    for k in range(1, 4):
        assert removal.losses[k] == pytest.approx(removal_loss(block, removal.order[:k], compensation), rel=1e-8)


def test_single_losses_equal_those_of_sets_of_one():
    block, _ = random_block(6)
    assert single_losses(block) == pytest.approx([removal_loss(block, [u]) for u in range(4)], rel=1e-8)


def test_first_greedy_choice_is_the_best_single_removal():
    block, _ = random_block(3)
    removal = information_loss(block)
    assert removal.losses[1] == pytest.approx(min(removal_loss(block, [u]) for u in range(4)), rel=1e-9)


def test_set_loss_equals_the_measured_loss_after_compensation():
    block, contexts = random_block(1)
    for removed in itertools.combinations(range(4), 2):
        kept = [u for u in range(4) if u not in removed]
        weight, bias = compensate(block, kept)
        assert bias is not None
        error = contexts @ block.out.T - (contexts[:, block.index(kept)] @ weight.T + bias)
        assert removal_loss(block, list(removed)) == pytest.approx(weighted_loss(block, error), rel=1e-6)
        assert float(error.mean(0).abs().max()) < 1e-9  # the bias carries the means


def test_compensation_is_never_worse_than_plain_removal():
    for seed in range(5):
        block, _ = random_block(seed)
        for count in (1, 2, 3):
            for removed in itertools.combinations(range(4), count):
                losses = [removal_loss(block, list(removed), c) for c in ("least-squares", "mean", "none")]
                assert losses[0] <= losses[1] * (1 + 1e-9) and losses[1] <= losses[2] * (1 + 1e-9)


@pytest.mark.parametrize("compensation", ["mean", "none"])
def test_losses_without_regression_are_the_measured_ones(compensation):
    block, contexts = random_block(1)
    for count in (1, 2, 4):
        for removed in itertools.combinations(range(4), count):
            kept = [u for u in range(4) if u not in removed]
            weight, bias = compensate(block, kept, compensation)
            assert torch.equal(weight, block.out[:, block.index(kept)])  # columns stay as they are
            error = contexts @ block.out.T - contexts[:, block.index(kept)] @ weight.T - (0 if bias is None else bias)
            measured = 0.5 * float(((error @ block.metric) * error).sum() / len(error))
            assert removal_loss(block, list(removed), compensation) == pytest.approx(measured, rel=1e-9)
            assert (bias is None) == (compensation == "none")


@pytest.mark.parametrize("compensation", ["mean", "none"])
def test_greedy_losses_without_regression_equal_those_of_each_set(compensation):
    block, _ = random_block(4)
    removal = information_loss(block, compensation)
    assert len(removal.order) == 3
    for k in range(1, 4):
        assert removal.losses[k] == pytest.approx(removal_loss(block, removal.order[:k], compensation), rel=1e-8)
    assert removal.losses[1] == pytest.approx(min(removal_loss(block, [u], compensation) for u in range(4)), rel=1e-9)


def test_the_ridge_is_for_regression_alone():
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randn(50, 20, generator=generator, dtype=torch.float64)
    statistics = SiteStatistics(by_class={"input": {"all": Moments(20)}})
    statistics.by_class["input"]["all"].update(contexts)
    block = block_of(SITE, statistics, torch.randn(16, 20, generator=generator))
    torch.testing.assert_close(block.measured, torch.cov(contexts.T, correction=0))
    lost = contexts[:, block.columns(2)] @ block.out[:, block.columns(2)].T
    assert removal_loss(block, [2], "mean") == pytest.approx(0.5 * float((lost - lost.mean(0)).square().sum() / 50), rel=1e-9)


def test_fluctuation_is_standardised_over_the_channels_of_a_block():
    block, contexts = random_block(5)
    channel = [(float(contexts[:, j].var(correction=0)) * float(block.out[:, j] @ block.out[:, j])) ** 2 for j in range(20)]
    mean = sum(channel) / 20
    deviation = (sum((c - mean) ** 2 for c in channel) / 19) ** 0.5
    expected = [sum((channel[j] - mean) / deviation for j in range(5 * u, 5 * u + 5)) / 5 for u in range(4)]
    scores = fluctuation_score(block, torch.Generator())
    assert scores == pytest.approx(expected, rel=1e-9)
    assert sum(scores) == pytest.approx(0, abs=1e-9)
    louder = Block(SITE, 9 * block.covariance, 3 * block.mean, 2 * block.out, block.metric)
    assert fluctuation_score(louder, torch.Generator()) == pytest.approx(scores, rel=1e-9)  # blocks can be compared


def test_first_order_scores_have_norm_one_and_must_have_been_gathered():
    block, _ = random_block()
    with pytest.raises(CalibrationError, match="heads='taylor'"):
        taylor_score(block, torch.Generator())
    for scale in (1.0, 1e-3):
        known = dataclasses.replace(block, sensitivity=scale * torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64))
        assert taylor_score(known, torch.Generator()) == pytest.approx([0.6, 0, 0.8, 0])
    assert taylor_score(dataclasses.replace(block, sensitivity=torch.zeros(4)), torch.Generator()) == [0, 0, 0, 0]


def test_a_duplicated_head_has_no_conditional_rate_and_is_free_to_remove_once():
    block, _ = random_block(2, duplicate=(1, 3))
    rates = conditional_rate_score(block, torch.Generator())
    assert max(rates[1], rates[3]) < 1e-3 * min(rates[0], rates[2])
    removal = information_loss(block)
    assert removal.order[0] in (1, 3)
    assert removal.losses[1] < 1e-4 * removal.losses[2]
    assert removal_loss(block, [1, 3]) > 1e3 * removal_loss(block, [1])  # a set function: both together are not free


def test_erank_of_a_head_is_that_of_its_output_covariance():
    block, contexts = random_block(4)
    c = block.columns(2)
    output = contexts[:, c] @ block.out[:, c].T
    values = torch.linalg.eigvalsh(torch.cov(output.T, correction=0)).clamp_min(0)
    p = values / values.sum()
    expected = float(torch.exp(-torch.special.xlogy(p, p).sum()))
    assert erank_score(block, torch.Generator())[2] == pytest.approx(expected, rel=1e-8)


def test_ks_scores_are_distances_between_the_spectra_of_all_and_of_the_others():
    block, contexts = random_block(7)
    centred = contexts - contexts.mean(0)

    def spectrum(units):
        kept = block.index(units)
        written = centred[:, kept] @ block.out[:, kept].T
        return descending_eigvalsh(written.T @ written / len(written))

    expected = [ks_distance(spectrum([0, 1, 2, 3]), spectrum([u for u in range(4) if u != unit])) for unit in range(4)]
    assert ks_score(block, torch.Generator()) == pytest.approx(expected, rel=1e-6)


def test_every_criterion_scores_every_unit_and_random_depends_on_the_seed():
    blocks = [dataclasses.replace(random_block(seed)[0], sensitivity=torch.arange(4.0)) for seed in range(2)]
    blocks[1] = dataclasses.replace(blocks[1], site=AttentionSite("b", "text", 1, LLAMA_STYLE, 4, 4, 5, 16))
    for name in CRITERIA[1:]:
        scores = rank_units(blocks, name)
        assert set(scores) == {"a", "b"}
        assert all(len(s) == 4 and torch.isfinite(torch.tensor(s)).all() for s in scores.values())
    assert rank_units(blocks, "random", seed=1) != rank_units(blocks, "random", seed=2)
    assert set(CRITERIA) == {"information-loss", "erank-ks", *RANKINGS}


# --- FFN ----------------------------------------------------------------------------------------------------------------------------

GATED = FFNSite("f", "text", 0, LLAMA_STYLE, 12, 20)
PLAIN = FFNSite("p", "vision", 0, CLIP_STYLE, 12, 20)


def ffn_case(seed: int, out_features: int):
    """x, g at the output of a linear, and the statistics that calibration would have of them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(500, 12) @ normal(12, 12) + 1.0
    weight = normal(out_features, 12)
    g = normal(500, out_features) @ normal(out_features, out_features)
    statistics = SiteStatistics()
    statistics.by_class["input"] = {"all": Moments(12)}
    statistics.by_class["input"]["all"].update(x)
    statistics.input_gradient = Moments(12)
    statistics.input_gradient.update(g @ weight)
    statistics.intermediate_gradient_energy = float(g.square().sum())
    return x, weight, g, statistics


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("centred", [True, False])
def test_measured_error_equals_the_discarded_tail(rank, centred):
    x, weight, _, statistics = ffn_case(0, 20)
    solved = factorize_inputs(PLAIN, statistics, weight, "up", FFNOptions("identity", centred))
    a, b, bias = solved.factors(rank)
    error = x @ weight.T - (x @ a.T @ b.T + bias)
    assert float(error.square().sum() / len(x)) == pytest.approx(float(solved.tails[rank]), rel=1e-6)


def test_two_sided_tail_is_the_error_in_the_tasks_metric():
    from infoprune.criteria.ffn import METRIC_RIDGE

    x, weight, g, statistics = ffn_case(1, 40)
    solved = factorize_inputs(GATED, statistics, weight, "joint", FFNOptions("task"))
    metric = g.T @ g / len(g)
    metric = metric + METRIC_RIDGE * metric.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    a, b, bias = solved.factors(5)
    error = x @ weight.T - (x @ a.T @ b.T + bias)
    assert float(((error @ metric) * error).sum() / len(x)) == pytest.approx(float(solved.tails[5]), rel=1e-6)


def test_task_metric_beats_the_plain_one_in_the_tasks_metric():
    x, weight, g, statistics = ffn_case(2, 40)
    metric = g.T @ g / len(g)

    def loss(options):
        a, b, bias = factorize_inputs(GATED, statistics, weight, "joint", options).factors(4)
        error = x @ weight.T - (x @ a.T @ b.T + bias)
        return float(((error @ metric) * error).sum())

    assert loss(FFNOptions("task")) < loss(FFNOptions("identity"))


def test_centring_is_never_worse():
    for seed in range(4):
        x, weight, _, statistics = ffn_case(seed, 20)
        losses = []
        for centred in (True, False):
            a, b, bias = factorize_inputs(PLAIN, statistics, weight, "up", FFNOptions("identity", centred)).factors(3)
            losses.append(float((x @ weight.T - (x @ a.T @ b.T + bias)).square().sum()))
        assert losses[0] <= losses[1] * (1 + 1e-9)


@pytest.mark.parametrize("with_bias", [True, False])
def test_output_side_tail_and_full_rank(with_bias):
    generator = torch.Generator().manual_seed(5)
    h = torch.randn(600, 20, generator=generator, dtype=torch.float64) + 0.3
    weight = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    bias = torch.randn(12, generator=generator, dtype=torch.float64) if with_bias else None
    y = h @ weight.T + (bias if bias is not None else 0)
    statistics = SiteStatistics()
    statistics.by_class["output"] = {"all": Moments(12)}
    statistics.by_class["output"]["all"].update(y)
    statistics.output_gradient = Moments(12)
    statistics.output_gradient.update(torch.randn(600, 12, generator=generator, dtype=torch.float64))
    for options in (FFNOptions("identity"), FFNOptions("identity", centred=False), FFNOptions("task")):
        solved = factorize_down(statistics, weight, bias, options)
        a, b, correction = solved.factors(5)
        error = y - (h @ a.T @ b.T + correction + (bias if bias is not None else 0))
        metric = solved.root @ solved.root.T
        assert float(((error @ metric) * error).sum() / len(y)) == pytest.approx(float(solved.tails[5]), rel=1e-6)
        a, b, correction = solved.factors(12)
        torch.testing.assert_close(b @ a, weight, atol=1e-8, rtol=1e-8)
        assert float(correction.abs().max()) < 1e-7


def svd_product(weight, moment, rank):
    """Best approximation of rank ``rank`` under an input moment, by its Cholesky factor and a full SVD."""
    root = torch.linalg.cholesky(moment)
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize("whitening", ["full", "diagonal", "none"])
def test_whitened_factors_are_those_of_the_dense_formula(whitening):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(500, 12, generator=generator, dtype=torch.float64) @ torch.randn(12, 12, generator=generator, dtype=torch.float64) + 0.5
    weight = torch.randn(20, 12, generator=generator, dtype=torch.float64)
    h = torch.randn(500, 20, generator=generator, dtype=torch.float64).exp() - 1
    down = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    statistics = SiteStatistics(by_class={"input": {"all": Moments(12)}, "output": {"all": Moments(12)}})
    statistics.by_class["input"]["all"].update(x)
    statistics.by_class["output"]["all"].update(h @ down.T)
    statistics.magnitudes = {"input": x.abs().sum(0), "intermediate": h.abs().sum(0)}
    options = FFNOptions("identity", centred=False, structure="separate", whitening=whitening)
    solved = factorize_inputs(PLAIN, statistics, weight, "up", options), factorize_down(statistics, down, None, options)
    for factorization, w, z in zip(solved, (weight, down), (x, h), strict=True):  # the down projection too, by its m x m input moment
        moment = {"full": z.T @ z / 500, "diagonal": torch.diag(z.abs().mean(0)), "none": torch.eye(z.shape[1], dtype=torch.float64)}
        a, b, correction = factorization.factors(4)
        torch.testing.assert_close(b @ a, svd_product(w, moment[whitening], 4), atol=1e-8, rtol=1e-8)
        assert not correction.any()
        energies = torch.linalg.svdvals(w @ torch.linalg.cholesky(moment[whitening])).square()
        torch.testing.assert_close(factorization.energies, energies, atol=1e-8, rtol=1e-8)
    if whitening == "full":  # what an output side of size m x m would give
        _, u = torch.linalg.eigh(weight @ (x.T @ x) @ weight.T)
        a, b, _ = solved[0].factors(4)
        torch.testing.assert_close(b @ a, u[:, -4:] @ u[:, -4:].T @ weight, atol=1e-8, rtol=1e-8)


def test_zero_gradient_makes_the_site_free_but_still_sensible():
    _, weight, _, statistics = ffn_case(6, 20)
    statistics.input_gradient = Moments(12)
    statistics.intermediate_gradient_energy = 0.0
    solved = factorize_inputs(PLAIN, statistics, weight, "up", FFNOptions("task"))
    assert float(solved.tails[0]) == 0
    assert all(torch.isfinite(part).all() for part in solved.factors(3))


def test_cholesky_factor():
    torch.manual_seed(0)
    x = torch.randn(30, 6, dtype=torch.float64)
    matrix = x.T @ x
    factor = cholesky_factor(matrix)
    torch.testing.assert_close(factor @ factor.T, matrix)
    assert torch.equal(factor, factor.tril())
    lower = x[:3].T @ x[:3]  # of rank 3: a floor is added, and nothing is amplified beyond it
    factor, top = cholesky_factor(lower), float(lower.diagonal().max())
    torch.testing.assert_close(factor @ factor.T, lower + 1e-6 * top * torch.eye(6, dtype=torch.float64), atol=1e-12 * top, rtol=0)
    assert float(torch.linalg.svdvals(factor).min()) ** 2 >= 0.99e-6 * top
    assert torch.equal(cholesky_factor(torch.zeros(4, 4, dtype=torch.float64)), torch.eye(4, dtype=torch.float64))


def narrow_case():
    """Inputs that calibration shows in 6 of 12 directions; up and down projection, which read another one most; and their statistics."""
    generator = torch.Generator().manual_seed(9)
    directions = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(500, 6, generator=generator, dtype=torch.float64) @ directions[:6]
    up = torch.randn(20, 12, generator=generator, dtype=torch.float64)
    up += 3 * torch.outer(torch.randn(20, generator=generator, dtype=torch.float64), directions[11])
    down = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    statistics = SiteStatistics(by_class={"input": {"all": Moments(12)}, "output": {"all": Moments(12)}})
    statistics.by_class["input"]["all"].update(x)
    statistics.by_class["output"]["all"].update((x @ up.T) @ down.T)
    return x, up, down, statistics


def test_shrunk_moments_keep_their_energy_and_end_without_the_data():
    x, up, down, statistics = narrow_case()
    moment, shape = x.T @ x / len(x), torch.eye(12, dtype=torch.float64)
    assert shrunk(moment, shape, 0.0) is moment
    for shrinkage in (0.2, 1.0):
        assert float(shrunk(moment, shape, shrinkage).trace()) == pytest.approx(float(moment.trace()))
    assert float(torch.linalg.eigvalsh(shrunk(moment, shape, 0.2)).min()) == pytest.approx(0.2 * float(moment.trace()) / 12)
    whole = FFNOptions("identity", centred=False, structure="separate", shrinkage=1.0)
    sides = factorize_inputs(PLAIN, statistics, up, "up", whole), factorize_down(statistics, down, None, whole)
    for solved, weight in zip(sides, (up, down), strict=True):
        a, b, _ = solved.factors(5)
        torch.testing.assert_close(b @ a, svd_product(weight, torch.eye(weight.shape[1], dtype=torch.float64), 5), atol=1e-8, rtol=1e-8)


def test_shrinkage_keeps_what_calibration_did_not_show():
    x, up, down, statistics = narrow_case()
    other = torch.randn(500, 12, generator=torch.Generator().manual_seed(10), dtype=torch.float64)

    def errors(shrinkage: float) -> list[float]:
        found = []
        options = FFNOptions("identity", centred=False, structure="separate", shrinkage=shrinkage)
        inputs, outputs = factorize_inputs(PLAIN, statistics, up, "up", options), factorize_down(statistics, down, None, options)
        for solved, weight, read in ((inputs, up, (x, other)), (outputs, down, (x @ up.T, other @ up.T))):
            a, b, _ = solved.factors(6)
            found += [float((z @ (weight - b @ a).T).square().sum() / (z @ weight.T).square().sum()) for z in read]
        return found

    seen_up, unseen_up, seen_down, unseen_down = errors(0.3)
    assert max(seen_up, seen_down) < 0.1
    measured = errors(0.0)
    assert unseen_up < 0.5 * measured[1] and unseen_down < 0.96 * measured[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_row_products_are_formed_in_float32_or_better(dtype):
    matrix = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = row_products(matrix)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, matrix.double() @ matrix.double().T, rtol=1e-5, atol=1e-4)


def test_ks_rule_never_takes_silence_for_a_narrow_spectrum():
    block, _ = random_block(site=dataclasses.replace(SITE, min_units=0))
    direction = torch.randn(block.site.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    narrow = torch.outer(direction, direction) @ block.out / direction.square().sum() + 1e-3 * block.out
    loud = dataclasses.replace(block, out=narrow)  # nearly all energy in one direction: its best rank-1 copy has a distance near 0
    options = CompressionOptions(ks=0.5)
    assert _removable(loud, information_loss(loud), options) < block.site.num_units
    silent = dataclasses.replace(block, out=torch.zeros_like(block.out))
    assert _removable(silent, information_loss(silent), options) == block.site.num_units
