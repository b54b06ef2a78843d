from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

import infoprune
from infoprune.data import subset
from infoprune.errors import DataError
from infoprune.evaluation import cost
from infoprune.evaluation.generation import generate_answers, longer_references
from infoprune.evaluation.metrics import score_answers
from infoprune.evaluation.quality import Quality, can_share_prefix, paired_drop, score, settings_not_scored
from infoprune.evaluation.runner import bytes_on_disk, evaluate
from infoprune.packing import batches, rows_by_image
from infoprune.progress import SILENT
from infoprune.prompts import PromptEncoder
from infoprune.training.data import rows_of
from infoprune.training.options import TrainingOptions
from infoprune.training.run import split
from tiny_models import examples


def test_jsonl_and_json(jsonl, questions, tmp_path):
    assert infoprune.load_examples(str(jsonl)) == questions
    records = [json.loads(line) for line in jsonl.read_text().splitlines()]
    as_json = tmp_path / "q.json"
    as_json.write_text(json.dumps(records))
    assert infoprune.load_examples(str(as_json)) == questions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no records"), ("{oops\n", "line 1"), ('{"question": "q", "answer": "b"}\n', "image"), ("[1]\n", "not an object"),
        ('{"image": "a.png", "question": " ", "answer": "b"}\n', "question"),
    ],
)  # fmt: skip
def test_bad_data_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        infoprune.load_examples(str(path))


def test_missing_data_split_and_images(tmp_path, gqa_vlm):
    with pytest.raises(DataError, match="No data"):
        infoprune.load_examples(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="no split"):
        infoprune.load_examples("easy-vqa:holdout")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    for path in (broken, tmp_path / "missing.png"):
        with pytest.raises(DataError, match=r"\.png"):
            score([gqa_vlm], [infoprune.Example(path, "what shape ?", "red")])
    with pytest.raises(DataError, match="no examples"):
        score([gqa_vlm], [])


def test_compression_skips_bad_records_of_all_its_data(jsonl, gqa_vlm, tmp_path):
    good = jsonl.read_text()
    jsonl.write_text(good + '\n{"image": "gone.png", "question": "what ?", "answer": "red"}')
    validation = tmp_path / "validation.jsonl"
    validation.write_text(jsonl.read_text())
    with pytest.raises(DataError, match="1 bad record"):
        infoprune.compress(gqa_vlm, str(jsonl), flops=0.7, rank_multiple=2)
    with pytest.raises(DataError, match=r"validation.jsonl can't be used.* 1 bad record"):
        split(gqa_vlm.encoder, [], TrainingOptions(validation=str(validation)), 0, SILENT)
    assert len(split(gqa_vlm.encoder, [], TrainingOptions(validation=str(validation)), 0, SILENT, skip_bad=True)[1]) == 18
    assert infoprune.compress(gqa_vlm, str(jsonl), flops=0.7, rank_multiple=2, skip_bad=True).flops_ratio <= 0.7


def test_subset_is_reproducible_and_spreads(questions):
    assert subset(questions, 6, seed=1) == subset(questions, 6, seed=1)
    assert len({e.image for e in subset(questions, 6, seed=1, per_image=1)}) == 6
    assert subset(questions, None, seed=0) == subset(questions, 999, seed=0) == questions


def test_scoring_agrees_with_generate(vlm, questions):
    """Teacher-forced scoring says of every question what greedy generation does, also where the model is right."""
    answers = generate_answers(vlm, questions, max_new_tokens=4)
    relabelled = [infoprune.Example(q.image, q.question, a) for q, a in zip(questions, answers, strict=True) if a]
    mixed = [*questions, *relabelled]
    expected = [a == e.answer for a, e in zip(generate_answers(vlm, mixed, max_new_tokens=4), mixed, strict=True)]
    scored = score([vlm], mixed)[0].correct
    # Scoring also asks for the end of the answer, which a random model rarely gives after so few tokens.
    assert all(not s or e for s, e in zip(scored, expected, strict=True))


def test_kl_of_a_model_with_itself_is_zero(gqa_vlm, questions):
    dense, same = score([gqa_vlm, gqa_vlm], questions)
    assert same.kl_nats == pytest.approx(0, abs=1e-6)
    assert (dense.correct == same.correct).all()


@pytest.mark.parametrize("ending", ["ASSISTANT:", "ASSISTANT: ", "ASSISTANT:\n"])
def test_answers_follow_the_prompt_as_they_would_in_one_text(gqa_vlm, questions, ending):
    """Llama 2's tokenizers put a space before whatever they read."""
    words = ["<unk>", "<eos>", "<pad>", "<image>", "▁", "▁▁", "\n", *"ASITN:whatcolur?ed", "re", "red", "▁red"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    merges = [("▁", "▁"), ("r", "e"), ("re", "d"), ("▁", "red")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", extra_special_tokens=["<image>"]
    )
    processor = copy.deepcopy(gqa_vlm.processor)
    processor.tokenizer, processor.image_token_id = tokenizer, 3
    processor.chat_template = "<image>{{ messages[0]['content'][1]['text'] }} " + ending.replace("\n", "{{ '\n' }}")
    encoder = PromptEncoder(processor, 3, family=gqa_vlm.architecture.family)
    question = replace(questions[0], question="what colour ?", answer="red")
    found = encoder.encode(question, question.load_image())
    assert tokenizer.convert_ids_to_tokens(found.answer) == ["▁red" if ending[-1] == ":" else "red", "<eos>"]
    assert tokenizer.decode([*found.prompt, found.answer[0]]).endswith(f"{ending.rstrip(' ')}{' ' * (ending[-1] != chr(10))}red")


def test_questions_lose_the_image_token_that_the_prompt_has(gqa_vlm, questions):
    plain = replace(questions[0], question="what colour is the circle ?")
    for text in ("<image>\nwhat colour is the circle ?", "what colour is the circle ? <image>"):
        asked = replace(plain, question=text)
        assert gqa_vlm.encoder.prompt_of(asked) == gqa_vlm.encoder.prompt_of(plain)
        assert score([gqa_vlm], [asked])[0].accuracy == score([gqa_vlm], [plain])[0].accuracy


def test_data_made_for_llava_lose_their_image_token_with_every_model(gqa_vlm, questions, monkeypatch):
    monkeypatch.setattr(gqa_vlm.processor, "image_token", "<image_pad>")
    for text in ("<image>\nwhat ?", "<image_pad>what ?"):
        assert gqa_vlm.encoder.prompt_of(replace(questions[0], question=text)) == gqa_vlm.encoder.prompt("what ?")


def test_questions_longer_than_the_model_has_places_for_are_refused(gqa_vlm, questions):
    encoder = replace(gqa_vlm.encoder, longest={"input_ids": 12})
    example = replace(questions[0], question="what colour is the circle ?")
    assert encoder.encode(example, example.load_image())
    for long in (replace(example, question="is the " * 10), replace(example, answer="circle " * 10)):
        with pytest.raises(DataError, match=r"takes \d+ tokens \(input_ids\), where the model has places for 12"):
            encoder.encode(long, example.load_image())


def test_rows_hold_no_more_text_than_masks_can_bear(questions, monkeypatch):
    monkeypatch.setattr("infoprune.packing.CHARACTERS_PER_ROW", 100)
    texts = [replace(questions[0], question="q" * length, answer="") for length in (40, 40, 40, 150, 10, 10)]
    assert rows_by_image(texts) == [[0, 1], [2], [3], [4, 5]]
    assert [len(row) for row in rows_of(texts, 1, share_prefix=True)] == [1] * 6


def test_only_attention_that_takes_boolean_masks_reads_packed_rows(gqa_vlm):
    assert can_share_prefix(gqa_vlm)
    gqa_vlm.model.set_attn_implementation("eager")
    assert not can_share_prefix(gqa_vlm)


def test_settings_that_scoring_ignores_are_named(gqa_vlm):
    assert settings_not_scored(gqa_vlm) == []
    gqa_vlm.model.generation_config.repetition_penalty = 1.05
    gqa_vlm.model.generation_config.suppress_tokens = [3]
    assert settings_not_scored(gqa_vlm) == ["repetition_penalty=1.05", "suppress_tokens=[3]"]


def test_references_that_can_not_be_generated_are_counted(gqa_vlm, questions):
    short, long = replace(questions[0], answer="red"), replace(questions[0], answer="red circle red circle")
    assert longer_references(gqa_vlm, [short, long, replace(long, answers=("red",))], 2) == 1


def test_weights_on_disk_are_those_that_are_read(checkpoint):
    vlm = infoprune.load(checkpoint)
    before = bytes_on_disk(vlm)
    (checkpoint / "consolidated.safetensors").write_bytes(bytes(1000))
    assert before == bytes_on_disk(vlm) == (checkpoint / "model.safetensors").stat().st_size


def test_attention_of_apples_gpus_is_counted_as_elsewhere():
    shapes = (2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8)
    query, key, value = (torch.randn(shape) for shape in shapes)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert cost._attention(*shapes, out_shape=shapes[0]) == counter.get_total_flops() > 0


def test_what_a_processor_can_not_take_is_told(gqa_vlm, questions, monkeypatch):
    def thin(*args, **options):
        raise ValueError("absolute aspect ratio must be smaller than 200")

    monkeypatch.setattr(type(gqa_vlm.processor), "__call__", thin)
    with pytest.raises(DataError, match=r"can't take .*pixels \(ValueError: absolute aspect ratio"):
        score([gqa_vlm], questions[:1])


def test_paired_interval_covers_the_drop_and_respects_clusters(tmp_path):
    questions = examples(tmp_path, images=40)
    rng = np.random.default_rng(0)
    wrong = np.repeat(rng.random(40) < 0.3, 3)  # whole images are lost
    dense, compressed = Quality(np.ones(120, dtype=bool)), Quality(~wrong)
    drop, (low, high) = paired_drop(dense, compressed, questions)
    assert drop == pytest.approx(100 * wrong.mean())
    assert low < drop < high
    independent = 2 * 1.96 * 100 * np.sqrt(wrong.mean() * (1 - wrong.mean()) / 120)
    assert high - low > 1.3 * independent


def test_exact_match_ignores_white_space_only(questions):
    assert score_answers(["red", " no\n", "Circle"], questions[:3], "exact").per_example.tolist() == [1, 1, 0]


def test_wilson_interval():
    low, high = Quality(np.array([True] * 97 + [False] * 3)).accuracy_ci95
    assert (low, high) == pytest.approx((91.55, 98.97), abs=0.02)


def test_generated_answers_are_judged_instead_of_scores(gqa_vlm, questions):
    right = [q.answer for q in questions]
    wrong = ["", *right[1:]]
    report = evaluate(gqa_vlm, questions, answers=[wrong], timing=False)
    assert report["models"][0]["accuracy"] == pytest.approx(100 * (1 - 1 / len(questions)))
    assert (report["answers"], report["prompt"]) == ("generated", gqa_vlm.encoder.prompt(questions[0].question))
    report = evaluate(gqa_vlm, questions, against=gqa_vlm, answers=[right, wrong], timing=False)
    assert [record["accuracy"] for record in report["models"]] == [100, pytest.approx(100 * (1 - 1 / len(questions)))]
    assert report["comparison"]["drop_points"] == pytest.approx(100 / len(questions))
    assert report["comparison"]["kl_nats"] == pytest.approx(0, abs=1e-6)


def test_comparisons_leave_out_what_the_metric_does_not_count(gqa_vlm, questions):
    asked = [replace(q, kinds={"balanced": "no"} if index % 3 == 0 else {}) for index, q in enumerate(questions)]
    right, wrong = [q.answer for q in asked], [q.answer for q in asked]
    for place in (0, 3, 4):  # two of them are not counted
        wrong[place] = "-"
    report = evaluate(gqa_vlm, asked, against=gqa_vlm, answers=[right, wrong], metric="gqa/official", timing=False)
    counted = 2 * len(asked) // 3
    for record, lost in zip(report["models"], (0, 1), strict=True):
        assert record["num_questions"] == record["metric"]["num_questions"] == counted
        assert record["accuracy"] == pytest.approx(100 * (1 - lost / counted)) == pytest.approx(record["metric"]["overall"], abs=0.01)
    compared = report["comparison"]
    assert compared["drop_points"] == pytest.approx(100 / counted) == pytest.approx(100 - compared["agreement"])
    assert compared["mcnemar"]["dense_only"] == 1 and compared["num_questions"] == counted
    assert [item["index"] for item in compared["changed"]] == [4]
    assert (report["metric"], compared["changed"][0]["question"]) == ("gqa/official", asked[4].question)


def test_quality_of_some_questions():
    quality = Quality(np.array([1.0, 0.5, 0.0]), np.array([1.0, 2, 4, 8]), np.array([2, 0, 1, 2]), ("a", "b", "c"))
    some = quality.only(np.array([True, False, True]))
    assert some.scores.tolist() == [1, 0] and some.answers == ("a", "c")
    assert some.kl_by_question is not None and some.kl_by_question.tolist() == [2, 4.5]


def test_evaluate_side_by_side(gqa_vlm, questions):
    result = infoprune.compress(gqa_vlm, questions, flops=0.6, rank_multiple=2)
    report = evaluate(result.vlm, questions, against=gqa_vlm, repeats=2)
    compared = report["comparison"]
    assert compared["flops_ratio"] == pytest.approx(result.flops_ratio)
    assert compared["kl_nats"] > 0
    assert {"speedup_vision", "speedup_prefill", "speedup_decode", "speedup_end_to_end"} <= set(compared)
    assert [m["params"] for m in report["models"]] == [result.dense_parameters, result.parameters]


def test_questions_on_an_image_share_a_row_wherever_they_stand(gqa_vlm, questions):
    mixed = questions[::2] + questions[1::2]
    images = {question.image for question in questions}
    packed = [(batch, indices) for batch, indices in batches(gqa_vlm.encoder, mixed, images_per_batch=2)]
    assert sum(len(batch.valid) for batch, _ in packed) == len(images)
    assert sorted(index for _, indices in packed for index in indices) == list(range(len(mixed)))
    (whole,), (found,) = score([gqa_vlm], questions), score([gqa_vlm], mixed)
    by_question = dict(zip(questions, whole.answers, strict=True))
    assert found.answers == tuple(by_question[question] for question in mixed)
    many = [replace(questions[0], question=f"what {number} ?") for number in range(70)]
    assert [len(row) for row in rows_by_image(many)] == [32, 32, 6]
