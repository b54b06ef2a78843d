"""Loaders of public benchmarks on small files in their official form."""

from __future__ import annotations

import importlib
import json
import os
import struct
import zlib
from dataclasses import replace

import pytest
from PIL import Image

from infoprune.data import Example, load_examples, parse_spec
from infoprune.data.sources import BENCHMARKS
from infoprune.errors import DataError, InfoPruneError


def picture(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 30)).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def question(id, image=1, text="What colour is it ? "):
    return {"question_id": id, "image_id": image, "question": text}


def annotation(id, image=1, answer="red", people=("red",) * 7 + ("Red.", "pink", "pink")):
    return {
        "question_id": id, "image_id": image, "question_type": "what color is the", "answer_type": "other",
        "multiple_choice_answer": answer,
        "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(people, start=1)],
    }  # fmt: skip


@pytest.fixture
def vqav2(tmp_path):
    """Call with questions and annotations: a folder as the authors ship it."""

    def make(questions, annotations, images=(1, 2), split="val2014", folder="val2014"):
        write(tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
        if annotations is not None:
            write(tmp_path / f"v2_mscoco_{split}_annotations.json", {"annotations": annotations})
        for image in images:
            picture(tmp_path / folder / f"COCO_{folder or split}_{image:012d}.jpg")
        return tmp_path

    return make


def test_vqav2_joins_questions_with_annotations(vqav2):
    folder = vqav2([question(10), question(21, 2)], [annotation(21, 2, "yes"), annotation(10)])
    first, second = load_examples(f"vqav2:val@{folder}")
    assert first == Example(
        folder / "val2014" / "COCO_val2014_000000000001.jpg", "What colour is it ?", "red", id="10",
        answers=("red",) * 7 + ("Red.", "pink", "pink"),
    )  # fmt: skip
    assert first.kinds == {"question_type": "what color is the", "answer_type": "other"}
    assert second.answer == "yes" and second.image.name.endswith("2.jpg") and second.load_image().size == (8, 6)


@pytest.mark.parametrize("place", ["", "images", "images/val2014", "Images/mscoco/val2014"])
def test_vqav2_images_and_files_lie_where_people_put_them(tmp_path, place):
    write(tmp_path / "Questions" / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [question(1)]})
    write(tmp_path / "Annotations" / "v2_mscoco_val2014_annotations.json", {"annotations": [annotation(1)]})
    picture(tmp_path / place / "COCO_val2014_000000000001.jpg")
    assert load_examples(f"vqav2@{tmp_path}", default_split="test")[0].image.is_file()


def test_splits_go_by_several_names_and_by_purpose(vqav2):
    folder = vqav2([question(1)], [annotation(1)], split="train2014", folder="train2014")
    vqav2([question(2)], [annotation(2)])
    vqav2([question(3)], None, split="test-dev2015", folder="test2015")
    ids = {
        spec: load_examples(f"vqav2{spec}@{folder}", default_split=purpose, unanswered=True)[0].id
        for spec, purpose in ((":train", "test"), ("", "train"), (":validation", "train"), (":val2014", "train"), (":testdev", "train"))
    }
    assert ids == {":train": "1", "": "1", ":validation": "2", ":val2014": "2", ":testdev": "3"}
    assert load_examples(f"vqav2@{folder}", default_split="test")[0].id == "2"  # a test split without public answers is never the default
    with pytest.raises(DataError, match=r"no split 'test2015'; it has test-dev2015, train2014, val2014"):
        load_examples(f"vqav2:test@{folder}")


def test_questions_without_answers_serve_for_result_files_only(vqav2):
    folder = vqav2([question(1), question(2)], None, split="test2015", folder="test2015")
    with pytest.raises(DataError, match="None of the 2 questions"):
        load_examples(f"vqav2:test@{folder}")
    found = load_examples(f"vqav2:test@{folder}", unanswered=True)
    assert [e.answered for e in found] == [False, False] and found[0].answer == "" and found[0].answers == ()


def test_bad_records_are_counted_and_can_be_skipped(vqav2):
    questions = [
        question(1), question(1), question(2, 99), question(3), question(4), question(5, text=" "), "nonsense", question(6), question(7, 2),
    ]  # fmt: skip
    annotations = [annotation(i) for i in (1, 4, 5, 8)] + [annotation(2, 99), annotation(3, 2), annotation(7, 2), annotation(7, 2), 5]
    annotations[1]["answers"][1]["answer_id"] = 1
    folder = vqav2(questions, annotations)
    with pytest.raises(DataError) as raised:
        load_examples(f"vqav2:val@{folder}")
    message = str(raised.value)
    for part in (
        "2 questions are good. 10 bad records:", "1 x id that occurs twice: 1", "1 x image missing in ", "COCO_val2014_000000000099.jpg",
        "1 x question and annotation of different images: question 3", "answer_id of its own", "question 5: question: String should have",
        "3 x malformed row", "it is not an object", "1 x question without an annotation: question 6", "1 x malformed annotation",
        "1 x annotation of a question that had one: question 7", "1 x annotation without a question: question 8", "--skip-bad",
    ):  # fmt: skip
        assert part in message, (part, message)
    notes = []
    assert [e.id for e in load_examples(f"vqav2:val@{folder}", skip_bad=True, notify=notes.append)] == ["1", "7"]
    assert len(notes) == 1 and "going on with 2 questions. Skipped: 10 bad records" in notes[0]


def test_only_the_first_cases_are_shown(vqav2):
    folder = vqav2([question(i, 100 + i) for i in range(40)], [annotation(i, 100 + i) for i in range(40)], images=())
    with pytest.raises(DataError, match=r"no usable question. 40 bad records:\n  40 x image missing.*0100.jpg; .*0102.jpg; \.\.\.$"):
        load_examples(f"vqav2:val@{folder}", skip_bad=True)


def png_header(width, height):
    """A file of some fifty bytes that claims a size."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    packed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("side", [9_500, 20_000])  # Pillow only warns of the first, and opens it
def test_decompression_bombs_and_broken_images_are_refused(vqav2, side):
    folder = vqav2([question(1), question(2, 2), question(3, 3)], [annotation(1), annotation(2, 2), annotation(3, 3)], images=(1,))
    (folder / "val2014" / "COCO_val2014_000000000002.jpg").write_bytes(png_header(side, side))
    (folder / "val2014" / "COCO_val2014_000000000003.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(DataError, match=r"2 x image that can't be read: .*2\.jpg: .*pixels.*; .*3\.jpg: cannot identify"):
        load_examples(f"vqav2:val@{folder}")
    assert len(load_examples(f"vqav2:val@{folder}", skip_bad=True)) == 1
    example = Example(folder / "val2014" / "COCO_val2014_000000000002.jpg", "what ?", "")
    with pytest.raises(DataError, match="pixels"):
        example.load_image()


def test_a_link_out_of_the_folder_is_refused(vqav2, tmp_path_factory):
    folder = vqav2([question(1), question(2, 2)], [annotation(1), annotation(2, 2)], images=(1,))
    picture(tmp_path_factory.mktemp("elsewhere") / "secret.jpg")
    os.symlink(next(tmp_path_factory.getbasetemp().glob("elsewhere*/secret.jpg")), folder / "val2014" / "COCO_val2014_000000000002.jpg")
    with pytest.raises(DataError, match=r"1 x image outside the folder: question 2: .*2\.jpg' is a link to"):
        load_examples(f"vqav2:val@{folder}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v2_OpenEnded_mscoco_val2014_questions.json", "{", "is not valid JSON"),
        ("v2_OpenEnded_mscoco_val2014_questions.json", "[1]", "no list 'questions'"),
        ("v2_mscoco_val2014_annotations.json", '{"annotations": {}}', "no list 'annotations'"),
        ("v2_mscoco_val2014_annotations.json", "\udcff", "Cannot read"),
    ],
)
def test_a_file_of_another_form_is_refused(vqav2, name, content, message):
    folder = vqav2([question(1)], [annotation(1)])
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message):
        load_examples(f"vqav2:val@{folder}", skip_bad=True)


def test_folders_that_hold_nothing_or_two_of_a_kind(tmp_path):
    with pytest.raises(DataError, match=r"has no v2_OpenEnded_mscoco_val2014_questions.json, nor any other split"):
        load_examples(f"vqav2:val@{tmp_path}")
    for part in ("a", "b"):
        write(tmp_path / part / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": []})
    with pytest.raises(DataError, match="several v2_OpenEnded"):
        load_examples(f"vqav2:val@{tmp_path}")
    (tmp_path / "b" / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    with pytest.raises(DataError, match="has no records"):
        load_examples(f"vqav2:val@{tmp_path}")
    for spec in ("vqav2@/no/such/folder", "gqa@~no-such-user/data/x", "gqa@" + "x/" * 3000, "textvqa@\0"):
        with pytest.raises(DataError, match="No folder at"):
            load_examples(spec)
    for spec in ("~no-such-user/x.jsonl", "x" * 5000, "\0"):
        with pytest.raises(DataError, match="No data at"):
            load_examples(spec)


@pytest.fixture
def textvqa(tmp_path):
    rows = [
        {"question_id": 5, "image_id": "ab12", "question": "what does the Sign say?", "answers": ["go", "stop", "stop ", "go"] + ["x"] * 2,
         "image_classes": ["Sign"]},
        {"question_id": 6, "image_id": "../../etc/x", "question": "brand?", "answers": ["a"] * 10},
        {"question_id": 7, "image_id": "x" * 5000, "question": "brand?", "answers": ["a"] * 10},
        {"question_id": 8, "image_id": "a\0b", "question": "brand?", "answers": ["a"] * 10},
    ]  # fmt: skip
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
    write(tmp_path / "TextVQA_0.5.1_test.json", {"data": [{k: v for k, v in rows[0].items() if k != "answers"}]})
    ocr = [{"image_id": "ab12", "ocr_tokens": ["STOP", "4"], "ocr_info": []}, {"image_id": 3}]
    write(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": ocr})
    picture(tmp_path / "train_images" / "ab12.jpg")
    picture(tmp_path / "test_images" / "ab12.jpg", (4, 4))
    return tmp_path


def test_textvqa(textvqa):
    with pytest.raises(DataError) as raised:
        load_examples(f"textvqa@{textvqa}", default_split="test")
    assert "1 x image outside the folder: question 6: '../../etc/x.jpg' leaves" in str(raised.value)
    assert "1 x malformed row in TextVQA_Rosetta_OCR_v0.2_val.json: image 3" in str(raised.value)
    assert "2 x image missing in" in str(raised.value)
    (example,) = load_examples(f"textvqa:validation@{textvqa}", skip_bad=True)
    assert example.answer == "go"  # the first of two that as many people gave
    assert example.answers[2] == "stop " and example.image.parent.name == "train_images"
    prompt = BENCHMARKS["textvqa"].prompt
    assert load_examples(f"textvqa:validation@{textvqa}", skip_bad=True, ocr=True)[0].prompt == replace(prompt, ocr=True).text(example)
    assert example.prompt == prompt.text(example) == "What does the sign say?\nAnswer the question using a single word or phrase."
    assert replace(prompt, ocr=True).text(example).split("\n")[1] == "Reference OCR token: STOP, 4"
    empty = replace(example, extras={"ocr_tokens": ()})  # a reader that found nothing: lmms-eval tells so
    assert replace(prompt, ocr=True).text(empty).split("\n")[1] == "Reference OCR token: "
    (secret,) = load_examples(f"textvqa:test@{textvqa}", unanswered=True)
    assert secret.image.parent.name == "test_images" and not secret.answered
    assert replace(prompt, ocr=True).text(secret) == prompt.text(secret)


def gqa_question(answer="red", **other):
    return {
        "imageId": "n1", "question": "What color is the apple?", "answer": answer, "fullAnswer": "It is red.", "isBalanced": True,
        "types": {"structural": "query", "semantic": "attr", "detailed": "categoryAttr"}, "entailed": ["1", "2"], "equivalent": ["1"],
        "groups": {"global": "color", "local": "13-apple_color"},
        "semantic": [{"operation": "select", "argument": "apple (1)", "dependencies": []},
                     {"operation": "query", "argument": "color", "dependencies": [0]}, {"operation": "exist", "argument": "?"}],
    } | other  # fmt: skip


def test_gqa(tmp_path):
    write(tmp_path / "val_balanced_questions.json", {"1": gqa_question()})
    for number, questions in enumerate(({"1": gqa_question()}, {"2": gqa_question(isBalanced=False, groups={"global": None})}) * 6):
        renumbered = {f"{id}-{number}": item for id, item in questions.items()}
        write(tmp_path / "questions" / "val_all_questions" / f"val_all_questions_{number}.json", renumbered)
    write(tmp_path / "val_choices.json", {"1": {"valid": ["red", "green"], "plausible": ["red"]}})
    write(tmp_path / "test_balanced_questions.json", {"9": {"imageId": "n1", "question": "Is it?", "isBalanced": True}})
    picture(tmp_path / "images" / "n1.jpg")
    (example,) = load_examples(f"gqa:val@{tmp_path}")
    assert (example.id, example.answer) == ("1", "red")
    assert example.kinds == {"structural": "query", "semantic": "attr", "detailed": "categoryAttr", "words": "5", "steps": "2"}
    assert example.extras == {"entailed": ("1", "2"), "group": ("color",), "valid": ("red", "green"), "plausible": ("red",)}
    everything = load_examples(f"gqa:val_all@{tmp_path}")
    assert [e.id for e in everything] == [f"{1 + n % 2}-{n}" for n in range(12)]  # parts in the order of their numbers
    assert everything[1].kinds["balanced"] == "no" and "group" not in everything[1].extras
    assert not load_examples(f"gqa:test@{tmp_path}", unanswered=True)[0].answered
    with pytest.raises(DataError, match=r"it has test_balanced, val_all, val_balanced"):
        load_examples(f"gqa@{tmp_path}", default_split="test")
    write(tmp_path / "val_balanced_questions.json", [1])
    with pytest.raises(DataError, match="questions by their ids"):
        load_examples(f"gqa:val@{tmp_path}")
    write(tmp_path / "val_balanced_questions.json", {"1": gqa_question(), "2": 3, "3": gqa_question(types={"semantic": 4})})
    with pytest.raises(DataError, match=r"2 x malformed row: question 2 is not an object; question 3: types.semantic"):
        load_examples(f"gqa:val@{tmp_path}")


def test_own_data(tmp_path, tmp_path_factory):
    picture(tmp_path / "in" / "a.png")
    absolute = tmp_path_factory.mktemp("other") / "b.png"
    picture(absolute)
    rows = [
        {"image": "in/a.png", "question": "q", "answers": ["no", "yes", "yes"], "id": 7, "kinds": {"source": "scan"}},
        {"image": str(absolute), "question": "q", "answer": " x "},
        {"image": "in/../in/a.png", "question": "q", "answer": "y"},
    ]
    path = tmp_path / "own.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode())
    first, second, third = load_examples(str(path))
    assert (first.id, first.answer, first.answers, first.kinds) == ("7", "yes", ("no", "yes", "yes"), {"source": "scan"})
    assert (second.image, second.answer) == (absolute, "x") and third.answers == ()
    bad = [
        *rows, {"image": f"../{absolute.parent.name}/b.png", "question": "q", "answer": "y"},
        {"image": "in/c.png", "question": "q", "answer": "y"}, rows[0], {"image": "in/a.png", "question": "no answer?"},
        {"image": "in/a.png", "question": "q", "answer": "y", "kinds": {"a": 1}},
    ]  # fmt: skip
    path.write_text("\n".join([*map(json.dumps, bad), "{oops"]))
    with pytest.raises(DataError) as raised:
        load_examples(str(path))
    for part in (
        "3 questions are good. 6 bad records", "1 x image outside the folder: line 4: '../", "1 x image missing in", "line 5: in/c.png",
        "1 x id that occurs twice: 7", "1 x question without a reference answer: no answer?",
        "2 x malformed row: line 8: kinds.a: Input should",
        "line 9 is not valid JSON",
    ):  # fmt: skip
        assert part in str(raised.value), part
    assert len(load_examples(str(path), skip_bad=True)) == 3
    assert len(load_examples(str(path), skip_bad=True, unanswered=True)) == 4


def test_specifications():
    assert parse_spec("vqav2:val@lmms-lab/VQAv2") == parse_spec(" vqav2:val@lmms-lab/VQAv2")
    for spec, parts in {
        "easy-vqa": ("easy-vqa", None, None), "gqa:val_all": ("gqa", "val_all", None), "textvqa@a@b:c": ("textvqa", None, "a@b:c"),
        "vqav2:@": ("vqav2", None, None), "vqav2.jsonl": ("own", None, "vqav2.jsonl"), "C:\\q.jsonl": ("own", None, "C:\\q.jsonl"),
    }.items():  # fmt: skip
        found = parse_spec(spec)
        assert (found.name, found.split, found.source) == parts
    assert parse_spec("gqa").benchmark is BENCHMARKS["gqa"] and parse_spec("x.json").benchmark is None
    with pytest.raises(DataError, match="own wheel"):
        parse_spec("easy-vqa:test@folder")
    with pytest.raises(DataError, match=r"No data at 'vqav3:val'. Give 'easy-vqa.*vqav2, textvqa, gqa as NAME"):
        load_examples("vqav3:val")


def test_without_datasets_the_hub_route_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("INFOPRUNE_CACHE", str(tmp_path))
    real = importlib.import_module

    def missing(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DataError, match="pip install datasets"):
        load_examples("vqav2:val")


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Call with a folder's name, rows and split: parquet files as the hub has them, with images embedded."""
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    importlib.import_module("pyarrow.parquet")
    monkeypatch.setenv("INFOPRUNE_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()

    def make(name, rows, split):
        features = datasets.Features.from_arrow_schema(pyarrow.Table.from_pylist(rows).schema)
        if "image" in features:
            features["image"] = datasets.Image()
        path = tmp_path / name / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=features.arrow_schema), path)
        return tmp_path / name

    return make


def encoded(tmp_path, name, kind="JPEG"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 6)).save(path, kind)
    return {"bytes": path.read_bytes(), "path": "/etc/passwd"}


def test_the_hub_route_reads_rows_with_images(parquet, tmp_path, monkeypatch):
    image = encoded(tmp_path, "x.png", "PNG")
    rows = [
        annotation(1) | {"question": "what?", "image": image}, annotation(2) | {"question": "why?", "image": image},
        annotation(3, 5) | {"question": "how?", "image": {"bytes": b"no image", "path": None}},
        annotation(3, 6) | {"question": "how?", "image": {"bytes": None, "path": "/etc/passwd"}},
    ]  # fmt: skip
    folder = parquet("VQAv2", rows, "validation")
    with pytest.raises(DataError) as raised:
        load_examples(f"vqav2:val@{folder}")
    assert "1 x unreadable image: COCO_val2014_000000000005 is not an image" in str(raised.value)
    assert "1 x image missing: COCO_val2014_000000000006" in str(raised.value)
    notes = []
    first, second = load_examples(f"vqav2:val@{folder}", skip_bad=True, notify=notes.append)
    assert first.image == second.image and first.image.read_bytes() == image["bytes"] and first.image.suffix == ".png"
    assert (first.id, first.answer, len(first.answers)) == ("1", "red", 10) and "reading vqav2 (val2014)" in notes[0]
    with pytest.raises(DataError, match="no split 'train'; it has validation"):
        load_examples(f"vqav2:train@{folder}")
    textvqa = {"question_id": 1, "image_id": "../up", "question": "q", "answers": ["a"] * 10, "ocr_tokens": ["b"], "image": image}
    folder = parquet("textvqa", [textvqa, textvqa | {"question_id": 2, "image_id": "ok"}], "validation")
    (found,) = load_examples(f"textvqa:val@{folder}", skip_bad=True)
    assert found.id == "2" and found.extras["ocr_tokens"] == ("b",)
    assert not list(tmp_path.rglob("up.*"))
    monkeypatch.setenv("INFOPRUNE_CACHE", str(folder / "validation-00000-of-00001.parquet"))  # a file, where a folder is needed
    with pytest.raises(InfoPruneError, match="Cannot keep images in"):
        load_examples(f"textvqa:val@{folder}", skip_bad=True)


def test_the_hub_route_joins_gqa_with_its_images(parquet, tmp_path):
    rows = [{"id": "1", **gqa_question(entailed="['2']")}, {"id": "2", **gqa_question(imageId="n2")}]
    rows[1]["entailed"] = "[]"
    folder = parquet("GQA/testdev_balanced_instructions", rows, "testdev").parent
    parquet("GQA/testdev_balanced_images", [{"id": i, "image": encoded(tmp_path, "y.jpg")} for i in ("n0", "n1")], "testdev")
    with pytest.raises(DataError, match="1 x image missing: n2"):
        load_examples(f"gqa:testdev@{folder}")
    (example,) = load_examples(f"gqa@{folder}", default_split="test", skip_bad=True)
    assert example.extras["entailed"] == ("2",) and example.image.name == "n1.jpg"
    assert not (example.image.parent / "n0.jpg").exists()  # only what is asked about
