"""Data that look whole and are not: images cut short, keys that occur twice, parts that lie elsewhere."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from infoprune.data import load_counted, load_examples, sources
from infoprune.errors import DataError
from test_benchmark_data import gqa_question, picture, write


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_that_is_cut_short_is_found_before_the_run(tmp_path, kind):
    write(tmp_path / "val_balanced_questions.json", {"1": gqa_question(), "2": gqa_question(imageId="n2")})
    picture(tmp_path / "images" / "n1.jpg")
    cut = tmp_path / "images" / "n2.jpg"
    Image.effect_noise((64, 48), 90).save(cut, kind)
    assert load_counted(f"gqa:val@{tmp_path}").skipped == 0
    cut.write_bytes(cut.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"1 x image that can't be read: n2\.jpg: .*truncated"):
        load_examples(f"gqa:val@{tmp_path}")
    loaded = load_counted(f"gqa:val@{tmp_path}", skip_bad=True)
    assert [example.id for example in loaded.examples] == ["1"] and loaded.skipped == 1


def test_gqa_parts_have_each_key_once_and_stay_in_the_folder(tmp_path, tmp_path_factory):
    parts = tmp_path / "val_all_questions"
    write(parts / "val_all_questions_0.json", {"1": gqa_question()})
    (parts / "val_all_questions_1.json").write_text(f'{{"2": {json.dumps(gqa_question())}, "2": {json.dumps(gqa_question("blue"))}}}')
    write(tmp_path / "val_choices" / "val_choices_0.json", {"1": {"valid": ["red"], "plausible": ["red"]}})
    write(tmp_path / "val_choices" / "val_choices_1.json", {"1": {"valid": ["blue"], "plausible": ["blue"]}})
    picture(tmp_path / "images" / "n1.jpg")
    with pytest.raises(DataError) as raised:
        load_examples(f"gqa:val_all@{tmp_path}")
    message = str(raised.value)
    assert "2 questions are good. 2 bad records" in message and "1 x choices of a question that had some: question 1" in message
    assert "1 x key that occurs twice in one object: val_all_questions_1.json: 2" in message
    first, second = load_examples(f"gqa:val_all@{tmp_path}", skip_bad=True)
    assert first.extras["valid"] == ("red",) and second.answer == "red"  # what comes first stays
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.json"
    write(elsewhere, {"3": gqa_question()})
    os.symlink(elsewhere, parts / "val_all_questions_2.json")
    with pytest.raises(DataError, match=r"'val_all_questions_2.json' is a link to .*secret.json, outside"):
        load_examples(f"gqa:val_all@{tmp_path}", skip_bad=True)


def test_words_of_an_image_are_told_once(tmp_path):
    row = {"question_id": 5, "image_id": "ab12", "question": "what does it say?", "answers": ["go"] * 10}
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": [row]})
    ocr = [{"image_id": "ab12", "ocr_tokens": [word]} for word in ("STOP", "GO")]
    write(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": ocr})
    picture(tmp_path / "train_images" / "ab12.jpg")
    with pytest.raises(DataError, match=r"1 x image that occurs twice in TextVQA_Rosetta_OCR_v0.2_val.json: ab12"):
        load_examples(f"textvqa:val@{tmp_path}")
    assert load_examples(f"textvqa:val@{tmp_path}", skip_bad=True)[0].extras["ocr_tokens"] == ("STOP",)


@pytest.mark.parametrize("name", ["own.json", "own.jsonl"])
def test_keys_of_own_data_occur_once(tmp_path, name):
    picture(tmp_path / "a.png")
    record = '{"image": "a.png", "question": "q", "answer": "red", "answer": "blue"}'
    (tmp_path / name).write_text(record if name.endswith("l") else f"[{record}]")
    with pytest.raises(DataError, match=r"1 x key that occurs twice in one object: (own.json|line 1): answer"):
        load_examples(str(tmp_path / name))


def test_what_is_skipped_is_counted_in_questions(tmp_path):
    for name in ("good.png", "bad.png"):
        picture(tmp_path / name)
    (tmp_path / "bad.png").write_bytes((tmp_path / "bad.png").read_bytes()[:50])
    records = [{"image": image, "question": f"q{n}", "answer": "a"} for image in ("good.png", "bad.png") for n in range(3)]
    twice = '{"image": "good.png", "question": "q", "answer": "red", "answer": "blue"}'
    (tmp_path / "own.jsonl").write_text("\n".join([*map(json.dumps, records), twice]))
    loaded = load_counted(str(tmp_path / "own.jsonl"), skip_bad=True)
    assert [e.question for e in loaded.examples] == ["q0", "q1", "q2"] and loaded.skipped == 4


def test_reading_many_images_is_told(tmp_path, monkeypatch):
    write(tmp_path / "val_balanced_questions.json", {"1": gqa_question(), "2": gqa_question(imageId="n2")})
    for name in ("n1", "n2"):
        picture(tmp_path / "images" / f"{name}.jpg")
    told = []
    load_examples(f"gqa:val@{tmp_path}", notify=told.append)
    assert not told
    monkeypatch.setattr(sources, "MANY_IMAGES", 2)
    load_examples(f"gqa:val@{tmp_path}", notify=told.append)
    assert len(told) == 1 and "reading 2 images" in told[0]
