from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

import infoprune
from infoprune import CompressionOptions, CompressionPlan, InfoPruneError
from infoprune.compress import apply_plan, compress
from infoprune.criteria.heads import CRITERIA, block_of, information_loss
from infoprune.criteria.neurons import RANKINGS as NEURONS
from infoprune.errors import BudgetError, CheckpointError, PlanError, UnsupportedModelError
from infoprune.families import FAMILIES, REFUSED
from infoprune.plan import FFNDecision, HeadDecision, ffn_parameters, max_rank
from infoprune.resolve import resolve
from infoprune.solve import solve_sites
from infoprune.steps import calibrated
from test_families import plan_of
from tiny_models import TINY, build


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=8), st.sets(st.integers(0, 7), min_size=1), max_size=3),
    st.dictionaries(st.text(min_size=1, max_size=8), st.integers(1, 99), max_size=3),
    st.one_of(st.none(), st.text(max_size=5)),
)
def test_json_round_trip(heads, ranks, revision):
    plan = CompressionPlan(
        library="x", model_type="llava", model_id="m", revision=revision, budget={"flops": 0.5}, method={"centred": True, "alpha": 0.5},
        heads={p: HeadDecision(keep_units=tuple(sorted(k)), num_units=8) for p, k in heads.items()},
        ffn={p: FFNDecision(down_rank=r) for p, r in ranks.items()},
    )  # fmt: skip
    assert CompressionPlan.from_json(plan.to_json()) == plan


def test_earlier_plans_said_whether_heads_are_compensated():
    plan = json.loads(CompressionPlan(library="x", model_type="llava", model_id="m").to_json())
    heads = {name: {"keep_units": [0], "num_units": 2, "compensate": value} for name, value in (("a", True), ("b", False), ("c", "mean"))}
    found = CompressionPlan.from_json(json.dumps(plan | {"heads": heads}))
    assert [head.compensate for head in found.heads.values()] == ["least-squares", "none", "mean"]
    assert [head["compensated"] for head in found.shapes()["heads"].values()] == [True, False, True]
    with pytest.raises(PlanError, match="compensate"):
        CompressionPlan.from_json(json.dumps(plan | {"heads": {"a": {"keep_units": [0], "num_units": 2, "compensate": "somehow"}}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"version": 99}, "version 99"),
        ({"heads": {"x": {"keep_units": "all", "num_units": 2}}}, "keep_units"),
        ({"heads": {"x": {"keep_units": [1, 0], "num_units": 2}}}, "increasing"),
        ({"heads": {"x": {"keep_units": [2], "num_units": 2}}}, "below"),
        ({"ffn": {"x": {"joint_rank": 2, "up_rank": 2}}}, "excludes"),
        ({"ffn": {"x": {}}}, "at least one"),
        ({"ffn": {"x": {"down_rank": 0}}}, "down_rank"),
        ({"ffn": {"x": {"keep_neurons": [0, 2]}}}, "belong together"),
        ({"ffn": {"x": {"down_rank": 2, "num_neurons": 4}}}, "belong together"),
        ({"ffn": {"x": {"keep_neurons": [0], "num_neurons": 4, "down_rank": 2}}}, "excludes ranks"),
        ({"ffn": {"x": {"keep_neurons": [1, 1], "num_neurons": 4}}}, "increasing"),
        ({"ffn": {"x": {"keep_neurons": [-1, 1], "num_neurons": 4}}}, "keep_neurons"),
        ({"ffn": {"x": {"keep_neurons": [4], "num_neurons": 4}}}, "below"),
    ],
)
def test_malformed_plans_are_refused(change, message):
    good = json.loads(CompressionPlan(library="x", model_type="llava", model_id="m").to_json())
    with pytest.raises(PlanError, match=message):
        CompressionPlan.from_json(json.dumps(good | change))
    with pytest.raises(PlanError, match="not valid JSON"):
        CompressionPlan.from_json("{")


def test_plans_of_ranks_are_written_as_before_there_were_neurons():
    ffn = {
        "a": FFNDecision(down_rank=2),
        "b": FFNDecision(keep_neurons=(1, 3), num_neurons=4),
        "c": FFNDecision(keep_neurons=(), num_neurons=4),
    }
    plan = CompressionPlan(library="x", model_type="llava", model_id="m", ffn=ffn)
    written = json.loads(plan.to_json())["ffn"]
    assert written["a"] == {"joint_rank": None, "gate_rank": None, "up_rank": None, "down_rank": 2}
    assert '"keep_neurons": [1, 3],' in plan.to_json() and '"keep_neurons": [],' in plan.to_json()
    assert CompressionPlan.from_json(plan.to_json()) == plan
    assert plan.shapes()["ffn"] == {"a": {"down_rank": 2}, "b": {"keep": 2, "of": 4}, "c": {"keep": 0, "of": 4}}


def test_a_plan_says_which_commit_of_a_hub_was_cut(gqa_vlm, questions):
    cut = infoprune.compress(dataclasses.replace(gqa_vlm, revision="c0ffee"), questions, flops=0.8, rank_multiple=2, examples=6)
    assert CompressionPlan.from_json(cut.vlm.plan.to_json()).revision == "c0ffee"


def test_plans_that_do_not_fit_are_refused_and_change_nothing(gqa_vlm, questions):
    architecture, plan = gqa_vlm.architecture, plan_of(gqa_vlm)
    site = architecture.ffn[0]
    wrong = [
        plan.model_copy(update={"model_type": "idefics3"}),
        plan.model_copy(update={"heads": {"nowhere": HeadDecision(keep_units=(0,), num_units=2)}}),
        plan.model_copy(update={"heads": {architecture.attention[0].path: HeadDecision(keep_units=(0,), num_units=9)}}),
        plan.model_copy(update={"ffn": {site.path: FFNDecision(down_rank=max_rank(site, "down_rank") + 1)}}),
        plan.model_copy(update={"ffn": {site.path: FFNDecision(gate_rank=2)}}),
        plan.model_copy(update={"ffn": {site.path: FFNDecision(keep_neurons=(0,), num_neurons=site.intermediate_size + 1)}}),
    ]
    before = {name: p.clone() for name, p in gqa_vlm.model.state_dict().items()}
    for bad in wrong:
        with pytest.raises(PlanError):
            apply_plan(gqa_vlm, bad, questions)
    assert all(torch.equal(p, before[name]) for name, p in gqa_vlm.model.state_dict().items())


def test_a_factorised_linear_never_costs_more(vlm):
    for site in vlm.architecture.ffn:
        for name in ("joint_rank", "down_rank") if site.gated else ("up_rank", "down_rank"):
            top = max_rank(site, name)
            assert ffn_parameters(site, FFNDecision(**{name: top})) < ffn_parameters(site, None)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_meets_the_budget(gqa_vlm, questions, criterion):
    result = compress(gqa_vlm, questions, flops=0.7, heads=criterion, rank_multiple=2)
    assert 0.6 < result.flops_ratio <= 0.7
    assert torch.isfinite(result.vlm.model(**result.probe).logits).all()


@pytest.mark.parametrize("neurons", NEURONS)
@pytest.mark.parametrize("heads", ["information-loss", "energy"])
def test_every_criterion_of_neurons_meets_the_budget(gqa_vlm, questions, neurons, heads):
    result = compress(gqa_vlm, questions, flops=0.7, ffn="width", neurons=neurons, heads=heads, rank_multiple=2)
    assert 0.64 < result.flops_ratio <= 0.7
    assert any(d.keep_neurons is not None for d in result.vlm.plan.ffn.values())
    assert torch.isfinite(result.vlm.model(**result.probe).logits).all()


@pytest.mark.parametrize("ffn", ["low-rank", "width"])
def test_uniform_shares_leave_ffns_whole_where_all_may_stay(gqa_vlm, questions, ffn):
    found = compress(gqa_vlm, questions, flops=1.0, ffn=ffn, allocation="uniform", rank_multiple=2, examples=6)
    assert not found.vlm.plan.ffn and found.flops_ratio == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn": "width", "neurons": "luck"}, "Unknown neurons 'luck'. Known: energy"),
        ({"ffn": "width", "flops": None, "ks": 0.1}, "give flops instead of ks"),
        ({"layers": "block-influence", "flops": None, "ks": 0.1}, "give flops instead of ks"),
        ({"layers": "block-influence", "heads": "magnitude"}, "leave out heads and ffn"),
        ({"layers": "block-influence", "ffn": "width"}, "leave out heads and ffn"),
        ({"layers": "alternate"}, "Unknown layers"),
    ],
)
def test_structures_that_exclude_each_other_are_refused(fields, message):
    with pytest.raises(InfoPruneError, match=message):
        CompressionOptions(**{"flops": 0.5, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"structure": "separate"}, {"structure": "best"}, {"ffn_metric": "identity", "weighting": "uniform", "centred": False},
        {"whitening": "diagonal", "centred": False}, {"allocation": "tolerance", "structure": "separate"}, {"allocation": "effective-rank"},
        {"top_k": 5}, {"allocation": "uniform"}, {"compensate": "none"}, {"compensate": "mean"}, {"heads": "none"}, {"towers": ("text",)},
        {"ffn": "width"}, {"ffn": "width", "centred": False, "heads": "none"}, {"layers": "block-influence", "flops": 0.8},
        {"ffn": "width", "allocation": "uniform", "neurons": "taylor", "heads": "grouped-taylor"},
    ],
)  # fmt: skip
def test_every_variant_works(gqa_vlm, questions, fields):
    result = compress(gqa_vlm, questions, **{"flops": 0.75, "rank_multiple": 2, **fields})
    assert result.flops_ratio < 0.85
    again = apply_plan(build(TINY[1]), result.vlm.plan, questions)
    torch.testing.assert_close(again.model(**result.probe).logits, result.vlm.model(**result.probe).logits, atol=1e-4, rtol=1e-4)


def test_budget_of_one_keeps_everything(gqa_vlm, questions):
    result = compress(gqa_vlm, questions, flops=1.0)
    assert result.flops_ratio == 1
    assert not result.vlm.plan.heads
    assert not result.vlm.plan.ffn


def test_ks_rule_is_monotone(gqa_vlm, questions):
    shares = [compress(gqa_vlm, questions, ks=ks, rank_multiple=1).flops_ratio for ks in (1e-6, 0.1, 0.4)]
    assert shares[0] >= shares[1] >= shares[2]
    assert shares[2] < 1


def test_loss_grows_as_the_budget_shrinks(gqa_vlm, questions):
    losses = [compress(gqa_vlm, questions, flops=f, rank_multiple=2).predicted_loss for f in (0.9, 0.7, 0.5)]
    assert losses[0] < losses[1] < losses[2]


def test_impossible_budget_says_the_smallest_reachable(gqa_vlm, questions):
    with pytest.raises(BudgetError, match=r"smallest share .* is 0\.\d+") as caught:
        compress(gqa_vlm, questions, flops=0.01)
    smallest = float(str(caught.value).split(" is ")[2].split(". ")[0])
    assert compress(gqa_vlm, questions, flops=smallest).flops_ratio <= smallest


@pytest.mark.parametrize("fields", [{}, {"flops": 0.5, "ks": 0.1}, {"flops": 0}, {"flops": 1.5}, {"flops": 0.5, "heads": "nonsense"},
        {"flops": 0.5, "structure": "nonsense"}, {"flops": 0.5, "ffn_metric": "nonsense"}, {"flops": 0.5, "towers": ("ear",)},
        {"flops": 0.5, "compensate": True}, {"flops": 0.5, "whitening": "nonsense"}, {"flops": 0.5, "top_k": 1},
                                    {"flops": 0.5, "examples": 0}, {"flops": 0.5, "heads": "none", "ffn": "none"}])  # fmt: skip
def test_bad_options_are_refused(fields):
    with pytest.raises(InfoPruneError):
        CompressionOptions(**fields)


def test_one_tower_may_be_given_by_its_name_alone():
    assert CompressionOptions(flops=0.5, towers="text") == CompressionOptions(flops=0.5, towers=("text",))


def test_compress_leaves_the_source_alone(gqa_vlm, questions):
    before = {name: p.clone() for name, p in gqa_vlm.model.state_dict().items()}
    compress(gqa_vlm, questions, flops=0.6, rank_multiple=2)
    assert all(torch.equal(p, before[name]) for name, p in gqa_vlm.model.state_dict().items())


def test_compression_is_reproducible(gqa_vlm, questions):
    first, second = (compress(gqa_vlm, questions, flops=0.6, rank_multiple=2) for _ in range(2))
    assert first.vlm.plan == second.vlm.plan
    assert torch.equal(first.vlm.model(**first.probe).logits, second.vlm.model(**first.probe).logits)


# --- checkpoints ------------------------------------------------------------------------------------------------------------------


def test_output_folder_must_be_empty_and_failure_leaves_nothing(gqa_vlm, questions, tmp_path, monkeypatch):
    result = compress(gqa_vlm, questions, flops=0.7, rank_multiple=2)
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="not empty"):
        infoprune.save(result.vlm, full)
    assert (full / "precious.txt").read_text() == "keep me"
    listing = sorted(p.name for p in tmp_path.iterdir())

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(result.vlm.processor), "save_pretrained", no_space)
    with pytest.raises(CheckpointError, match="disk full"):
        infoprune.save(result.vlm, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == listing


def test_a_checkpoint_that_reloads_differently_is_not_kept(gqa_vlm, questions, tmp_path):
    result = compress(gqa_vlm, questions, flops=0.7, rank_multiple=2)
    plan = result.vlm.plan
    handle = result.vlm.model.lm_head.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(CheckpointError, match="differs"):
        infoprune.save(result.vlm, tmp_path / "out", probe=result.probe)
    handle.remove()
    assert not (tmp_path / "out").exists()
    assert plan is result.vlm.plan


def test_missing_and_corrupt_checkpoints(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        infoprune.load(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        infoprune.load(empty)
    weights = checkpoint / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(weights).items()}  # not memory-mapped: the file is about to change
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="corrupt"):
        infoprune.load(checkpoint)
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    save_file({k: v for k, v in tensors.items() if k != name}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        infoprune.load(checkpoint)
    weights.unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="Only safetensors"):
        infoprune.load(checkpoint)


def test_unsupported_families_are_refused_with_the_list(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 8}
    with pytest.raises(UnsupportedModelError, match=r"llava.*idefics3"):
        resolve(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)))
    (tmp_path / "config.json").write_text('{"model_type": "martian"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="Supported"):
        infoprune.load(tmp_path)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_families_say_why_before_weights_are_read(model_type, tmp_path):
    assert model_type in CONFIG_MAPPING and model_type not in FAMILIES
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}' is not supported: {re.escape(REFUSED[model_type])}"):
        infoprune.load(tmp_path)


def test_refused_towers_say_why_before_weights_are_read(tmp_path):
    CONFIG_MAPPING["blip-2"](text_config=CONFIG_MAPPING["t5"]().to_dict()).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="text tower 't5' of this blip-2 model is not supported: it is an encoder-decoder"):
        infoprune.load(tmp_path)


def test_unsupported_tower_is_refused(gqa_vlm):
    gqa_vlm.model.config.text_config.model_type = "gpt2"
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        resolve(gqa_vlm.model)


def test_without_the_task_heads_and_ffns_lose_in_one_unit(gqa_vlm, questions):
    options = CompressionOptions(flops=0.7, rank_multiple=2, examples=6, ffn_metric="identity", weighting="uniform")
    assert not options.needs.gradients
    result = compress(gqa_vlm, questions, options=options)
    report = result.as_dict()
    assert report["predicted_squared_error"] > 0 and "predicted_loss_nats" not in report
    gradients = calibrated(gqa_vlm, questions, dataclasses.replace(options.needs, gradients=True))[0]
    site = next(s for s in gqa_vlm.architecture.attention if s.tower == "text")
    weight = gqa_vlm.model.get_submodule(f"{site.path}.{site.names.out}").weight
    task, identity = (block_of(site, gradients.sites[site.path], weight, metric) for metric in ("task", "identity"))
    assert torch.equal(identity.metric, torch.eye(site.hidden_size, dtype=torch.float64)) and not torch.equal(task.metric, identity.metric)
    solved = solve_sites(gqa_vlm.model, gqa_vlm.architecture, gradients, options)
    assert next(i for i in solved if i.site == site).removal.losses == information_loss(identity, options.compensate).losses


def test_choosing_neurons_means_fewer_of_them():
    assert CompressionOptions(flops=0.5, neurons="fluctuation").ffn == "width"
    for fields in (
        {"ffn": "low-rank", "neurons": "random"},
        {"ffn": "width", "whitening": "diagonal"},
        {"ffn": "width", "structure": "best"},
    ):
        with pytest.raises(InfoPruneError, match="width"):
            CompressionOptions(flops=0.5, **fields)
