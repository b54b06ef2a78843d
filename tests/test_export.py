from __future__ import annotations

import dataclasses
import json
import shlex

import pytest
import torch
import typer
from safetensors import safe_open
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import infoprune
from infoprune.cli import compress as compress_verb
from infoprune.errors import CheckpointError, InfoPruneError
from infoprune.export import export_dense
from infoprune.older_readers import with_older_names
from infoprune.surgery import apply_
from test_families import dropping, inputs_of, mixed, plan_of, statistics_of


def compressed(vlm, questions, folder, plan):
    apply_(vlm.model, vlm.architecture, plan, statistics_of(vlm, questions, neurons=True))
    return infoprune.load(infoprune.save(dataclasses.replace(vlm, plan=plan), folder))


@pytest.mark.capability("export dense")
@torch.no_grad()
def test_dense_export_is_a_stock_checkpoint_with_the_same_logits(vlm, questions, tmp_path):
    dense = {name: value.shape for name, value in vlm.model.state_dict().items()}
    plan = mixed(vlm, compensate="none")
    plan = plan.model_copy(update={"heads": plan.heads | dropping(vlm, compensate="none").heads})
    small = compressed(vlm, questions, tmp_path / "small", plan)
    folder = export_dense(small, tmp_path / "dense")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.model_type == vlm.architecture.family.model_type and "InfoPrune" not in type(model).__name__
    tokenizers = [json.loads(file.read_text()) for file in folder.rglob("tokenizer_config.json")]
    assert tokenizers and not any(tokenizer["tokenizer_class"] == "TokenizersBackend" for tokenizer in tokenizers)
    assert {name: value.shape for name, value in model.state_dict().items()} == dense
    inputs = inputs_of(vlm, questions)
    torch.testing.assert_close(model(**inputs).logits, small.model(**inputs).logits, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_biases_go_where_the_configuration_has_a_place(vlm, questions, tmp_path):
    small = compressed(vlm, questions, tmp_path / "small", mixed(vlm))
    inputs, text = inputs_of(vlm, questions), vlm.model.config.get_text_config()
    with_biases = text.model_type == "opt" or (hasattr(text, "attention_bias") and hasattr(text, "mlp_bias"))
    if not with_biases or vlm.model.config.vision_config.model_type in ("pixtral", "ovis2_vision", "mllama_vision_model"):
        with pytest.raises(CheckpointError, match="has no place"):
            export_dense(small, tmp_path / "dense")
        assert not (tmp_path / "dense").exists()
        return
    model = AutoModelForImageTextToText.from_pretrained(export_dense(small, tmp_path / "dense"), dtype=torch.float32).eval()
    torch.testing.assert_close(model(**inputs).logits, small.model(**inputs).logits, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_the_checkpoint_keeps_its_precision(checkpoint, jsonl, tmp_path):
    options = {"flops": 0.8, "rank_multiple": 2, "examples": 12, "compensate": "none", "centred": False}
    result = infoprune.compress(infoprune.load(checkpoint), str(jsonl), **options)
    small = infoprune.load(infoprune.save(result.vlm, tmp_path / "small", dtype=torch.bfloat16))
    before = {name: value.clone() for name, value in small.model.state_dict().items()}
    half = export_dense(small, tmp_path / "half")
    whole = export_dense(small, tmp_path / "whole", dtype=torch.float32)
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())
    for folder, dtype in ((half, torch.bfloat16), (whole, torch.float32)):
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118 - safe_open has no items
        assert AutoModelForImageTextToText.from_pretrained(folder).dtype == dtype
    assert (half / "model.safetensors").stat().st_size < 0.6 * (whole / "model.safetensors").stat().st_size


def test_the_refusal_names_the_command_that_avoids_it(checkpoint, jsonl, tmp_path, monkeypatch):
    result = infoprune.compress(infoprune.load(checkpoint), str(jsonl), flops=0.8, rank_multiple=2, examples=12)
    small = infoprune.load(infoprune.save(result.vlm, tmp_path / "small"))
    with pytest.raises(CheckpointError, match="has no place") as refused:
        export_dense(small, tmp_path / "stock")
    told = str(refused.value)
    command = shlex.split(told.splitlines()[-1])
    assert command[:3] == ["infoprune", "compress", str(checkpoint)]
    assert {"--compensate", "--no-centred"} <= set(command)
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    compress_verb.register(app)
    done = CliRunner().invoke(app, [*command[2:], "--rank-multiple", "2", "--examples", "12"])
    assert done.exit_code == 0, done.output
    again = infoprune.load("DIR")
    assert again.plan.method["repair"] and again.plan.ffn and again.plan.budget == {"flops": 0.8}
    stock = infoprune.load(export_dense(again, tmp_path / "stock"))
    assert stock.architecture.family.model_type == "llava"


def test_earlier_readers_find_what_they_look_for(gqa_vlm, questions, tmp_path):
    gqa_vlm.model.config.get_text_config().rope_parameters["rope_theta"] = 50000.0
    small = compressed(gqa_vlm, questions, tmp_path / "small", mixed(gqa_vlm, compensate="none"))
    small = dataclasses.replace(small, seen={"calibration": ["0" * 16]})
    folder = export_dense(small, tmp_path / "dense")
    assert infoprune.load(folder).seen == small.seen  # the weights are those that calibration made, whatever they are written as
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 50000.0 and text["rope_scaling"] is None
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert images["image_mean"] == list(gqa_vlm.processor.image_processor.image_mean) and "Pil" not in images["image_processor_type"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert any("vision_tower.vision_model.encoder." in name for name in file.keys())  # noqa: SIM118 - safe_open has no items
    again = infoprune.load(folder)
    assert again.processor.tokenizer.get_vocab() == small.processor.tokenizer.get_vocab()
    inputs = again.encoder.inputs([again.encoder.prompt("what ?")], [questions[0].load_image()])
    expected = small.encoder.inputs([small.encoder.prompt("what ?")], [questions[0].load_image()])
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("now", "then"),
    [
        (
            {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 2]},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}},
        ),
        (
            {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        (
            {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {"rope_theta": 1e6, "rope_scaling": None, "rope_local_base_freq": 1e4},
        ),
    ],
)
def test_earlier_names_of_rotary_embeddings(now, then):
    found = with_older_names({"text_config": {"rope_parameters": now}})["text_config"]
    assert found == then | {"rope_parameters": now}


def test_only_float32_is_exported(gqa_vlm, questions, tmp_path):
    small = compressed(gqa_vlm, questions, tmp_path / "small", mixed(gqa_vlm, compensate="none"))
    with pytest.raises(CheckpointError, match="float32; load it so"):
        export_dense(infoprune.load(tmp_path / "small", dtype=torch.bfloat16), tmp_path / "dense")
    assert small.plan is not None


def test_what_is_not_compressed_has_nothing_to_export(gqa_vlm, tmp_path):
    with pytest.raises(CheckpointError, match="nothing to make dense"):
        export_dense(gqa_vlm, tmp_path / "dense")


@pytest.mark.parametrize("change", ["units", "family"])
def test_a_plan_of_another_model_is_refused(gqa_vlm, questions, tmp_path, change):
    compressed(gqa_vlm, questions, tmp_path / "small", plan_of(gqa_vlm))
    plan = json.loads((tmp_path / "small" / "plan.json").read_text())
    if change == "units":
        next(head for head in plan["heads"].values() if head["num_units"] > 1)["keep_units"] = list(range(2))
    else:
        plan["model_type"] = "martian"
    (tmp_path / "small" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InfoPruneError, match=r"not the one that its weights were cut by|is for a martian model"):
        export_dense(infoprune.load(tmp_path / "small"), tmp_path / "dense")
