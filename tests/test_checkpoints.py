"""What people do with a compressed checkpoint once they have it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, TorchAoConfig, pipeline

import infoprune
from infoprune.checkpoint import rounded_
from infoprune.compress import compress
from infoprune.data.seen import seen_warnings
from infoprune.errors import CheckpointError, UnsupportedModelError
from infoprune.model import weight_files
from test_families import inputs_of


@pytest.fixture
def small(gqa_vlm, questions, tmp_path):
    """A compressed checkpoint, model inputs, and its logits on them."""
    result = compress(gqa_vlm, questions, flops=0.8, rank_multiple=2, examples=12, ffn="low-rank")
    folder = infoprune.save(result.vlm, tmp_path / "small", probe=result.probe)
    inputs = inputs_of(gqa_vlm, questions)
    with torch.no_grad():
        return folder, inputs, result.vlm.model(**inputs).logits


def loaded(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


def test_pipeline(small, questions):
    ask = pipeline("image-text-to-text", model=str(small[0]))
    image = Image.open(questions[0].image).convert("RGB")
    found = ask(text="<image> what shape ?", images=image, max_new_tokens=4)[0]["generated_text"]
    assert found.startswith("<image> what shape ?")
    assert len(found.split()) > 4


@torch.no_grad()
def test_loading_and_answering_warn_of_nothing(small, caplog):
    from transformers.utils import logging

    logging.warning_once.cache_clear()
    logging.get_logger("transformers.integrations.heterogeneity.configuration_utils").warning("this one is heard")
    folder, inputs, _ = small
    model = loaded(folder)
    assert model.config.get_text_config(decoder=True).is_heterogeneous
    model.generate(**inputs, max_new_tokens=2)
    assert "this one is heard" in caplog.text and "per-layer" not in caplog.text


@torch.no_grad()
def test_device_map_dtype_and_base_model(small):
    folder, inputs, logits = small
    assert torch.equal(loaded(folder, device_map="auto")(**inputs).logits, logits)
    assert loaded(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert type(base).__name__ == "InfoPruneLlavaModel"
    inputs = inputs | {"use_cache": False}
    hidden = base.eval()(**inputs).last_hidden_state
    torch.testing.assert_close(loaded(folder).lm_head(hidden), logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_saved_again_in_shards(small, tmp_path, without_infoprune):
    folder, inputs, logits = small
    again = tmp_path / "again"
    loaded(folder).save_pretrained(again, max_shard_size="20KB")
    AutoProcessor.from_pretrained(folder).save_pretrained(again)
    assert len(list(again.glob("model-*.safetensors"))) > 2
    assert torch.equal(infoprune.load(again).model(**inputs).logits, logits)
    torch.save({"inputs": inputs, "logits": logits}, tmp_path / "expected.pt")
    assert without_infoprune(again, tmp_path / "expected.pt") == "ok"


def test_push_to_hub_takes_everything_along(small, tmp_path, hub, hub_environment, upload, without_infoprune):
    folder, inputs, logits = small
    (folder / "report.json").write_text("{}")
    torch.save({"inputs": inputs, "logits": logits}, tmp_path / "expected.pt")
    uploaded = upload(folder, "someone/uploaded")
    files = {path: content for path, content in hub.repos[uploaded].items() if path != ".gitattributes"}
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    command = [sys.executable, Path(__file__).with_name("hub_user.py"), folder, "someone/pushed", uploaded, tmp_path / "expected.pt"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=hub_environment)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("report ")).removeprefix("report "))
    plan = json.loads((folder / "plan.json").read_text())
    assert {repo: found.pop("revision") for repo, found in report.items()} == {repo: hub.commit(repo) for repo in report}
    assert report[uploaded] == {"same": True, "plan": plan, "processor": "LlavaProcessor"}
    assert report["someone/pushed"] == {"same": True, "plan": False, "processor": "LlavaProcessor"}  # Transformers knows of no plan
    pushed = hub.repos["someone/pushed"]
    assert {"config.json", "model.safetensors", "modeling_infoprune.py", "generation_config.json", "processor_config.json"} <= pushed.keys()
    assert pushed["modeling_infoprune.py"] == (folder / "modeling_infoprune.py").read_bytes()
    for repo in (uploaded, "someone/pushed"):
        maps = json.loads(hub.repos[repo]["config.json"])["auto_map"]
        assert maps == json.loads((folder / "config.json").read_text())["auto_map"] and len(maps) == 3
        assert without_infoprune(repo, tmp_path / "expected.pt") == "ok"


def test_lora_trains_saves_loads_and_merges(small, tmp_path):
    peft = pytest.importorskip("peft")
    folder, inputs, _ = small
    model = peft.get_peft_model(loaded(folder), peft.LoraConfig(r=4, target_modules="all-linear"))
    assert any("gate_up_proj.lora_A" in name for name, _ in model.named_parameters())  # factors are adapted like any other linear
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        trained = model.eval()(**inputs).logits
        again = peft.PeftModel.from_pretrained(loaded(folder), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**inputs).logits, trained, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again.merge_and_unload()(**inputs).logits, trained, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_int8_after_compression(small, tmp_path, kind):
    quantization = pytest.importorskip("torchao.quantization")
    folder, inputs, logits = small
    model = loaded(folder, quantization_config=TorchAoConfig(quant_type=getattr(quantization, kind)()))
    found = model(**inputs).logits
    assert 0 < float((found - logits).abs().max()) < 0.1 * float(logits.abs().max())
    model.save_pretrained(tmp_path / "int8")
    assert torch.equal(loaded(tmp_path / "int8")(**inputs).logits, found)
    sizes = [sum(file.stat().st_size for file in where.glob("*.safetensors")) for where in (tmp_path / "int8", folder)]
    assert sizes[0] < sizes[1]


def test_what_is_quantised_already_can_not_be_compressed(gqa_vlm, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    gqa_vlm.model.save_pretrained(tmp_path / "dense")
    model = loaded(tmp_path / "dense", quantization_config=TorchAoConfig(quant_type=quantization.Int8WeightOnlyConfig()))
    model.save_pretrained(tmp_path / "int8")
    gqa_vlm.processor.save_pretrained(tmp_path / "int8")
    with pytest.raises(UnsupportedModelError, match="are quantised"):
        infoprune.load(tmp_path / "int8")


# --- the precision of the weights ----------------------------------------------------------------------------------------------------


def dtypes(folder):
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


def test_weights_are_saved_in_the_precision_asked_for(gqa_vlm, questions, small, tmp_path, without_infoprune):
    result = compress(gqa_vlm, questions, flops=0.8, rank_multiple=2, examples=12, ffn="low-rank")
    frequencies = {name: value.clone() for name, value in result.vlm.model.named_buffers()}
    folder = infoprune.save(result.vlm, tmp_path / "half", probe=result.probe, dtype=torch.bfloat16)  # compares logits
    assert dtypes(folder) == {torch.bfloat16} and dtypes(small[0]) == {torch.float32}
    assert loaded(folder).dtype == torch.bfloat16  # Transformers takes the precision that the configuration states
    assert set(load_file(folder / "model.safetensors")) == set(load_file(small[0] / "model.safetensors"))  # tied weights once
    held = infoprune.load(folder)
    assert held.stored == torch.bfloat16 and infoprune.load(small[0]).stored == torch.float32
    infoprune.save(held, tmp_path / "again")  # as it came
    assert dtypes(tmp_path / "again") == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(held.model(**small[1]).logits, result.vlm.model(**small[1]).logits)  # the one in memory was rounded, too
    assert result.vlm.model.dtype == torch.float32
    assert all(torch.equal(value, frequencies[name]) for name, value in result.vlm.model.named_buffers())


def test_tokenizers_are_saved_free_of_the_last_call(gqa_vlm, questions, tmp_path):
    result = compress(gqa_vlm, questions, flops=0.8, rank_multiple=2, examples=12)
    tokenizer = result.vlm.processor.tokenizer
    tokenizer(["what", "what colour"], padding=True, truncation=True, max_length=2, padding_side="left")
    folder = infoprune.save(result.vlm, tmp_path / "small")
    saved = json.loads((folder / "tokenizer.json").read_text())
    assert saved["padding"] is None and saved["truncation"] is None
    assert AutoProcessor.from_pretrained(folder).tokenizer.padding_side == tokenizer.padding_side


def test_images_that_made_a_model_are_no_test_of_it(gqa_vlm, questions, tmp_path):
    result = compress(gqa_vlm, questions, flops=0.8, rank_multiple=2, examples=12)
    loaded = infoprune.load(infoprune.save(result.vlm, tmp_path / "small"))
    images = [question.image for question in questions]
    known = len(loaded.seen["calibration"])
    (told,) = seen_warnings(loaded.seen, images)
    assert f"{known} of the {len(set(images))} images are among those that the model was calibrated on" in told
    other = tmp_path / "other.png"
    Image.new("RGB", (9, 9), "red").save(other)
    assert seen_warnings(loaded.seen, [other]) == []
    (tmp_path / "small" / "images.json").write_text('{"calibration": ["../../x"]}')
    with pytest.raises(CheckpointError, match="is damaged"):
        infoprune.load(tmp_path / "small")


@torch.no_grad()
def test_rounding_keeps_ties_and_shapes():
    model = torch.nn.Module()
    shared = torch.nn.Parameter(torch.tensor([1.0, 1.001]))
    shapes = {"a": shared, "b": shared, "c": torch.nn.Parameter(torch.empty(0, 3)), "d": torch.nn.Parameter(torch.empty(2, 0))}
    for name, parameter in shapes.items():
        model.register_parameter(name, parameter)
    state = rounded_(model, torch.bfloat16)
    assert state["a"] is state["b"] and state["a"].dtype == torch.bfloat16
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in shapes.items()}
    assert shared.tolist() == state["a"].float().tolist() != [1.0, 1.001]


def test_the_command_line_keeps_the_precision_of_the_original(gqa_vlm, jsonl, tmp_path):
    original = gqa_vlm.copy()
    original.model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    original.processor.save_pretrained(tmp_path / "dense")

    def run(out, *more):
        command = ["-m", "infoprune", "compress", tmp_path / "dense", "--data", jsonl, "--flops", "0.8", "--rank-multiple", "2", "-o", out]
        return subprocess.run([sys.executable, *map(str, (*command, *more))], capture_output=True, text=True)

    assert run(tmp_path / "half").returncode == 0
    assert dtypes(tmp_path / "half") == {torch.bfloat16}
    again = ["-m", "infoprune", "plan", "apply", tmp_path / "half", tmp_path / "dense", "--data", jsonl, "-o", tmp_path / "again"]
    assert subprocess.run([sys.executable, *map(str, again)], capture_output=True).returncode == 0
    assert dtypes(tmp_path / "again") == {torch.bfloat16}
    assert run(tmp_path / "full", "--weights", "fp32").returncode == 0
    assert dtypes(tmp_path / "full") == {torch.float32}
    told = run(tmp_path / "none", "--weights", "int3")
    assert told.returncode == 2 and "no precision 'int3'" in told.stderr and not (tmp_path / "none").exists()


def test_a_checkpoint_that_the_memory_can_not_hold_twice_is_kept(gqa_vlm, questions, tmp_path, monkeypatch):
    result = compress(gqa_vlm, questions, flops=0.8, rank_multiple=2, examples=12)

    def too_large(*args, **options):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as error:
            raise CheckpointError("could not be loaded") from error

    told = []
    with monkeypatch.context() as patched:
        patched.setattr("infoprune.checkpoint.load", too_large)
        folder = infoprune.save(result.vlm, tmp_path / "small", probe=result.probe, notify=told.append)
    assert "not compared" in told[-1]
    assert infoprune.load(folder).plan == result.vlm.plan

    def damaged(*args, **options):
        raise CheckpointError("damaged")

    monkeypatch.setattr("infoprune.checkpoint.load", damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        infoprune.save(result.vlm, tmp_path / "other", probe=result.probe)
    assert not (tmp_path / "other").exists()


def test_weights_are_those_that_transformers_reads(gqa_vlm, tmp_path):
    """What an earlier save left beside them, whole or in shards, is not read, and not counted."""
    for name, first in (("whole", "100GB"), ("shards", "50KB")):
        gqa_vlm.model.save_pretrained(tmp_path / name, max_shard_size=first)
        gqa_vlm.processor.save_pretrained(tmp_path / name)
    shards = weight_files(tmp_path / "shards")
    assert weight_files(tmp_path / "whole") == ["model.safetensors"] and len(shards) > 1
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / "shards")
    assert weight_files(tmp_path / "shards") == ["model.safetensors"]
    (tmp_path / "shards" / shards[0]).unlink()
    infoprune.load(tmp_path / "shards")
