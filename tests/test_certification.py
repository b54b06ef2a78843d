from __future__ import annotations

import json
import re
from dataclasses import replace
from html import escape

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import infoprune
from infoprune import CompressionOptions, Example
from infoprune.certification import path as certification_path
from infoprune.certification import run as certification_run
from infoprune.certification.certificate import Certificate, certificate_of, plan_digest, stored_digest
from infoprune.certification.data import check_enough, most_per_image, split_data
from infoprune.data.seen import image_digest
from infoprune.errors import BudgetError, CertificateError, CheckpointError
from infoprune.evaluation import quality
from infoprune.evaluation.differences import changed_questions, differences
from infoprune.evaluation.quality import Quality, score
from infoprune.evaluation.runner import evaluate
from infoprune.progress import Clock
from infoprune.report.model_card import base_licence, model_card
from infoprune.report.page import check_page, page, thumbnail, write_page
from tiny_models import TINY, build, examples, teach_

LOOSE = {"max_drop": 25.0, "rank_multiple": 2, "shares": (0.9, 0.8, 0.7), "examples": 12}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sixty images with three questions each."""
    return examples(tmp_path_factory.mktemp("images"), images=60)


@pytest.fixture(scope="module")
def taught(many):
    """A tiny model that answers these questions, so that there is something to lose."""
    vlm = build(TINY[1])
    teach_(vlm, many[:36])
    assert score([vlm], many)[0].accuracy > 90
    return vlm


@pytest.fixture(scope="module")
def certified(taught, many):
    return infoprune.compress(taught, many, **LOOSE)


def options(**fields) -> CompressionOptions:
    return CompressionOptions(**(LOOSE | fields))


def test_a_drop_that_a_model_without_answers_would_keep_to_is_not_certified(many, tmp_path):
    with pytest.raises(CertificateError, match=r"scores 0\.0% on the certification data by the metric 'exact'"):
        infoprune.compress(build(TINY[1]), many, **LOOSE, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()  # other settings, which mend it, would be refused beside it


# --- data --------------------------------------------------------------------------------------------------------------------------


def test_split_is_by_image_disjoint_and_reproducible(taught, many):
    split = split_data(taught, many, options())
    calibration, certification = ({e.image for e in part} for part in (split.calibration, split.certification))
    assert not calibration & certification
    assert len(calibration) == 4  # 12 questions at three an image
    assert split.sizes.tolist() == [3] * len(certification)
    assert split == split_data(taught, many, options())
    assert split != split_data(taught, many, options(seed=1))
    assert len(split_data(taught, many, options(certify_images=20)).sizes) == 20
    assert split_data(taught, many, options(certify_images=20, certify_per_image=2)).sizes.tolist() == [2] * 20
    assert len(split_data(taught, many, options(examples=999)).calibration) == 45  # never more than a quarter of the images


def test_images_with_many_questions_are_thinned(taught, many):
    assert most_per_image(np.array([4, 4, 4])) == 4
    assert most_per_image(np.array([3] * 50 + [60])) == 3
    assert most_per_image(np.array([10] * 9 + [100])) == 11  # sizes in between count: (9 x 10 + 11) / 11 is 9.2 of 10 images
    assert most_per_image(np.arange(1, 100)) < 30
    last = many[-1].image
    crowded = [*many, *(Example(last, f"what shape ? {i}", "circle") for i in range(40))]
    assert split_data(taught, many[:9], options(certify=crowded)).sizes.max() == 3


def test_an_image_under_another_name_is_still_the_same_image(taught, many, tmp_path):
    notes = []
    copies = []
    for number, example in enumerate(many[:30]):
        twin = tmp_path / f"copy-{number}.png"
        twin.write_bytes(example.image.read_bytes())
        copies.append(Example(twin, example.question, example.answer))
    progress = infoprune.progress.Progress()
    progress.note = notes.append
    split = split_data(taught, many[:30], options(examples=30, certify=[*copies, *many[30:]]), progress)
    assert not {e.image.read_bytes() for e in split.calibration} & {e.image.read_bytes() for e in split.certification}
    assert "left out 10 images" in notes[0]
    twin = tmp_path / "twin.png"
    twin.write_bytes(many[30].image.read_bytes())
    doubled = split_data(taught, many[:30], options(certify=[*many[30:], Example(twin, "what shape ?", "circle")]))
    assert sorted(doubled.sizes) == [3] * 50  # drawn from four on the doubled one
    with pytest.raises(CertificateError, match="no image to certify on"):
        split_data(taught, many[:30], options(examples=30, certify=copies))


def test_too_little_data_is_refused_with_the_number_needed():
    with pytest.raises(CertificateError, match=r"450 questions about 150 images cannot certify a drop of at most 0\.5 points") as caught:
        check_enough(np.full(150, 3.0), options(max_drop=0.5))
    assert "at least 602 images" in str(caught.value)
    assert "--max-drop 1.99 or more" in str(caught.value)
    check_enough(np.full(150, 3.0), options(max_drop=2.0))
    uneven = np.array([*[3.0] * 700, 300.0])
    with pytest.raises(CertificateError, match="--certify-per-image 3"):
        check_enough(uneven, options(max_drop=0.5))
    check_enough(np.minimum(uneven, 3), options(max_drop=0.5))


def test_what_is_needed_is_told_first():
    notes = []
    progress = infoprune.progress.Progress()
    progress.note = notes.append
    check_enough(np.full(1000, 3.0), options(max_drop=0.5), progress)
    assert re.search(r"3,000 questions about 1,000 images: at least 602 images .* four times in five on [\d,]+ images", notes[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"flops": 0.5}, {"max_drop": 0}, {"max_drop": 100}, {"confidence": 1.0}, {"confidence": 0.3}, {"shares": ()},
        {"shares": (0.5, 0.6)}, {"shares": (1.2, 0.6)}, {"certify_images": 0}, {"certify_per_image": 0}, {"heads": "trained"},
        {"max_drop": None, "flops": 0.5, "certify": "easy-vqa"}, {"max_drop": None, "flops": 0.5, "certify_metric": "exact"},
        {"certify_metric": "vqa"},
    ],
)  # fmt: skip
def test_bad_options_are_refused(fields):
    with pytest.raises(BudgetError):
        options(**fields)


# --- flow --------------------------------------------------------------------------------------------------------------------------


def test_certified_compression_end_to_end(taught, many, tmp_path):
    """The returned model is the last that passed, its certificate repeats what its answers show, and all of it is in the folder."""
    before = {name: p.clone() for name, p in taught.model.state_dict().items()}
    result = infoprune.compress(taught, many, **LOOSE)
    assert all(torch.equal(p, before[name]) for name, p in taught.model.state_dict().items())
    certificate = result.certificate
    assert certificate is not None
    tried = [step.measured for step in certificate.path if step.measured is not None]
    assert [m.certified for m in tried[:-1]] == [True] * (len(tried) - 1)
    assert certificate.step.share == result.vlm.plan.budget["flops"]
    assert result.flops_ratio == pytest.approx(certificate.step.flops_ratio)
    assert result.flops_ratio <= certificate.step.share
    split = split_data(taught, many, options())
    dense, small = score([taught, result.vlm], split.certification)
    measured = certificate.step.measured
    assert measured is not None
    assert measured.accuracy == pytest.approx(small.accuracy)
    assert certificate.dense_accuracy == pytest.approx(dense.accuracy)
    assert measured.kl_nats == pytest.approx(small.kl_nats, rel=1e-4)
    assert measured.drop_points <= measured.drop_bounds["betting"] <= 25
    assert certificate.data.num_questions == len(split.certification)
    assert len(tried) < 3 or certificate.rank_correlation is not None

    folder = infoprune.save(result.vlm, tmp_path / "small", probe=result.probe, extra=result.as_dict(), certificate=certificate)
    assert Certificate.read(folder) == certificate.model_copy(update={"weights": stored_digest(folder)})
    assert json.loads((folder / "report.json").read_text())["certificate"]["plan"] == plan_digest(result.vlm.plan)
    card = (folder / "README.md").read_text()
    assert certificate.statement in card
    assert str(tmp_path) not in card
    other = infoprune.compress(taught, many, flops=0.8, rank_multiple=2, examples=12)
    with pytest.raises(CheckpointError, match="another plan"):
        infoprune.save(other.vlm, tmp_path / "other", certificate=certificate)


def test_the_path_stops_at_the_first_failure(taught, many, monkeypatch, tmp_path):
    """With scores of our own: two plans pass, the third fails, the fourth is never cut."""
    lost = iter([0, 0, 40, 0])

    def scored(path, cut, index, split, progress, folder):
        correct = np.ones(len(split.certification), dtype=bool)
        correct[: next(lost)] = False
        return certification_path.Scored(correct, 0.1 * index, path.dense_flops, 1)

    monkeypatch.setattr(certification_run, "score_plan", scored)
    right = np.ones(len(split_data(taught, many, options()).certification))
    monkeypatch.setattr(certification_run, "score_dense", lambda *args, **kwargs: right)
    shares = (0.9, 0.85, 0.8, 0.7)
    result = infoprune.compress(taught, many, **(LOOSE | {"shares": shares}))
    steps = result.certificate.path
    assert [None if s.measured is None else s.measured.certified for s in steps] == [True, True, False, None]
    assert result.vlm.plan.budget == {"flops": 0.85}
    expected = infoprune.compress(taught, split_data(taught, many, options()).calibration, flops=0.85, rank_multiple=2, examples=12)
    torch.testing.assert_close(result.vlm.model(**result.probe).logits, expected.vlm.model(**result.probe).logits)


def test_nothing_passes(taught, many, monkeypatch):
    def scored(path, cut, index, split, progress, folder):
        return certification_path.Scored(np.zeros(len(split.certification), dtype=bool), 1.0, path.dense_flops, 1)

    monkeypatch.setattr(certification_run, "score_plan", scored)
    right = np.ones(len(split_data(taught, many, options()).certification))
    monkeypatch.setattr(certification_run, "score_dense", lambda *args, **kwargs: right)
    with pytest.raises(CertificateError, match=r"Even the mildest plan, 0\.9 of the FLOPs"):
        infoprune.compress(taught, many, **LOOSE)


def test_an_interrupted_run_goes_on_where_it_was(taught, many, certified, monkeypatch, tmp_path):
    whole = certified
    real, calls = certification_run.score_plan, []

    def interrupted(path, cut, index, split, progress, folder):
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(path, cut, index, split, progress, folder=folder)

    monkeypatch.setattr(certification_run, "score_plan", interrupted)
    work = tmp_path / "small.work"
    with pytest.raises(KeyboardInterrupt):
        infoprune.compress(taught, many, work=work, **LOOSE)
    assert json.loads((work / "plan-00.json").read_text())["plan"]
    result = infoprune.compress(taught, many, work=work, **LOOSE)
    assert calls == [0, 1, 1, 2][: len(calls)]
    assert result.certificate == whole.certificate
    assert torch.equal(result.vlm.model(**result.probe).logits, whole.vlm.model(**whole.probe).logits)
    again = infoprune.compress(taught, many, work=work, **LOOSE)  # all is there: nothing is scored
    assert len(calls) <= 4
    assert again.certificate == whole.certificate
    with pytest.raises(CheckpointError, match="max_drop"):
        infoprune.compress(taught, many, work=work, **(LOOSE | {"max_drop": 26.0}))


def test_a_certified_path_goes_on_within_a_plan(taught, many, monkeypatch, tmp_path):
    monkeypatch.setattr(quality, "IMAGES_PER_BATCH", 5)
    real, scored = quality._score_batch, []

    def stopping(stop, models, batch):
        scored.append(len(models))
        if len(scored) == stop:
            raise KeyboardInterrupt
        return real(models, batch)

    monkeypatch.setattr(quality, "_score_batch", lambda *arguments: stopping(None, *arguments))
    whole = infoprune.compress(taught, many, **LOOSE)
    of_all = len(scored)
    each = scored.index(2)  # those of the dense model come first
    assert each > 3
    work = tmp_path / "small.work"
    for stop in (3, each + 2):  # among the dense model's scores, and among the first plan's
        scored.clear()
        monkeypatch.setattr(quality, "_score_batch", lambda *arguments, stop=stop: stopping(stop, *arguments))
        with pytest.raises(KeyboardInterrupt):
            infoprune.compress(taught, many, work=work, **LOOSE)
    scored.clear()
    monkeypatch.setattr(quality, "_score_batch", lambda *arguments: stopping(None, *arguments))
    result = infoprune.compress(taught, many, work=work, **LOOSE)
    assert result.certificate == whole.certificate
    assert 1 not in scored and len(scored) < of_all - each


def test_trained_models_are_refused(taught, many):
    with pytest.raises(BudgetError, match="training-free"):
        infoprune.compress(taught, many, recovery="full", **LOOSE)


def test_an_unreachable_share_ends_the_path(taught, many):
    result = infoprune.compress(taught, many, **(LOOSE | {"shares": (0.9, 0.001), "max_drop": 90.0}))
    assert [step.share for step in result.certificate.path] == [0.9]


@pytest.mark.parametrize("structure", ["width", "low-rank"])
def test_each_plan_of_a_path_is_what_its_share_alone_gives(taught, many, structure):
    asked = options(shares=(0.8, 0.38), ffn=structure)
    calibration = split_data(taught, many, asked).calibration
    path = certification_path.plan_path(taught, calibration, "examples", asked, Clock())
    for index, share in enumerate(asked.shares):
        alone = infoprune.compress(taught, calibration, flops=share, ffn=structure, rank_multiple=2, examples=12)
        assert path.plans[index] == alone.vlm.plan
        assert path.plans[index].method["ffn"] == structure
        assert path.decisions[index].predicted_loss == pytest.approx(alone.predicted_loss)
        torch.testing.assert_close(path.cut(index).model(**path.probe).logits, alone.vlm.model(**path.probe).logits)


# --- differences -------------------------------------------------------------------------------------------------------------------


def test_answers_end_where_they_depart_from_the_reference(taught, many):
    tokenizer = taught.processor.tokenizer
    for example, answer, right in zip(many, (q := score([taught], many)[0]).answers, q.correct, strict=True):
        reference = [*tokenizer(example.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert (list(answer) == reference) == right
        assert list(answer[:-1]) == reference[: len(answer) - 1]


def test_differences_of_two_models(taught, many):
    small = infoprune.compress(taught, many, flops=0.6, rank_multiple=2, examples=12).vlm
    dense, compressed = score([taught, small], many)
    found = differences(dense, compressed, many, taught.encoder)
    assert found["mcnemar"]["dense_only"] == (dense.correct & ~compressed.correct).sum()
    assert len(found["changed"]) == round((1 - found["agreement"] / 100) * len(many))
    assert found["agreement_ci95"][0] <= found["agreement"] <= found["agreement_ci95"][1]
    by_question = compressed.kl_by_question
    assert by_question is not None
    assert by_question.mean() == pytest.approx(compressed.kl_nats, rel=0.5)
    for item in found["changed"]:
        assert item["dense_answer"] != item["compressed_answer"] or item["dense_answer"].endswith("…")
        assert item["kl_nats"] == pytest.approx(by_question[item["index"]])
    same = differences(dense, dense, many, taught.encoder)
    assert same["agreement"] == 100
    assert same["changed"] == []


def test_worst_changes_come_first(taught, many):
    tokenizer = taught.processor.tokenizer
    three = many[:3]
    dense = Quality(np.array([False, True, True]), answers=((9,), (8, 1), (7, 1)))
    small = Quality(
        np.array([False, False, False]), np.array([9.0, 9.0, 0.5, 0.5, 2.0, 2.0]), np.array([0, 0, 1, 1, 2, 2]), ((10,), (11,), (12,))
    )
    found = changed_questions(dense, small, three, taught.encoder)
    assert [item["index"] for item in found] == [2, 1, 0]
    assert [item["outcome"] for item in found] == ["lost", "lost", "changed"]
    assert [(item["dense_score"], item["compressed_score"]) for item in found] == [(1, 0), (1, 0), (0, 0)]
    assert found[0]["dense_answer"] == three[2].answer
    assert found[0]["compressed_answer"] == tokenizer.decode([12]) + "…"


# --- reports -----------------------------------------------------------------------------------------------------------------------

HOSTILE = '<script>alert("x")</script>'


def test_the_page_is_whole_and_escapes_what_strangers_wrote(taught, many, certified, tmp_path):
    result = certified
    folder = infoprune.save(result.vlm, tmp_path / "small", certificate=result.certificate)
    told = evaluate(result.vlm, many, against=taught, timing=False)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    told["comparison"]["changed"] = [
        {"index": 0, "id": HOSTILE, "image": str(image), "question": HOSTILE, "answer": "a & b", "dense_answer": "a",
         "compressed_answer": "b", "outcome": "lost", "dense_score": 1.0, "compressed_score": 0.0, "kl_nats": 1.0}
        for image in (many[0].image, broken)
    ]  # fmt: skip
    target = tmp_path / "report.html"
    write_page(told | {"warnings": [HOSTILE]}, target, Certificate.read(folder))
    html = target.read_text(encoding="utf-8")
    assert HOSTILE not in html
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "a &amp; b" in html
    assert escape(result.certificate.statement) in html
    assert html.count("data:image/jpeg;base64,") == 1
    assert "no picture" in html
    assert html.count("data:image/svg+xml;base64,") == 1
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert not list(tmp_path.glob(".report*"))
    assert "Warning: &lt;script&gt;" in html
    (folder / "certificate.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a valid certificate"):
        certificate_of(str(folder), [])
    assert "None." in page(told | {"comparison": told["comparison"] | {"changed": []}})


def test_certified_weights_are_not_rounded(certified, tmp_path):
    with pytest.raises(CheckpointError, match=r"weights in float32; they can't be saved in bfloat16"):
        infoprune.save(certified.vlm, tmp_path / "small", certificate=certified.certificate, dtype=torch.bfloat16)
    assert not (tmp_path / "small").exists()


def test_weights_that_changed_since_get_no_certificate(certified, tmp_path):
    changed = certified.vlm.copy()
    infoprune.save(changed, tmp_path / "half", dtype=torch.bfloat16)  # rounds what is in memory
    with pytest.raises(CheckpointError, match="have changed since they were certified"):
        infoprune.save(changed, tmp_path / "whole", certificate=certified.certificate)
    assert not (tmp_path / "whole").exists()


def test_a_certificate_holds_for_the_weights_it_is_of_and_names_its_images(certified, many, tmp_path):
    folder = infoprune.save(certified.vlm, tmp_path / "small", certificate=certified.certificate)
    images = [example.image for example in many]
    found, warnings = certificate_of(str(folder), images)
    assert found is not None and found == certified.certificate.model_copy(update={"weights": stored_digest(folder)})
    assert len(warnings) == 1 and f"{certified.certificate.data.num_images} of the 60 images" in warnings[0]
    certified_on = set(certified.certificate.data.images)
    others = [image for image in images if image_digest(image) not in certified_on]
    assert others and certificate_of(str(folder), others) == (found, [])
    assert certificate_of("somebody/some-model", images) == (None, [])

    file = folder / "model.safetensors"
    weights = load_file(file)
    names = list(weights)
    save_file({name: weights[name] for name in names[1:]}, folder / "b.safetensors", {"format": "pt"})
    save_file({names[0]: weights[names[0]]}, file, {"format": "pt"})
    assert certificate_of(str(folder), others) == (found, [])  # however they are spread over files
    weights[names[0]].flatten()[0] += 1e-3
    save_file({names[0]: weights[names[0]]}, file, {"format": "pt"})
    assert certificate_of(str(folder), others)[0] is None
    assert "other weights" in certificate_of(str(folder), others)[1][0]
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="Cannot read the weights"):
        certificate_of(str(folder), others)


def test_the_page_says_how_answers_were_judged_and_what_they_are_worth(taught, many):
    asked = [replace(q, answers=(q.answer,) * 10, kinds={HOSTILE: "x & y"}) for q in many[:6]]
    answers = [q.answer for q in asked]
    told = evaluate(taught, asked, against=taught, answers=[answers, ["-", *answers[1:]]], metric="vqav2/lmms-eval", timing=False)
    html = page(told | {"prompt": HOSTILE, "skipped": 1234})
    assert "Answers generated in float32, metric vqav2/lmms-eval. Bad records skipped: 1,234." in html
    assert HOSTILE not in html and f'<code class="prompt">{escape(HOSTILE)}</code>' in html
    assert f"<td>{escape(HOSTILE)}: x &amp; y</td><td>100.00</td><td>83.33</td><td>6</td>" in html
    assert "right is a score above 0.5" in html and "dense right, compressed wrong" in html
    plain = page(evaluate(taught, asked, against=taught, timing=False))
    assert "Answers scored in float32, exact match." in plain and "skipped" not in plain and "By kind" not in plain
    (item,) = told["comparison"]["changed"]
    for before, after, label in (
        (1, 0, "dense right, compressed wrong"), (0, 1, "dense wrong, compressed right"), (0, 0, "both wrong, differently"),
        (1, 1, "both right, in other words"), (0.9, 0.6, "compressed worth less (0.9, now 0.6)"),
        (0.3, 1, "compressed worth more (0.3, now 1)"), (0.6, 0.6, "same score (0.6), in other words"),
    ):  # fmt: skip
        changed = [item | {"dense_score": float(before), "compressed_score": float(after)}]
        assert f">{label}</span>" in page(told | {"comparison": told["comparison"] | {"changed": changed}})


def test_a_page_that_cannot_be_written_is_refused_first(tmp_path):
    for bad, against in ((tmp_path / "x.txt", True), (tmp_path / "no" / "x.html", True), (tmp_path / "x.html", False)):
        with pytest.raises(infoprune.InfoPruneError):
            check_page(bad, against=against)


def test_thumbnails_are_small_and_only_of_images(tmp_path):
    Image.new("RGB", (3000, 500), "red").save(tmp_path / "wide.png")
    uri = thumbnail(tmp_path / "wide.png")
    assert uri is not None
    assert len(uri) < 5000
    assert thumbnail(tmp_path / "missing.png") is None


def test_the_card_names_base_model_and_licence_and_stays_valid(gqa_vlm, questions, tmp_path):
    plan = infoprune.compress(gqa_vlm, questions, flops=0.8, rank_multiple=2).vlm.plan
    matter = yaml.safe_load(model_card(plan.model_copy(update={"model_id": "org/model-1B"}), licence="apache-2.0").split("---")[1])
    assert matter["base_model"] == "org/model-1B"
    assert matter["license"] == "apache-2.0"
    hostile = plan.model_copy(update={"model_id": f"/home/someone/{HOSTILE}\n# title | x"})
    card = model_card(hostile)
    assert "base_model" not in card
    assert "license" not in card.split("---")[1]
    assert "<script" not in card.replace("\\<", "")
    assert "/home/someone" not in card
    assert "\n# title" not in card
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    assert base_licence(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: [oops\n---\n")
    assert base_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\ndate: 2024-02-30\n---\n")
    assert base_licence(str(tmp_path)) is None
    assert base_licence("org/model-1B") is None and base_licence("~nobody-of-this-name") is None
