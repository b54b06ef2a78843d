"""The one suite that every model family runs."""

from __future__ import annotations

import copy
import dataclasses
import json
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

import infoprune
from conftest import ALL
from infoprune.architecture import AttentionSite
from infoprune.calibrate import calibrate
from infoprune.compress import compress
from infoprune.criteria.ffn import FFNOptions
from infoprune.evaluation.cost import count_flops, count_workload, predicted_flops, prompt_inputs
from infoprune.freeze import frozen
from infoprune.modeling_infoprune import Constant, ConstantAttention, norm_before
from infoprune.packing import answer_logits, batches
from infoprune.plan import CompressionPlan, FFNDecision, HeadDecision
from infoprune.resolve import resolve
from infoprune.sensitivity import head_sensitivities
from infoprune.surgery import apply_
from tiny_models import WORDS, build


def statistics_of(vlm, questions, **options):
    return calibrate(vlm.model, vlm.architecture, (b for b, _ in batches(vlm.encoder, questions)), **options)


def plan_of(vlm, *, compensate="least-squares", rank=8, heads=True, ffn=True, structure="joint"):
    """Drop the first unit of every block that has two, factorise every FFN."""
    decisions = {}
    for site in vlm.architecture.ffn:
        top = {"joint": "joint_rank"}.get(structure) if site.gated else None
        ranks = {top: rank} if top else {"up_rank": rank} | ({"gate_rank": rank} if site.gated else {})
        decisions[site.path] = FFNDecision(**ranks, down_rank=rank)
    return CompressionPlan(
        library="test",
        model_type=vlm.architecture.family.model_type,
        model_id="tiny",
        heads={
            s.path: HeadDecision(keep_units=tuple(range(1, s.num_units)), num_units=s.num_units, compensate=compensate)
            for s in vlm.architecture.attention
            if s.num_units > 1
        }
        if heads
        else {},
        ffn=decisions if ffn else {},
    )


def narrowing(vlm):
    """Every FFN keeps two neurons in three, but that of each tower's last layer goes whole."""
    last = {tower: max(s.layer for s in vlm.architecture.ffn if s.tower == tower) for tower in ("vision", "text")}
    kept = {s.path: () if s.layer == last[s.tower] else tuple(n for n in range(s.intermediate_size) if n % 3) for s in vlm.architecture.ffn}
    return {
        path: FFNDecision(keep_neurons=neurons, num_neurons=vlm.architecture.site(path).intermediate_size) for path, neurons in kept.items()
    }


def mixed(vlm, *, compensate="least-squares"):
    """All kinds of cuts: fewer heads, factorised FFNs in the vision tower, fewer neurons and a dropped FFN in the language model."""
    plan = plan_of(vlm, compensate=compensate)
    narrowed = {path: decision for path, decision in narrowing(vlm).items() if vlm.architecture.site(path).tower == "text"}
    method = {"centred": False} if compensate == "none" else {}
    return plan.model_copy(update={"ffn": plan.ffn | narrowed, "method": method})


def inputs_of(vlm, questions):
    return prompt_inputs(vlm.encoder, questions[0])


@torch.no_grad()
def test_sites_cover_every_linear_of_the_layers(vlm):
    sites = (*vlm.architecture.attention, *vlm.architecture.ffn)
    assert {s.tower for s in sites} == {"vision", "text"}
    for site in sites:
        names = site.names
        roles = {*names.projections, names.out} if isinstance(site, AttentionSite) else {names.gate, names.up, names.down}
        others = tuple(f"{s.path}." for s in sites if s is not site and s.path.startswith(f"{site.path}."))
        inside = {f"{site.path}.{name}" for name, m in vlm.model.get_submodule(site.path).named_modules() if isinstance(m, nn.Linear)}
        assert {name for name in inside if not name.startswith(others)} == {f"{site.path}.{role}" for role in roles if role}
    layers = sum(len(vlm.model.get_submodule(p)) for p in {s.path.rsplit(".", 2)[0] for s in vlm.architecture.attention})
    assert layers == len(vlm.architecture.attention) == len(vlm.architecture.ffn)


def test_heads_that_are_normalised_together_stay(questions):
    tiny = next(tiny for tiny in ALL if tiny.name == "internvl")
    config = tiny.config()
    config.vision_config.use_qk_norm = True
    vlm = build(dataclasses.replace(tiny, config=lambda: config))
    sites = vlm.architecture.attention
    assert {(s.tower, s.min_units == s.num_units) for s in sites} == {("vision", True), ("text", False)}
    result = compress(vlm, questions, flops=0.75, rank_multiple=2, examples=12)
    assert result.flops_ratio <= 0.75
    assert all("language_model" in path for path in result.vlm.plan.heads) and any("vision" in path for path in result.vlm.plan.ffn)


@torch.no_grad()
def test_empty_plan_changes_nothing(vlm, questions):
    statistics = statistics_of(vlm, questions)
    before = vlm.model(**inputs_of(vlm, questions)).logits
    apply_(vlm.model, vlm.architecture, plan_of(vlm, heads=False, ffn=False), statistics)
    assert torch.equal(vlm.model(**inputs_of(vlm, questions)).logits, before)


@torch.no_grad()
@pytest.mark.capability("heads, {tower}")
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_masked_equals_compacted(vlm, questions, tower):
    statistics = statistics_of(vlm, questions)
    masked, plan = copy.deepcopy(vlm.model), plan_of(vlm, compensate="none", ffn=False)
    sites = {s.path: s for s in vlm.architecture.attention if s.tower == tower and s.num_units > 1}
    assert sites
    for path, site in sites.items():
        masked.get_submodule(f"{path}.{site.names.out}").weight[:, : site.unit_width] = 0
    plan = plan.model_copy(update={"heads": {path: plan.heads[path] for path in sites}})
    apply_(vlm.model, vlm.architecture, plan, statistics)
    inputs = inputs_of(vlm, questions)
    torch.testing.assert_close(vlm.model(**inputs).logits, masked(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in vlm.model.parameters()) < sum(p.numel() for p in masked.parameters())


GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def has_static_cache(vlm, inputs):
    """Whether Transformers can run this dense model with a static cache; it can't for PaliGemma 2."""
    try:
        vlm.model.generate(**inputs, **GENERATE, cache_implementation="static")
    except AttributeError:
        return False
    return True


def check_generation(model, inputs, *, static):
    """Cached, uncached and, where the dense model can, statically cached generation agree."""
    # A random model may well answer with the tokens of an image, which no uncached forward can read.
    options = GENERATE | {"suppress_tokens": [number for number, word in enumerate(WORDS) if word.startswith("<")]}
    cached = model.generate(**inputs, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    if static:
        assert torch.equal(cached, model.generate(**inputs, **options, cache_implementation="static"))
    beams = model.generate(**inputs, **options, num_beams=2)
    assert beams.shape == cached.shape


def dropping(vlm, *, compensate):
    """Drop whole attention blocks: those of the last layers."""
    last = {tower: max(s.layer for s in vlm.architecture.attention if s.tower == tower) for tower in ("vision", "text")}
    blocks = [s for s in vlm.architecture.attention if s.layer == last[s.tower]]
    heads = {s.path: HeadDecision(keep_units=(), num_units=s.num_units, compensate=compensate) for s in blocks}
    return plan_of(vlm, ffn=False).model_copy(update={"heads": heads})


@torch.no_grad()
@pytest.mark.parametrize("compensate", ["least-squares", "none"])
def test_dropped_blocks_leave_their_mean(vlm, questions, tmp_path, compensate):
    statistics = statistics_of(vlm, questions, weighting="uniform")
    plan, masked, inputs = dropping(vlm, compensate=compensate), copy.deepcopy(vlm.model), inputs_of(vlm, questions)
    for path in plan.heads:
        site = vlm.architecture.site(path)
        out = masked.get_submodule(f"{path}.{site.names.out}")
        mean = statistics.sites[path].pooled("input").mean.float() if compensate != "none" else torch.zeros(out.in_features)
        constant = out.weight @ mean + (0 if out.bias is None else out.bias)
        out.register_forward_hook(lambda m, a, output, constant=constant: constant.expand_as(output))
    dense, workload = count_workload(vlm.model, vlm.architecture, inputs, 2)
    static = has_static_cache(vlm, inputs)
    apply_(vlm.model, vlm.architecture, plan, statistics)
    torch.testing.assert_close(vlm.model(**inputs).logits, masked(**inputs).logits, atol=1e-4, rtol=1e-4)
    layers = [path.rpartition(".")[0] for path in plan.heads]
    norms = [f"{layer}.{name}" for layer in layers if (name := norm_before(masked.get_submodule(layer)))]
    assert all(isinstance(vlm.model.get_submodule(norm), nn.Identity) for norm in norms)
    shared = vlm.model.config.text_config.model_type == "cohere2"  # one norm for both blocks of a layer
    assert len(norms) == len(layers) - shared and not any(f"{norm}.weight" in vlm.model.state_dict() for norm in norms)
    now = count_flops(vlm.model, vlm.architecture.family, inputs, 2)
    assert now.total == predicted_flops(vlm.architecture, plan, workload, dense.total) < dense.total
    reloaded = infoprune.load(infoprune.save(dataclasses.replace(vlm, plan=plan), tmp_path / "out", probe=inputs))
    check_generation(reloaded.model, inputs, static=static)
    first = next(s for s in vlm.architecture.attention if s.tower == "text" and s.layer == 0)
    bad = plan.model_copy(update={"heads": {first.path: HeadDecision(keep_units=(), num_units=first.num_units)}})
    with pytest.raises(infoprune.InfoPruneError, match="needs 1: it is the first language layer"):
        bad.check(vlm.architecture)


@torch.no_grad()
@pytest.mark.capability("FFN, {tower}")
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_full_rank_factorisation_keeps_the_output(vlm, questions, tower):
    # Beyond the useful ranks, so past plan.check on purpose: this tests the algebra.
    from infoprune.surgery import factorize_ffn_

    statistics = statistics_of(vlm, questions, branches=True)
    inputs = inputs_of(vlm, questions)
    before = vlm.model(**inputs).logits
    for number, site in enumerate(s for s in vlm.architecture.ffn if s.tower == tower):
        full = {"down_rank": site.hidden_size}
        if site.gated and number % 2:
            full["joint_rank"] = site.hidden_size
        else:
            full |= {"up_rank": site.hidden_size} | ({"gate_rank": site.hidden_size} if site.gated else {})
        factorize_ffn_(vlm.model, site, FFNDecision(**full), statistics.sites[site.path], FFNOptions())
    torch.testing.assert_close(vlm.model(**inputs).logits, before, atol=2e-3, rtol=2e-3)


@torch.no_grad()
@pytest.mark.capability("neurons")
@pytest.mark.parametrize("centred", [True, False])
def test_narrowed_ffns_equal_masked_neurons(vlm, questions, tmp_path, centred):
    statistics = statistics_of(vlm, questions, neurons=True)
    plan = plan_of(vlm, heads=False, ffn=False).model_copy(update={"ffn": narrowing(vlm), "method": {"centred": centred}})
    masked, inputs = copy.deepcopy(vlm.model), inputs_of(vlm, questions)
    for path, decision in plan.ffn.items():
        site = vlm.architecture.site(path)
        down = masked.get_submodule(f"{path}.{site.names.down}")
        gone = [n for n in range(site.intermediate_size) if n not in decision.keep_neurons]
        lost = down.weight[:, gone] @ statistics.sites[path].neurons.mean[gone].float() * centred
        down.weight[:, gone] = 0
        down.register_forward_hook(lambda m, a, output, lost=lost: output + lost)
    dense, workload = count_workload(vlm.model, vlm.architecture, inputs, 2)
    apply_(vlm.model, vlm.architecture, plan, statistics)
    torch.testing.assert_close(vlm.model(**inputs).logits, masked(**inputs).logits, atol=1e-4, rtol=1e-4)
    now = count_flops(vlm.model, vlm.architecture.family, inputs, 2)
    assert now.total == predicted_flops(vlm.architecture, plan, workload, dense.total) < dense.total
    with_bias = {p: vlm.model.get_submodule(f"{p}.{vlm.architecture.site(p).names.down}").bias is not None for p in plan.ffn}
    had_bias = {p: masked.get_submodule(f"{p}.{vlm.architecture.site(p).names.down}").bias is not None for p in plan.ffn}
    assert all(with_bias.values()) if centred else with_bias == had_bias
    reloaded = infoprune.load(infoprune.save(dataclasses.replace(vlm, plan=plan), tmp_path / "out", probe=inputs))
    assert reloaded.plan == plan
    assert torch.equal(reloaded.model(**inputs).logits, vlm.model(**inputs).logits)
    state = vlm.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in reloaded.model.state_dict().items())
    check_generation(reloaded.model, inputs, static=False)


def test_calibration_leaves_nothing_behind(vlm, questions):
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    vlm.model(**inputs_of(vlm, questions))  # Transformers installs hooks of its own on the first call

    def hooks():
        return [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in vlm.model.modules()]

    hooks_before = hooks()
    statistics = statistics_of(vlm, questions)
    assert hooks() == hooks_before
    for name, parameter in vlm.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    assert statistics.num_examples == len(questions)
    for site in vlm.architecture.attention:
        assert statistics.sites[site.path].pooled("input").count > 0


def test_sensitivities_are_derivatives_in_gates(vlm, questions):
    gates = {s.path: torch.ones(s.num_units, requires_grad=True) for s in vlm.architecture.attention}
    expected = {path: torch.zeros(len(gate)) for path, gate in gates.items()}
    for batch, _ in batches(vlm.encoder, questions[2:4], images_per_batch=1, share_prefix=False):
        with ExitStack() as stack:
            for site in vlm.architecture.attention:
                gate = gates[site.path].repeat_interleave(site.unit_width)
                out = vlm.model.get_submodule(f"{site.path}.{site.names.out}")
                stack.callback(out.register_forward_pre_hook(lambda module, args, gate=gate: (args[0] * gate,)).remove)
            loss = nn.functional.cross_entropy(answer_logits(vlm.model, batch), batch.targets, reduction="sum")
        found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
        for path, gradient in zip(gates, found, strict=True):
            expected[path] += 0 if gradient is None else gradient.abs() / 2
    for recompute in (False, True):
        packed = (batch for batch, _ in batches(vlm.encoder, questions[2:4]))
        for path, found in head_sensitivities(vlm.model, vlm.architecture, packed, recompute=recompute).items():
            torch.testing.assert_close(found.float(), expected[path], rtol=1e-3, atol=1e-6)
    assert any(gradient.any() for gradient in expected.values())


@torch.no_grad()
@pytest.mark.capability("image and text inputs")
def test_packed_equals_unpacked(vlm, questions):
    packed = torch.cat([answer_logits(vlm.model, b) for b, _ in batches(vlm.encoder, questions, images_per_batch=2)])
    single = torch.cat([answer_logits(vlm.model, b) for b, _ in batches(vlm.encoder, questions, images_per_batch=1, share_prefix=False)])
    torch.testing.assert_close(packed, single, atol=5e-5, rtol=1e-4)
    plain = vlm.model(**inputs_of(vlm, questions)).logits[0, -1]
    torch.testing.assert_close(packed[0], plain, atol=5e-5, rtol=1e-4)


def test_parts_have_all_flops(vlm, questions):
    inputs = inputs_of(vlm, questions)
    # Beside what PyTorch counts by itself, of the plain attention kernel, which the fused ones compute, too.
    with frozen(vlm.model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vlm.model(**inputs, use_cache=True, logits_to_keep=1)
    assert count_flops(vlm.model, vlm.architecture.family, inputs, 1).total == counter.get_total_flops()


def test_predicted_flops_equal_counted(vlm, questions):
    family, inputs = vlm.architecture.family, inputs_of(vlm, questions)
    dense, workload = count_workload(vlm.model, vlm.architecture, inputs, 2)
    plan = plan_of(vlm)
    apply_(vlm.model, vlm.architecture, plan, statistics_of(vlm, questions))
    compressed = count_flops(vlm.model, family, inputs, 2)
    assert compressed.total == predicted_flops(vlm.architecture, plan, workload, dense.total)


@pytest.mark.capability("save and load")
def test_save_and_load_are_bit_identical(vlm, questions, tmp_path):
    inputs = inputs_of(vlm, questions)
    vlm.model.save_pretrained(tmp_path / "dense")  # from disk, as users have it: Transformers may rename keys on the way
    vlm.processor.save_pretrained(tmp_path / "dense")
    dense = infoprune.load(tmp_path / "dense")
    assert torch.equal(dense.model(**inputs).logits, vlm.model(**inputs).logits)
    result = compress(dense, questions, flops=0.8, rank_multiple=2, examples=12)
    assert result.flops_ratio <= 0.8
    folder = infoprune.save(result.vlm, tmp_path / "out", probe=inputs)
    reloaded = infoprune.load(folder)
    assert reloaded.plan == result.vlm.plan
    with torch.no_grad():
        assert torch.equal(reloaded.model(**inputs).logits, result.vlm.model(**inputs).logits)
    state = result.vlm.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in reloaded.model.state_dict().items())
    assert infoprune.save(result.vlm, folder, overwrite=True) == folder  # all files of its processor are known to be an output's
    for tokenizer in folder.rglob("tokenizer.json"):
        told = json.loads(tokenizer.read_text())
        assert told["padding"] is None and told["truncation"] is None


@pytest.mark.capability("load without infoprune", "push and load")
def test_loads_without_infoprune_only_through_trust_remote_code(vlm, questions, tmp_path, without_infoprune, upload):
    inputs = inputs_of(vlm, questions)
    plan = mixed(vlm)
    apply_(vlm.model, vlm.architecture, plan, statistics_of(vlm, questions, neurons=True))
    folder = infoprune.save(dataclasses.replace(vlm, plan=plan), tmp_path / "out")
    with torch.no_grad():
        torch.save({"inputs": inputs, "logits": vlm.model(**inputs).logits}, tmp_path / "expected.pt")
    assert without_infoprune(folder, tmp_path / "expected.pt") == "ok"
    repo = upload(folder, f"someone/{vlm.model_id}")
    assert without_infoprune(repo, tmp_path / "expected.pt") == "ok"


@torch.no_grad()
@pytest.mark.capability("per-layer geometry")
def test_configuration_states_heads_and_neurons_of_every_layer(vlm, questions, tmp_path):
    statistics = statistics_of(vlm, questions[:2], weighting="uniform", gradients=False)
    plan = plan_of(vlm, compensate="none", ffn=False)
    heads = plan.heads | dropping(vlm, compensate="none").heads
    plan = plan.model_copy(update={"heads": heads, "ffn": narrowing(vlm), "method": {"centred": False}})
    apply_(vlm.model, vlm.architecture, plan, statistics)
    folder = infoprune.save(dataclasses.replace(vlm, plan=plan), tmp_path / "out", probe=inputs_of(vlm, questions))
    text = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    assert text.is_heterogeneous and text.allow_global_per_layer_attribute_access
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.get_text_config(decoder=True).to_dict()["per_layer_config"] == text.to_dict()["per_layer_config"]
    for site in (s for s in vlm.architecture.attention if s.tower == "text"):
        block, stated = model.get_submodule(site.path), text.per_layer_config[site.layer]
        assert stated.head_dim == site.head_dim
        found = stated.num_attention_heads, getattr(stated, "num_key_value_heads", stated.num_attention_heads)
        if isinstance(block, ConstantAttention):  # no heads, but no cache can be that small
            assert found == ((1, 1) if site.multi_query else (site.num_heads // site.num_key_value_heads, 1))
        else:
            widths = (getattr(block, name).out_features for name in (site.names.query, site.names.key))
            assert found == tuple(width // site.head_dim for width in widths)
    for site in (s for s in vlm.architecture.ffn if s.tower == "text"):
        up, stated = model.get_submodule(f"{site.path}.{site.names.up}"), text.per_layer_config[site.layer]
        width = stated.intermediate_size if hasattr(stated, "intermediate_size") else stated.ffn_dim
        assert width == (0 if isinstance(model.get_submodule(f"{site.path}.{site.names.down}"), Constant) else up.out_features)


@pytest.mark.capability("generate")
def test_cached_generation_equals_uncached(vlm, questions):
    inputs = inputs_of(vlm, questions)
    static = has_static_cache(vlm, inputs)
    result = compress(vlm, questions, flops=0.8, rank_multiple=2, examples=12)
    check_generation(result.vlm.model, inputs, static=static)


def test_compressed_model_is_refused(vlm, questions, tmp_path):
    result = compress(vlm, questions, flops=0.8, rank_multiple=2, examples=12)
    reloaded = infoprune.load(infoprune.save(result.vlm, tmp_path / "out"))
    with pytest.raises(infoprune.InfoPruneError, match="already compressed"):
        compress(reloaded, questions, flops=0.5)
    with pytest.raises(infoprune.InfoPruneError, match="already compressed"):
        resolve(reloaded.model)
