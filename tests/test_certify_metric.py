"""Certificates about a benchmark's own metric, on small folders in its official form."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import infoprune
from infoprune import CompressionOptions
from infoprune.certification.certificate import Certificate
from infoprune.certification.data import split_data
from infoprune.certification.path import Scored, judge, plan_path, score_dense, score_plan
from infoprune.cli.recipe import read_recipe
from infoprune.data import load_examples
from infoprune.errors import CheckpointError, DataError
from infoprune.evaluation import generation
from infoprune.evaluation.cost import Flops
from infoprune.evaluation.generation import generate_answers
from infoprune.evaluation.metrics import score_answers
from infoprune.evaluation.quality import score
from infoprune.progress import Clock
from infoprune.report.model_card import model_card
from tiny_models import TINY, WORDS, build, teach_

LOOSE = {"max_drop": 25.0, "rank_multiple": 2, "shares": (0.9, 0.8), "examples": 12}
ASKED = {"what colour is the circle ?": ["red"] * 7 + ["blue"] * 3, "is there a square in the image ?": ["no"] * 10}


def options(**fields) -> CompressionOptions:
    return CompressionOptions(**(LOOSE | fields))


def pictures(folder, name, count):
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name.format(number))


def vqav2(folder, asked, images=48):
    """VQAv2's training split of these questions, with the answers that people gave, on each of so many images."""
    pictures(folder, "COCO_train2014_{:012d}.jpg", images)
    questions, annotations = [], []
    for number in range(images):
        for place, (text, people) in enumerate(asked.items()):
            told = {"question_id": 10 * number + place, "image_id": number}
            questions.append(told | {"question": text})
            answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(people, start=1)]
            annotations.append(
                told | {"question_type": "what", "answer_type": "other", "multiple_choice_answer": people[0], "answers": answers}
            )
    (folder / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return f"vqav2:train@{folder}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return vqav2(tmp_path_factory.mktemp("vqav2"), ASKED)


@pytest.fixture(scope="module")
def taught(data):
    """A tiny model that answers "blue" where most people said "red": worth .9 by the official metric, and nothing by exact match."""
    vlm = build(TINY[1])
    lessons = [replace(e, answer="blue" if e.answer == "red" else e.answer) for e in load_examples(data)]
    teach_(vlm, lessons)
    assert score([vlm], lessons)[0].accuracy == 100
    return vlm


@pytest.fixture(scope="module")
def certified(taught, data):
    return infoprune.compress(taught, data, **LOOSE)


def test_a_benchmark_is_certified_by_its_own_metric(taught, data, certified):
    certificate = certified.certificate
    split = split_data(taught, data, options())
    assert certificate.metric == split.metric == "vqav2/official"
    dense, small = (
        score_answers(generate_answers(vlm, split.certification), split.certification, "vqav2/official").per_example
        for vlm in (taught, certified.vlm)
    )
    assert set(dense) == {0.9, 1.0}
    assert certificate.dense_accuracy == pytest.approx(100 * dense.mean()) == pytest.approx(95)
    measured = certificate.step.measured
    assert measured.accuracy == pytest.approx(100 * small.mean())
    assert measured.drop_points == pytest.approx(100 * (dense - small).mean())
    assert "generated" in certificate.score and certificate.max_new_tokens == 16 and certificate.precision == "float32"
    assert certificate.prompt == taught.encoder.prompt("{question}\nAnswer the question using a single word or phrase.")


def test_exact_match_is_certified_where_it_is_asked_for(taught, data):
    certificate = infoprune.compress(taught, data, **(LOOSE | {"certify_metric": "exact", "max_drop": 40.0})).certificate
    assert certificate.metric == "exact" and certificate.max_new_tokens is None and "teacher-forced" in certificate.score
    assert certificate.dense_accuracy == pytest.approx(50)


def test_a_good_answer_turned_into_nonsense_counts(taught, data):
    """Exact match with the one reference does not see what "blue" was worth."""
    drops = {}
    for metric in ("exact", "official"):
        settings = options(certify_metric=metric, shares=(0.9,))
        split = split_data(taught, data, settings)
        path = plan_path(taught, split.calibration, data, settings, Clock())
        cut = path.cut(0)
        before = judge(score_dense(taught, split), score_plan(path, cut, 0, split), split, 25, 0.95)
        with torch.no_grad():
            cut.model.lm_head.weight[WORDS.index("blue")] = -cut.model.lm_head.weight[WORDS.index("blue")]
        after = judge(score_dense(taught, split), score_plan(path, cut, 0, split), split, 25, 0.95)
        drops[metric] = after.drop_points - before.drop_points
    assert drops == pytest.approx({"exact": 0.0, "official": 45.0}, abs=5)


def test_interrupted_answers_go_on_where_they_were(taught, data, certified, monkeypatch, tmp_path):
    real, calls = generation.packed_answers, []

    def answered(stop, *arguments):
        calls.append(arguments)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(generation, "packed_answers", partial(answered, None))
    assert infoprune.compress(taught, data, **LOOSE).certificate == certified.certificate
    batches_of_all = len(calls)
    each = batches_of_all // (1 + sum(step.measured is not None for step in certified.certificate.path))
    assert each > 2
    work = tmp_path / "small.work"
    for stop in (2, each + 2):  # among the dense model's answers, and among the first plan's
        calls.clear()
        monkeypatch.setattr(generation, "packed_answers", partial(answered, stop))
        with pytest.raises(KeyboardInterrupt):
            infoprune.compress(taught, data, work=work, **LOOSE)
    for wrong, key in (({"certify_metric": "lmms-eval"}, "certify_metric"), ({"certify_metric": "exact"}, "certify_metric")):
        with pytest.raises(CheckpointError, match=key):
            infoprune.compress(taught, data, work=work, **(LOOSE | wrong))
    with pytest.raises(CheckpointError, match="precision"):
        infoprune.compress(replace(taught, model=taught.copy().model.double()), data, work=work, **LOOSE)
    calls.clear()
    monkeypatch.setattr(generation, "packed_answers", partial(answered, None))
    result = infoprune.compress(taught, data, work=work, **(LOOSE | {"certify_metric": "official"}))  # what None meant
    assert result.certificate == certified.certificate
    assert len(calls) < batches_of_all - each  # neither the dense model's nor the first plan's first batches
    scores = json.loads((work / "dense.json").read_text())["scores"]
    assert set(scores) == {0.9, 1.0}
    calls.clear()
    assert infoprune.compress(taught, data, work=work, **LOOSE).certificate == certified.certificate
    assert not calls


# --- data --------------------------------------------------------------------------------------------------------------------------


def test_questions_that_do_not_count_are_not_drawn(taught, tmp_path):
    """The last images have none that counts."""
    pictures(tmp_path / "images", "{}.jpg", 20)
    asked = {
        f"{number}-{place}": {
            "imageId": str(number), "question": f"what shape ? {place}", "answer": "red", "isBalanced": place == 0 and number < 15
        }
        for number in range(20)
        for place in range(4)
    }  # fmt: skip
    (tmp_path / "val_all_questions.json").write_text(json.dumps(asked))
    source, notes = f"gqa:val_all@{tmp_path}", []
    progress = infoprune.progress.Progress()
    progress.note = notes.append
    split = split_data(taught, load_examples(source)[:4], options(certify=source, certify_per_image=3), progress)
    assert split.metric == "gqa/official"
    assert all(example.id.endswith("-0") for example in split.certification)
    assert len(split.sizes) == 14  # calibration sees one of those that count
    assert any("left out 65 questions to certify on that gqa/official does not count" in note for note in notes)
    for other in ("exact", "lmms-eval"):
        every = split_data(taught, load_examples(source)[:4], options(certify=source, certify_per_image=3, certify_metric=other))
        assert every.sizes.tolist() == [3] * 19


def test_the_metric_is_that_of_the_data_to_certify_on(taught, data, tmp_path):
    examples = load_examples(data)
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps({"image": str(e.image), "question": e.question, "answer": e.answer}) for e in examples))
    assert split_data(taught, str(own), options()).metric == split_data(taught, examples, options()).metric == "exact"
    assert split_data(taught, str(own), options(certify=data, examples=4)).metric == "vqav2/official"
    assert split_data(taught, data, options(certify=str(own), examples=4)).metric == "exact"
    assert split_data(taught, data, options(certify_metric="lmms-eval")).metric == "vqav2/lmms-eval"
    for source, name in ((str(own), "own"), (examples, "examples")):
        with pytest.raises(DataError, match=f"no metric 'official' for {name}"):
            split_data(taught, source, options(certify_metric="official"))


def test_data_that_the_metric_cannot_judge_are_refused_before_any_work(taught, tmp_path):
    source = vqav2(tmp_path, {"what shape ?": ["circle"]}, images=8)
    with pytest.raises(DataError, match="at least 2 people"):
        infoprune.compress(taught, source, **LOOSE)


def test_recipes_name_the_metric(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("certify_metric: lmms-eval\n")
    assert read_recipe(recipe) == {"certify_metric": "lmms-eval"}
    recipe.write_text("certify_metric: 3\n")
    with pytest.raises(infoprune.InfoPruneError, match="certify_metric=3, which is not a str"):
        read_recipe(recipe)


# --- what is told ------------------------------------------------------------------------------------------------------------------


def test_statement_and_card_say_how_answers_came_about(certified):
    certificate = certified.certificate
    for part in ("(vqav2/official)", "at most 16 tokens", "float32", r"{question}\nAnswer the question using a single word or phrase."):
        assert part in certificate.statement
    card = model_card(certified.vlm.plan, None, certificate)
    assert certificate.statement in card and "generated greedy answer, vqav2/official" in card
    hostile = certificate.model_copy(update={"prompt": "`<script>`\n# title"})
    assert hostile.statement.count("`") == 2 and "\n" not in hostile.statement


def test_certificates_of_the_first_version_are_read(certified, tmp_path):
    held = certified.certificate.model_dump(mode="json")
    assert held["version"] == 3
    images = held["data"].pop("images")

    def read(**changes):
        told = {key: value for key, value in ({"version": 2} | held | changes).items() if value is not None}
        (tmp_path / "certificate.json").write_text(json.dumps(told))
        return Certificate.read(tmp_path)

    new = dict.fromkeys(("metric", "prompt", "precision", "max_new_tokens"))
    held.pop("version")
    assert json.loads(read().to_json())["version"] == 2
    third = read(version=3, weights="0" * 32, data=held["data"] | {"images": images})
    assert third.weights == "0" * 32 and list(third.data.images) == images
    first = read(version=1, **new)
    assert first.metric == "exact" and "prompt" not in first.statement and "(exact)" in first.statement
    assert first.statement in model_card(certified.vlm.plan, None, first)
    assert json.loads(first.to_json())["version"] == 1
    for changes in (
        {"version": 4}, {"weights": "0" * 32}, {"data": held["data"] | {"images": images}},
        {"version": 1}, new, {"metric": "exact"}, {"metric": "vqa"}, {"precision": "<b>"}, {"max_new_tokens": None},
        {"version": 1} | new | {"metric": "vqav2/official"},
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="not a valid certificate"):
            read(**changes)


def test_scores_that_are_no_scores_are_refused(taught, data):
    split = split_data(taught, data, options())
    count = len(split.certification)
    scored = Scored(np.full(count, 1.5), 0.0, Flops(**dict.fromkeys(Flops.__dataclass_fields__, 1)), 1)
    with pytest.raises(DataError, match="between 0 and 1"):
        judge(np.zeros(count), scored, split, 25, 0.95)
