"""What strangers' files and slips of the hand may do: one clear message, nothing lost, nothing run."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import processors

import infoprune
from infoprune import CompressionOptions, Example
from infoprune.certification.certificate import Certificate
from infoprune.checkpoint import check_output_folder, written_aside
from infoprune.cli.console import plain
from infoprune.data import load_examples
from infoprune.data.images import identities, unreadable
from infoprune.errors import CheckpointError, DataError, InfoPruneError, PlanError, UnsupportedModelError
from infoprune.evaluation.quality import Quality, paired_drop
from infoprune.evaluation.record import ANSWERS, RecordFile
from infoprune.evaluation.runner import evaluate
from infoprune.graphs import _stops
from infoprune.model import load, prompt_encoder
from infoprune.packing import answer_logits, batches
from infoprune.plan import CompressionPlan
from test_cli import run
from tiny_models import TINY, WORDS, build

# --- folders -----------------------------------------------------------------------------------------------------------------------


def test_outputs_never_take_the_place_of_what_is_no_output(tmp_path, monkeypatch):
    source = tmp_path / "models" / "llava"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    for folder in (source, tmp_path / "models", tmp_path):
        with pytest.raises(CheckpointError, match="never modified"):
            check_output_folder(folder, source=source, overwrite=True)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="no earlier output"):
        check_output_folder(notes, overwrite=True)
    monkeypatch.chdir(notes)
    for here in (".", "", "..", notes):
        with pytest.raises(CheckpointError, match="the one that you are in"):
            check_output_folder(here, overwrite=True)
    assert check_output_folder("small") == notes / "small"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output_folder("~/small") == tmp_path / "small"
    with pytest.raises(CheckpointError, match="no earlier output"):  # other people's checkpoints have a config.json, too
        check_output_folder(source, overwrite=True)
    (source / "plan.json").write_text("{}")
    for told in ("{}", "[", "[" * 100_000, "\x00"):  # nor does a list make an output that is none
        (source / "files.json").write_text(told)
        with pytest.raises(CheckpointError, match="no earlier output"):
            check_output_folder(source, overwrite=True)
    written = ["config.json", "plan.json", "files.json", "qformer_tokenizer/tokenizer.json"]
    (source / "files.json").write_text(json.dumps(written))
    (source / "__pycache__").mkdir()
    (source / "__pycache__" / "modeling_infoprune.cpython-311.pyc").write_bytes(b"")
    assert check_output_folder(source, overwrite=True) == source
    for theirs in ("results.json", "notes.txt", "mine.py", "adapter_model.safetensors", "dense/model.safetensors", "notes/mine.txt"):
        (source / theirs).parent.mkdir(exist_ok=True)
        (source / theirs).write_bytes(b"")
        with pytest.raises(CheckpointError, match=f"holds {theirs}, which is no part of an output"):
            check_output_folder(source, overwrite=True)
        (source / theirs).unlink()
    with pytest.raises(CheckpointError, match="names the built-in model"):
        check_output_folder("demo")
    assert check_output_folder("~nobody-of-this-name/small") == notes / "~nobody-of-this-name" / "small"
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "mounted")
    with pytest.raises(CheckpointError, match="file system is mounted"):
        check_output_folder(tmp_path / "mounted")
    (source / "mine").mkdir()
    (source / "mine" / "photo.jpg").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"mine.photo\.jpg, which is no part of an output"):
        check_output_folder(source, overwrite=True)


def test_what_was_there_comes_back_if_the_new_one_can_not_take_its_place(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "plan.json").write_text("old")
    with pytest.raises(CheckpointError, match="could not be written"), written_aside(folder):
        pass  # nothing was written, so that there is nothing to rename
    assert (folder / "plan.json").read_text() == "old"
    with written_aside(folder) as aside:
        aside.mkdir()
        (aside / "plan.json").write_text("new")
    assert (folder / "plan.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


# --- checkpoints -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copied")


def test_no_other_weights_than_safetensors_are_read(copied):
    config = json.loads((copied / "config.json").read_text())
    torch.save({}, copied / "adapter_model.bin")
    (copied / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    with pytest.raises(CheckpointError, match="transformers_weights"):
        load(copied)
    (copied / "config.json").write_text(json.dumps(config))
    load(copied)
    (copied / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="comes with an adapter"):
        load(copied)


MADE_UP = ["[]", "{}", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {"a": 1}}', "[" * 100_000, "{"]


@pytest.mark.parametrize("index", MADE_UP)
def test_made_up_indices_of_weights(copied, index):
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="not a valid weight index"):
        load(copied)


@pytest.mark.parametrize("device", ["gpu", "cuda", "meta", "mps"])
def test_devices_that_are_not_there(checkpoint, device):
    if device != "meta" and device in ("cuda", "mps") and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        pytest.skip("this machine has one")
    with pytest.raises(InfoPruneError, match=f"The device '{device}'"):
        load(checkpoint, device=device)


def test_made_up_plans(checkpoint, jsonl, tmp_path):
    for text in ('{"version": ' + "1" * 5000 + "}", "[" * 100_000):
        with pytest.raises(PlanError, match="not valid JSON"):
            CompressionPlan.from_json(text)
    small = tmp_path / "small"
    run("compress", checkpoint, "--data", jsonl, "--flops", 0.8, "--rank-multiple", 2, "--examples", 6, "-o", small)
    plan = json.loads((small / "plan.json").read_text())
    for changes, told in (
        ({"method": plan["method"] | {"shrinkage": "abc"}}, "method is not usable"),
        ({"calibration": plan["calibration"] | {"seed": 10**30}}, "calibration.seed"),
        ({"model_id": "[/bold]", "heads": {"a[/x]": {"keep_units": [0], "num_units": 2, "compensate": "none"}}}, None),
    ):
        (tmp_path / "plan.json").write_text(json.dumps(plan | changes))
        if told is None:
            assert "[/bold]" in run("plan", "show", tmp_path / "plan.json").stdout
            continue
        done = run("plan", "apply", tmp_path / "plan.json", checkpoint, "--data", jsonl, "-o", tmp_path / "again", status=2)
        assert told in done.stderr


def test_a_rank_for_up_alone_is_replayed(gqa_vlm, questions):
    """Gate and up have factors of their own then, though the gate is not cut."""
    small = infoprune.compress(gqa_vlm, questions, flops=0.8, heads="none", structure="separate", rank_multiple=2).vlm
    paths = [site.path for site in gqa_vlm.architecture.ffn if site.gated and site.path in small.plan.ffn]
    ffn = {paths[0]: small.plan.ffn[paths[0]].model_copy(update={"gate_rank": None, "up_rank": 4, "down_rank": None, "joint_rank": None})}
    plan = small.plan.model_copy(update={"ffn": ffn})
    assert infoprune.apply_plan(gqa_vlm.copy(), plan, questions).plan == plan


def test_replay_on_other_questions_is_told(gqa_vlm, jsonl, tmp_path):
    from infoprune.progress import Progress

    class Notes(Progress):
        def note(self, message):
            told.append(message)

    told: list[str] = []
    plan = infoprune.compress(gqa_vlm, str(jsonl), flops=0.8, rank_multiple=2).vlm.plan
    infoprune.apply_plan(gqa_vlm.copy(), plan, progress=Notes())
    assert not any("not those that the plan was decided on" in text for text in told)
    jsonl.write_text("\n".join(jsonl.read_text().splitlines()[:-1]) + "\n")
    infoprune.apply_plan(gqa_vlm.copy(), plan, progress=Notes())
    assert any("not those that the plan was decided on" in text for text in told)
    assert plan.calibration.prompt_suffix == "" and not any("followed by" in text for text in told)
    other = plan.model_copy(update={"calibration": plan.calibration.model_copy(update={"prompt_suffix": " shortly"})})
    found = infoprune.apply_plan(replace(gqa_vlm.copy(), model_id="mine", revision="abc"), other, str(jsonl), progress=Notes())
    assert "followed by ' shortly'" in told[-1]
    assert (found.plan.model_id, found.plan.revision, found.plan.calibration.prompt_suffix) == ("mine", "abc", "")
    assert found.plan.calibration.fingerprint != plan.calibration.fingerprint and found.plan.heads == plan.heads


# --- prompts -----------------------------------------------------------------------------------------------------------------------

BEGIN, TURN = "<fake_token_around_image>", "<end_of_utterance>"
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} "
    "{% endif %}{% endfor %}{% if m['role'] == 'assistant' %}" + TURN + " {% endif %}{% endfor %}"
)


def chatty():
    """A model whose template writes the beginning of the sequence, as its tokenizer does, and ends turns with a token of their own."""
    vlm = build(TINY[1])
    tokenizer = vlm.processor.tokenizer
    tokenizer.bos_token = BEGIN
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, WORDS.index(BEGIN))])
    return vlm


def test_a_prompt_begins_once(questions):
    vlm = chatty()
    example = questions[0]
    plainly = vlm.encoder.encode(example, example.load_image()).prompt
    assert plainly.count(WORDS.index(BEGIN)) == 1  # from the tokenizer
    vlm.processor.chat_template = TEMPLATE
    assert vlm.encoder.prompt("what ?").startswith(BEGIN)
    encoded = vlm.encoder.encode(example, example.load_image()).prompt
    assert encoded.count(WORDS.index(BEGIN)) == 1 and encoded[0] == WORDS.index(BEGIN)


@pytest.mark.parametrize(
    ("stops", "end"), [([1, WORDS.index(TURN)], TURN), ([WORDS.index(TURN), 1], TURN), (1, "<eos>"), ([1], "<eos>"), (None, "<eos>")]
)
def test_answers_end_as_the_template_ends_them_if_generation_stops_there(questions, stops, end):
    vlm = chatty()
    vlm.processor.chat_template = TEMPLATE
    vlm.model.generation_config.eos_token_id = stops
    encoder = prompt_encoder(vlm.model, vlm.processor)
    assert encoder.end == WORDS.index(end)
    assert encoder.encode(questions[0], questions[0].load_image()).answer[-1] == WORDS.index(end)
    assert WORDS.index(end) in _stops(vlm.__class__(vlm.model, vlm.processor, encoder, vlm.architecture, "x"))
    vlm.processor.chat_template = "{{ raise_exception('no answers here') }}"
    assert prompt_encoder(vlm.model, vlm.processor).end == 1


USER = "{% for m in messages %}{% if m['role'] == 'user' %}<image>{{ m['content'][1]['text'] }} is{% else %}"


@pytest.mark.parametrize(
    ("assistant", "prefix"),
    [
        ("", ""),
        (" ", " "),
        ("{{ '\n' }}", "\n"),
        ("{{ 1 / 0 }}", None),
        ("{% set m = messages[0] %}", None),
        ("<eos>", "<eos>"),
        ("no thoughts ", None),
    ],
)
def test_answers_start_as_the_template_starts_them(assistant, prefix):
    """Templates of Mistral's and Cohere's models put nothing between the prompt's last token and the answer."""
    vlm = chatty()
    vlm.processor.chat_template = USER + assistant + "{{ m['content'][0]['text'] }}<eos>{% endif %}{% endfor %}"
    assert prompt_encoder(vlm.model, vlm.processor).answer_prefix == prefix


def test_where_a_dialogue_does_not_go_on_as_its_prompt_ends_the_start_of_answers_is_not_known():
    vlm = chatty()
    vlm.processor.chat_template = (
        USER + " the {{ m['content'][0]['text'] }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %} a{% endif %}"
    )
    assert prompt_encoder(vlm.model, vlm.processor).answer_prefix is None


@torch.no_grad()
def test_questions_in_front_of_the_image_are_not_packed(questions, tmp_path):
    vlm = build(TINY[1])
    assert vlm.encoder.shares_prefix
    vlm.processor.chat_template = (
        "{% for m in messages %}{% for kind in ['text', 'image'] %}{% for c in m['content'] %}{% if c['type'] == kind %}"
        "{{ c['text'] if kind == 'text' else ' <image> ' }}{% endif %}{% endfor %}{% endfor %}{% endfor %}is"
    )
    assert not vlm.encoder.shares_prefix
    for batch, indices in batches(vlm.encoder, questions):
        assert batch.num_questions == len(indices) == len(batch.inputs["input_ids"])
        answer_logits(vlm.model, batch)
    assert infoprune.compress(vlm, questions, flops=0.8, rank_multiple=2, examples=6).flops_ratio <= 0.8


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}", "TypeError"),  # of a model of texts
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "<image>"),
        ("{% for m in messages %}<image>{% endfor %}", "lack the question"),
        ("{% bad", "TemplateSyntaxError"),
    ],
)
def test_chat_templates_that_take_no_image_are_refused(tmp_path, checkpoint, template, reason):
    (checkpoint / "chat_template.jinja").write_text(template)
    with pytest.raises(UnsupportedModelError, match=f"processor of .* {reason}|processor of .*{reason}.*list of images and texts"):
        load(checkpoint)


# --- images ------------------------------------------------------------------------------------------------------------------------


def test_images_are_read_as_people_see_them(tmp_path):
    def read(name):
        return np.asarray(Example(tmp_path / name, "?", "!").load_image())

    deep = np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read("deep.png")[0, :, 0].tolist() == [0, 128, 255]
    clear = np.zeros((1, 2, 4), dtype=np.uint8)
    clear[0, 1] = (10, 20, 30, 255)
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    assert read("clear.png")[0].tolist() == [[255, 255, 255], [10, 20, 30]]
    turned = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    assert read("turned.png")[0].tolist() == [[0, 0, 255], [255, 0, 0]]
    turned.save(tmp_path / "turned.tif", tiffinfo=exif)
    assert read("turned.tif")[0].tolist() == [[0, 0, 255], [255, 0, 0]]  # Pillow turns these while it loads them
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 3, 0) + struct.pack("<HHI4s", 0x0128, 2, 2, b"a")  # a unit that calls itself text
    turned.save(tmp_path / "odd.png", exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4))
    assert read("odd.png")[0].tolist() == [[0, 0, 255], [255, 0, 0]] and not unreadable([tmp_path / "odd.png"])
    Image.new("CMYK", (2, 1), (0, 0, 0, 255)).save(tmp_path / "print.jpg")
    assert read("print.jpg").shape == (1, 2, 3)
    Image.fromarray(np.array([[0.1, 0.9]], dtype=np.float32)).save(tmp_path / "measured.tif")
    (tmp_path / "postscript.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    (tmp_path / "broken.dds").write_bytes(b"DDS " + bytes(200))
    bad = unreadable(tmp_path / name for name in ("measured.tif", "postscript.jpg", "broken.dds", "deep.png"))
    assert {path.name for path in bad} == {"measured.tif", "postscript.jpg", "broken.dds"}
    with pytest.raises(DataError, match="not colours"):
        read("measured.tif")


def test_copies_of_an_image_are_one_unit(tmp_path, gqa_vlm):
    paths = []
    for name, color in (("a", "red"), ("b", "red"), ("c", "blue"), ("d", "green")):
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (16, 16), color).save(paths[-1])
    a, b, c, d = identities(paths)
    assert a == b and len({a, c, d}) == 3
    assert identities([tmp_path / "gone.png", tmp_path / "gone too.png"]) == [str(tmp_path / "gone.png"), str(tmp_path / "gone too.png")]
    asked = [Example(path, f"what color {n} ?", "red") for path in paths for n in range(2)]
    found = evaluate(gqa_vlm, asked, against=gqa_vlm, timing=False)["comparison"]
    assert found["num_images"] == 3
    dense, small = Quality(np.ones(8)), Quality(np.array([0.0, 0, 1, 1, 1, 1, 1, 1]))
    assert paired_drop(dense, small, asked) == paired_drop(dense, small, asked, images=["a"] * 4 + ["c"] * 2 + ["d"] * 2)


def test_halves_of_characters_and_endless_numbers_are_bad_rows(jsonl):
    good = jsonl.read_text()
    first = json.loads(good.splitlines()[0])
    bad = [
        first | {"answer": "caf\ud83d"},
        first | {"id": "\ud83d"},
        first | {"answers": ["a", "\ud83d"]},
        first | {"kinds": {"\ud83d": "x"}},
    ]
    lines = [json.dumps(row) for row in bad] + ['{"id": ' + "1" * 5000 + "}"]
    jsonl.write_text("\n".join([good, *lines]) + "\n")
    with pytest.raises(DataError, match="5 bad records") as caught:
        load_examples(str(jsonl))
    str(caught.value).encode()  # can be printed
    assert len(load_examples(str(jsonl), skip_bad=True)) == len(good.splitlines())


def test_terminals_are_not_told_what_to_do():
    assert plain("[/INST] \x1b[2Jcat\a").plain == "[/INST] \N{REPLACEMENT CHARACTER}[2Jcat\N{REPLACEMENT CHARACTER}"


# --- options -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--confidence", 95], "confidence must be at least 0.5"), (["--confidence", 0], "confidence must be"),
        (["--limit", -1], "--limit must be at least 1"), (["--limit", 0], "--limit must be at least 1"),
        (["--max-new-tokens", 8], "add --generate"), (["--images-per-batch", 0], "must be at least 1"),
        (["--generate", "--answers", "."], "--answers must name a file"), (["--device", "gpu"], "The device 'gpu'"),
        (["--generate", "--metric", "vqav2/official"], "weighs the answers of at least 2 people"),
        (["--ocr"], "no words that a reader found"),
        (["--ocr", "--prompt-suffix", "!"], "take one"),
    ],
)  # fmt: skip
def test_what_evaluate_can_not_do_is_told_first(checkpoint, jsonl, given, told):
    refused = run("evaluate", checkpoint, "--data", jsonl, "--repeats", 0, *given, status=2).stderr
    assert told in refused and "scor" not in refused.replace("scored", "")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--recovery-steps", 9, "--recovery-rate", 1e-3], "recovery_steps and recovery_rate are read only with --recovery"),
        (["--gate-steps", 9, "--recovery", "full"], "gate_steps is read only with --heads trained"),
        (["--validation", "easy-vqa"], "validation is read only with"), (["--confidence", 0.9], "confidence is read only with --max-drop"),
        (["--share", 0.5], "shares is read only with --max-drop"), (["--seed", 10**30], "seed must be"),
    ],
)  # fmt: skip
def test_options_that_nothing_reads_are_refused(checkpoint, jsonl, tmp_path, given, told):
    assert told in run("compress", checkpoint, "--data", jsonl, "--flops", 0.8, "-o", tmp_path / "x", *given, status=2).stderr


def test_result_files_go_where_they_can(checkpoint, tmp_path):
    refused = run("evaluate", checkpoint, "--data", "gqa@somewhere", "--generate", "--results", tmp_path / "no" / "a.json", status=2).stderr
    assert "its folder does not exist" in refused


def test_models_that_read_otherwise_are_not_compared(questions):
    one, other = build(TINY[1]), build(TINY[1])
    other.processor.tokenizer.add_tokens(["novel"])
    with pytest.raises(InfoPruneError, match="they differ in vocabulary"):
        evaluate(one, questions, against=other)
    brighter = build(TINY[1])
    brighter.processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    with pytest.raises(InfoPruneError, match="they differ in what they make of an image"):
        evaluate(one, questions, against=brighter)
    longer = build(TINY[1])
    longer = replace(longer, encoder=replace(longer.encoder, eos=longer.encoder.end + 1))
    with pytest.raises(InfoPruneError, match="they differ in the end of answers"):
        evaluate(one, questions, against=longer)


def test_questions_without_answers_are_not_scored(gqa_vlm, questions):
    with pytest.raises(DataError, match="has no reference answer to score or train on"):
        evaluate(gqa_vlm, [questions[0], replace(questions[1], answer="")], timing=False)
    with pytest.raises(DataError, match="has no reference answer to score or train on"):
        infoprune.compress(gqa_vlm, [replace(question, answer="") for question in questions], flops=0.8)


def test_ask_shows_what_was_asked(checkpoint, questions):
    assert "[a] cat or [/b]" in run("ask", checkpoint, questions[0].image, "[a] cat or [/b] dog ?").stdout


def test_strange_files_beside_answers_are_left_alone(tmp_path):
    file = RecordFile(tmp_path / "answers.jsonl", {"format": "x"}, [], ANSWERS)
    for name in ("7.part", "others.jsonl.0.part"):
        (tmp_path / name).write_text("")
    file.appender(0)({})
    assert [path.name for path in file._parts()] == ["answers.jsonl.0.part"]
    file.finish([])
    assert {path.name for path in tmp_path.iterdir()} == {"7.part", "others.jsonl.0.part", "answers.jsonl"}


def test_seeds_are_what_generators_take():
    for seed in (-1, 2**63):
        with pytest.raises(InfoPruneError, match="seed must be"):
            CompressionOptions(flops=0.5, seed=seed)


def test_a_certificate_of_endless_depth_is_one_message(tmp_path):
    (tmp_path / "certificate.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="Cannot read the certificate"):
        Certificate.read(tmp_path)
