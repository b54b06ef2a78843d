from __future__ import annotations

import json

import pytest
import typer
import yaml
from typer.testing import CliRunner

from infoprune import CompressionOptions, InfoPruneError
from infoprune.cli import compress as compress_verb
from infoprune.compress import compress
from infoprune.peers import PEERS, peer
from infoprune.site_costs import FlopCosts


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_compresses_what_it_says(gqa_vlm, questions, name):
    found = peer(name)
    assert not CompressionOptions(flops=0.7, **found.options).repair
    share = 0.95 if found.scope == "heads" else 0.75
    result = compress(gqa_vlm, questions, flops=share, rank_multiple=2, examples=6, **found.options)
    plan = result.vlm.plan
    step = 0.1
    if "layers" in found.options:  # as near as whole layers allow: none of those that went fits in again
        costs, sites = FlopCosts(result.workload), {s.path: s for s in (*gqa_vlm.architecture.attention, *gqa_vlm.architecture.ffn)}
        pairs = zip(sorted(plan.heads), sorted(plan.ffn), strict=True)
        step = min(costs.attention(sites[a], sites[a].num_units) + costs.ffn(sites[f], None) for a, f in pairs) / result.dense_flops.total
    assert share - step < result.flops_ratio <= share  # heads alone as well: a ranking goes as far as the budget asks
    assert (bool(plan.heads), bool(plan.ffn)) == {"heads": (True, False), "ffn": (False, True), "model": (True, True)}[found.scope]


@pytest.mark.parametrize("name", [n for n in PEERS if PEERS[n].options.get("ffn_metric") == "identity" and "svd" not in n])
def test_methods_without_output_gradients_decide_the_same_with_them(gqa_vlm, questions, name):
    """That they are spared the backward pass changes what they cost, not what they cut."""
    fields = {"flops": 0.95 if peer(name).scope == "heads" else 0.75, "rank_multiple": 2, "examples": 6} | peer(name).options
    assert not CompressionOptions(**fields).needs.gradients
    without, given = (compress(gqa_vlm, questions, **fields | {"ffn_metric": metric}).vlm.plan for metric in ("identity", "task"))
    assert (without.heads, without.ffn) == (given.heads, given.ffn)


@pytest.mark.parametrize(
    "given",
    [
        {"speedup": 1.5, "layers": "block-influence"},
        {"flops": 0.5, "ffn": "width", "allocation": "tolerance"},
        {"flops": 0.5, "ffn": "width", "allocation": "effective-rank"},
        {"flops": 0.5, "ffn": "none", "allocation": "tolerance"},
        {"flops": 0.5, "ffn": "width", "shrinkage": 0.1},
        {"flops": 0.5, "ffn": "width", "structure": "separate"},
        {"flops": 0.5, "ffn": "none", "whitening": "none"},
    ],
)
def test_what_does_not_go_together_is_refused(given):
    with pytest.raises(InfoPruneError, match=r"which ffn (width|none) has not|not timed"):
        CompressionOptions(**given)


def test_what_is_given_beside_a_method_wins(checkpoint, jsonl, tmp_path):
    app, recipe = typer.Typer(), tmp_path / "recipe.yaml"
    compress_verb.register(app)
    settings = {"model": str(checkpoint), "data": str(jsonl), "flops": 0.75, "rank_multiple": 2, "examples": 6, "method": "asvd"}
    recipe.write_text(yaml.safe_dump(settings | {"output": str(tmp_path / "a")}))
    done = CliRunner().invoke(app, ["--recipe", str(recipe)])
    assert done.exit_code == 0, done.output
    method = json.loads((tmp_path / "a" / "plan.json").read_text())["method"]
    assert method["whitening"] == "diagonal" and method["heads"] == "none" and not method["repair"]
    flags = ["--method", "flap-heads", "--compensate", "none", "--repair", "--flops", "0.95", "-o", str(tmp_path / "b")]
    done = CliRunner().invoke(app, ["--recipe", str(recipe), *flags])
    assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "b" / "plan.json").read_text())
    assert plan["method"]["heads"] == "fluctuation" and plan["method"]["repair"] and plan["calibration"]["weighting"] == "uniform"
    assert {head["compensate"] for head in plan["heads"].values()} == {"none"}
    assert all(name in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "400"}).output for name in PEERS)
    refused = CliRunner().invoke(app, [str(checkpoint), "--method", "slimgpt", "--flops", "0.5", "-o", str(tmp_path / "c")])
    assert isinstance(refused.exception, InfoPruneError) and "Unknown method 'slimgpt'. Known: random" in str(refused.exception)
