"""Metrics of answers: invariants, quirks checked by hand, result files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infoprune.data import Example
from infoprune.errors import DataError, InfoPruneError
from infoprune.evaluation.metrics import METRICS, metric_for, score_answers
from infoprune.evaluation.metrics.scores import four_decimals_of_share, total, two_decimals_half_up, two_decimals_printed
from infoprune.evaluation.metrics.vqa import LMMS_EVAL, TEXTVQA, VQA_SCRIPT, normalize
from infoprune.evaluation.results import write_results

IMAGE = Path("image.jpg")
VQA = [name for name in METRICS if name.startswith(("vqav2", "textvqa"))]


def people(*answers, **kinds):
    return Example(IMAGE, "what ?", answers[0] or "-", answers=tuple(answers), kinds=kinds)


def score(prediction, answers, metric):
    return score_answers([prediction], [people(*answers)], metric).per_example[0]


@pytest.mark.parametrize(
    ("text", "official", "lmms_eval", "textvqa"),
    [
        # case, articles, numbers, white space
        ("The  Red\nDog", "red dog", "red dog", "red dog"),
        ("none", "0", "0", "0"),
        ("Ten of an eleven", "10 of eleven", "10 of eleven", "10 of eleven"),
        (" a ", "", "", ""),
        # a mark goes where the text has it beside a space, and becomes a space otherwise
        ("black/white", "black white", "black white", "black white"),
        ("black/ white/grey", "black whitegrey", "black whitegrey", "black whitegrey"),
        ("t-shirt", "t shirt", "t shirt", "t shirt"),
        ("(left)", "left", "left", "left"),
        ("what's up?", "what's up", "what's up", "what 's up"),
        # a comma in a number makes all marks go; several commas only where the script is a later one; TextVQA has dropped commas before
        ("1,000", "1000", "1000", "1000"),
        ("1,000-x", "1000x", "1000x", "1000 x"),
        ("1,,000-x", "1 000 x", "1000x", "1000 x"),
        ("5,a", "5", "5", "5a"),
        # periods: one that no digit follows goes, also behind a digit; 32 at most
        ("2.5", "2.5", "2.5", "2.5"),
        ("3.", "3", "3", "3"),
        ("u.s. 1.2.", "us 1.2", "us 1.2", "us 1.2"),
        ("." * 34 + "x", "..x", "..x", "..x"),
        # contractions; those with a capital are never found, and one stands the wrong way round
        ("dont", "don't", "don't", "don't"),
        ("shed've", "she'd've", "she'd've", "she'd've"),
        ("she'dve", "she'd've", "she'd've", "she'd've"),
        ("Ive", "ive", "ive", "ive"),
        ("somebody'd", "somebodyd", "somebodyd", "somebodyd"),
        ("dog's", "dog's", "dog's", "dog 's"),
        # the articles' check comes after the numbers', the contractions' after both
        ("the one", "1", "1", "1"),
        # digits outside ASCII are digits for the later scripts alone
        ("\u0661,\u0662-x", "\u0661 \u0662 x", "\u0661\u0662x", "\u0661\u0662 x"),
        (".\u0661", "\u0661", ".\u0661", ".\u0661"),
        ("\u0130", "i", "i\u0307", "i\u0307"),
    ],
)
def test_quirks_of_normalisation(text, official, lmms_eval, textvqa):
    assert [normalize(text, dialect) for dialect in (VQA_SCRIPT, LMMS_EVAL, TEXTVQA)] == [official, lmms_eval, textvqa]


@pytest.mark.parametrize("metric", VQA)
@pytest.mark.parametrize(("matches", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_leave_one_out(metric, matches, value):
    others = [f"other{i}" for i in range(10 - matches)]
    assert score("yes", ["yes"] * matches + others, metric) == pytest.approx(value, abs=1e-12)


def test_official_vqa_normalises_only_where_people_differ():
    assert score("Red", ["red"] * 10, "vqav2/official") == 0  # all the same: letter by letter
    assert score("red", ["red\n"] * 5 + ["red\t"] * 5, "vqav2/official") == 1  # white space at the ends does not count as a difference
    assert score("Red", ["red"] * 9 + ["blue"], "vqav2/official") == 1
    assert score("Red", ["red"] * 10, "vqav2/lmms-eval") == 1


def test_the_last_bit_is_that_of_the_scripts():
    answers = ["dog"] * 3 + ["a cat"] * 2 + ["dog"] * 5
    assert score("cat", answers, "vqav2/official") == 0.6000000000000001  # thirds added one by one, in this order
    assert score("cat", answers, "vqav2/lmms-eval") == 0.6
    assert score("cat", ["cat"] * 2 + ["dog"] * 7 + ["cat"], "textvqa/official") == 0.8999999999999998


def test_roundings():
    eighth = [1.0] + [0.0] * 7
    halfway = [1.0] + [0.0] * 799  # 0.125 exactly
    assert two_decimals_half_up(halfway) == 0.13 and two_decimals_printed(halfway) == 0.12 and four_decimals_of_share(halfway) == 0.13
    assert two_decimals_half_up(eighth) == two_decimals_printed(eighth) == four_decimals_of_share(eighth) == 12.5
    assert total([1e16, 1.0, 1.0]) == 1e16  # from the left, unlike math.fsum


def test_breakdown_and_totals_of_vqa():
    examples = [people(*["yes"] * 10, answer_type="yes/no"), people(*["2"] * 4, *"345678", answer_type="number"), people(*["a b"] * 10)]
    scores = score_answers(["yes", "two", "c"], examples, "vqav2/official")
    assert scores.overall == 66.67 and scores.per_example.tolist() == [1, 1, 0]
    assert {kind: (g.percent, g.count) for kind, g in scores.breakdown["answer_type"].items()} == {"number": (100, 1), "yes/no": (100, 1)}
    assert json.loads(json.dumps(scores.as_dict()))["num_questions"] == 3


relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
texts = st.text("aAn.,'?-/ 1\u0661\n", max_size=8) | st.sampled_from(["yes", "Yes.", "the cat", "dont", "1,000", "none"])


@relaxed
@given(st.data(), st.sampled_from(VQA), st.lists(texts, min_size=10, max_size=10), texts)
def test_invariants_of_vqa(data, metric, answers, prediction):
    value = score(prediction, answers, metric)
    assert 0 <= value <= 1
    assert score(prediction, data.draw(st.permutations(answers)), metric) == pytest.approx(value, abs=1e-12)
    assert min(abs(value - level) for level in (0, 0.3, 0.6, 0.9, 1)) < 1e-12
    agreed = [prediction, *answers[1:]]  # one more who says the same takes nothing away, where people still differ
    if len({text.replace("\n", " ").strip() for text in answers}) > 1 and len({text.replace("\n", " ").strip() for text in agreed}) > 1:
        assert score(prediction, agreed, metric) >= value - 1e-12


@relaxed
@given(st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=6))
def test_exact_is_equality_and_the_order_of_questions_is_irrelevant(pairs):
    answers, examples = [a for a, _ in pairs], [Example(IMAGE, "what ?", e) for _, e in pairs]
    scores = score_answers(answers, examples, "exact")
    assert scores.per_example.tolist() == [float(a.strip() == e.strip()) for a, e in pairs]
    assert scores.overall == pytest.approx(100 * scores.per_example.mean())
    assert score_answers(answers[::-1], examples[::-1], "exact").overall == scores.overall


def gqa(id, answer, structural="query", *, entailed=(), group="color", choices=("red", "blue"), **kinds):
    extras = {"entailed": entailed, "valid": choices, "plausible": choices[:1]} | ({"group": (group,)} if group else {})
    return Example(IMAGE, "what ?", answer, id=id, kinds={"structural": structural, "semantic": "attr", **kinds}, extras=extras)


def test_gqa_official():
    examples = [
        gqa("1", "red", entailed=("1", "2", "3")), gqa("2", "yes", "verify", choices=("yes", "no"), group=None), gqa("3", "no", "verify"),
        gqa("4", "blue", detailed="twoCommon"), gqa("5", "blue", balanced="no", entailed=("4",)),
    ]  # fmt: skip
    scores = score_answers(["red", "yes", "yes", "color", "blue"], examples, "gqa/official")
    assert scores.per_example.tolist() == [1, 1, 0, 0, 1] and scores.counted.tolist() == [True] * 4 + [False]
    assert scores.overall == 50 and scores.notes == ()
    # Chi-square: of red, no and blue (once each) one was said; 0 + 1 + 1, a hundredth of it.
    assert scores.further == {
        "binary": 50, "open": 50, "consistency": 50, "validity": 75, "plausibility": 75, "distribution": 0.02,
    }  # fmt: skip
    assert scores.breakdown["structural"]["query"].count == 2 and "balanced" not in scores.breakdown
    assert score_answers(["Red"], examples[:1], "gqa/official").overall == 0


def test_gqa_says_what_it_could_not_compute():
    one = [gqa("1", "red", entailed=("8", "9"), group=None)]
    scores = score_answers(["red"], one, "gqa/official")
    assert "2 entailed questions are not among these; evaluate the whole split" in scores.notes[0] and "open" in scores.further
    assert "belongs to a group" in scores.notes[1] and "consistency" not in scores.further and "binary" not in scores.further
    bare = score_answers(["red"], [Example(IMAGE, "what ?", "red", id="1")], "gqa/official")
    assert bare.further == {}
    assert [note.partition(" ")[0] for note in bare.notes] == ["consistency", "validity", "plausibility", "distribution"]


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        (" Red.\n", "red", 1), ("t-shirt", "tshirt", 1), ("- red", "red", 0), ("the red", "red", 0), ("RED", "red!", 1),
        ("\u0130x", "i\u0307", 1), ("\u0130", "i", 1),  # two letters when small, in an array of fixed width
    ],
)  # fmt: skip
def test_gqa_lmms_eval(prediction, answer, right):
    assert score_answers([prediction], [Example(IMAGE, "what ?", answer)], "gqa/lmms-eval").per_example.tolist() == [right]


def test_metrics_by_data_set():
    assert [metric_for(name) for name in ("vqav2", "textvqa", "gqa", "easy-vqa", "own")] == [
        "vqav2/official", "textvqa/official", "gqa/official", "exact", "exact",
    ]  # fmt: skip
    assert metric_for("gqa", "lmms-eval") == "gqa/lmms-eval" and metric_for("gqa", "exact") == "exact"
    assert metric_for("own", "vqav2/official") == "vqav2/official"
    for dataset, mode in (("own", "official"), ("gqa", "strict")):
        with pytest.raises(DataError, match=f"no metric '{mode}' for {dataset}. Metrics are exact, vqav2/official"):
            metric_for(dataset, mode)


def test_what_can_not_be_scored_is_refused():
    ten = people(*["yes"] * 10)
    for answers, examples, metric, message in (
        ([], [], "exact", "no answers"), (["a"], [], "exact", "1 answers do not fit 0"), (["a"], [ten], "bleu", "no metric 'bleu'"),
        (["a", "b"], [ten, Example(IMAGE, "q", "")], "exact", "1 of 2 questions have no reference"),
        (["a", "b"], [ten, people(*"123456789")], "textvqa/official", "exactly 10 people, which 1 of 2 questions"),
        (["a"], [Example(IMAGE, "what ?", "yes")], "vqav2/lmms-eval", "at least 2 people.*'what .' with 0.*Use 'exact'"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            score_answers(answers, examples, metric)
    assert score_answers(["1", "1"], [people(*"111122"), people(*"123456789")], "textvqa/lmms-eval").per_example[0] == 1


def test_result_files(tmp_path):
    examples = [Example(IMAGE, "q", "", id="12"), Example(IMAGE, "q", "", id="3")]
    path = tmp_path / "results.json"
    path.write_text("older")
    write_results(path, ["Yes.", "caf\u00e9"], examples, dataset="vqav2")
    assert json.loads(path.read_text()) == [{"question_id": 12, "answer": "Yes."}, {"question_id": 3, "answer": "caf\u00e9"}]
    write_results(path, ["a", "b"], [*examples[:1], Example(IMAGE, "q", "", id="n5")], dataset="gqa")
    assert json.loads(path.read_text()) == [{"questionId": "12", "prediction": "a"}, {"questionId": "n5", "prediction": "b"}]
    before = path.read_text()
    for changed, dataset, message in (
        ([Example(IMAGE, "q", ""), examples[0]], "vqav2", "whole number for each question.*1 of 2 have none"),
        ([Example(IMAGE, "q", "", id="n5"), examples[0]], "textvqa", "1 of 2 have none, 0 have"),
        ([examples[0]] * 2, "gqa", "1 have one that"),
        (examples, "easy-vqa", "no form of result files for 'easy-vqa'"), (examples[:1], "gqa", "2 answers do not fit 1"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            write_results(path, ["a", "b"], changed, dataset=dataset)
    with pytest.raises(InfoPruneError, match="Cannot write"):
        write_results(tmp_path / "nowhere" / "x.json", ["a", "b"], examples, dataset="gqa")
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_scores_are_plain_numbers():
    scores = score_answers(["a"], [people(*"ab")], "vqav2/lmms-eval")
    assert isinstance(scores.per_example, np.ndarray) and scores.per_example.dtype == float and isinstance(scores.overall, float)
