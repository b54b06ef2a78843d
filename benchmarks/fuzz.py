"""Both modes of every benchmark's metric against their rules, written down a second time in another style, on generated answers.

    python benchmarks/fuzz.py [--sets 100000] [--processes 2]

A set is a prediction and what people answered: real turns of phrase, perturbed by what the rules treat specially (case, articles, numbers,
commas, periods, apostrophes, white space, marks beside spaces, digits and letters outside ASCII). Scores must be equal, not close. Sets
are gathered by 50, as if each were a benchmark, for rounded totals and GQA's further figures.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from common import log, write
from infoprune.data import Example
from infoprune.evaluation.metrics import score_answers
from infoprune.evaluation.metrics.vqa import CONTRACTIONS

SEED, BATCH = 0, 50
WORDS = """yes no none zero one two ten eleven a an the red Red blue cat Cat dog's don't dont it's its cant can't Im i've Id've
    y'all yall somebody'd shed've o'clock 1 2 3 10 1,000 1,,000 2.5 3. .5 1.000.000 U.S. e.g. St. Mr. tennis racket skate-board t-shirt
    black/white (left) "stop" what? wow! and&more @home #1 50% $5 a_b c++ <b> [x] {y} `z` semi;colon co,mma back\\slash =eq
    café naïve \u0130stanbul \u039f\u0394\u039f\u03a3 \u01c4 \u0661 \u0661,\u0662 \uff13 ½ ² straße"""
PIECES = [*WORDS.split(), ".", ",", "-", "'", "'s", "...", "?", "!", "." * 33, ". " * 20, "\u00a0", "\u2009", "\r"]
STRUCTURAL, SEMANTIC = ("query", "verify", "choose", "logical", "compare"), ("attr", "cat", "global", "obj", "rel")
METRICS = ("vqav2/official", "vqav2/lmms-eval", "textvqa/official", "textvqa/lmms-eval", "gqa/official", "gqa/lmms-eval")


def phrase(rng: random.Random) -> str:
    """An answer of a few pieces."""
    separators = (" ", " ", " ", "", "  ", "\n", "\t", ",", ", ", ".", "-")
    text = rng.choice(PIECES)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        text += rng.choice(separators) + rng.choice(PIECES)
    return text


def perturbed(text: str, rng: random.Random) -> str:
    """The same answer as somebody else might write it."""
    changes = (
        str.lower, str.upper, str.title, lambda t: "the " + t, lambda t: t + ".", lambda t: t.replace("'", "", 1), lambda t: f" {t} ",
        lambda t: t.replace(" ", "-"), lambda t: t.replace("-", " "), lambda t: t + "?", lambda t: t.replace(",", ""),
        lambda t: t.replace("1", "one"), lambda t: "\n" + t, lambda t: t + "\t", lambda t: t[:-1], lambda t: t.replace(" ", "  "),
    )  # fmt: skip
    return rng.choice(changes)(text)


def answer_set(rng: random.Random) -> tuple[str, list[str]]:
    """A prediction, and what people answered: mostly ten of them, one time in four all the same."""
    pool = [phrase(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    if rng.random() < 0.75:
        pool += [perturbed(rng.choice(pool), rng) for _ in range(rng.randint(1, 4))]
    count = 10 if rng.random() < 0.97 else rng.randint(2, 13)
    weights = [rng.random() ** 2 for _ in pool] if rng.random() < 0.8 else [1.0] + [0.0] * (len(pool) - 1)
    answers = rng.choices(pool, weights, k=count)
    prediction = rng.choice((rng.choice(pool), rng.choice(answers), perturbed(rng.choice(answers), rng), phrase(rng)))
    return prediction, answers


def example(number: int, first: int, answers: list[str], rng: random.Random) -> Example:
    """A question with those answers that is one of VQAv2, of TextVQA and of GQA at once."""
    kinds = {
        "answer_type": rng.choice(("yes/no", "number", "other")), "structural": rng.choice(STRUCTURAL), "semantic": rng.choice(SEMANTIC),
        "detailed": rng.choice(("existAttr", "sameCommon", "twoCommon", "placeChoose")),
    }  # fmt: skip
    if rng.random() < 0.2:
        kinds["balanced"] = "no"
    extras = {
        "entailed": tuple(str(first + rng.randrange(BATCH)) for _ in range(rng.choice((0, 0, 1, 2, 3)))),
        "valid": tuple(rng.sample(answers, min(2, len(answers)))), "plausible": tuple(answers[:1]),
    }  # fmt: skip
    if rng.random() < 0.8:
        extras["group"] = (rng.choice(("color", "room", "animal")),)
    gold = rng.choice([text for text in answers if text] or ["yes"])
    return Example(Path("image.jpg"), "what?", gold, id=str(number), answers=tuple(answers), kinds=kinds, extras=extras)


def generated(batch: int) -> tuple[list[str], list[Example]]:
    """Predictions and questions of one batch."""
    rng = random.Random(SEED + batch)
    predictions, examples = [], []
    for number in range(batch * BATCH, (batch + 1) * BATCH):
        prediction, answers = answer_set(rng)
        examples.append(example(number, batch * BATCH, answers, rng))
        # GQA compares letter by letter; a prediction made of ten answers would hardly ever be right.
        predictions.append(examples[-1].answer if rng.random() < 0.2 else prediction)
    return predictions, examples


# The rules once more, character by character.


@functools.cache
def literal_normal(text: str, *, ascii_only: bool, textvqa: bool) -> str:
    if textvqa:
        text = without_ends("".join(c for c in text.lower() if c != "," and c != "?"))
        text = "".join(" '" if c == "'" and text[i + 1 : i + 2] == "s" else c for i, c in enumerate(text))
        text = without_ends(text)
    text = without_ends("".join(" " if c in "\n\t" else c for c in text))
    marks = set(";/[]{}()=+_-><@`,?!") | {'"', chr(92)}
    drop = {c for i, c in enumerate(text) if c in marks and " " in (text[i - 1 : i], text[i + 1 : i + 2])}
    if comma_in_number(text, ascii_only, several=not ascii_only):
        drop = marks
    text = "".join(c if c not in marks else "" if c in drop else " " for c in text)
    kept, gone = [], 0
    for i, c in enumerate(text):
        if c == "." and gone < 32 and not digit(text[i + 1 : i + 2], ascii_only):
            gone += 1
        else:
            kept.append(c)
    words = [""]
    for c in kept:
        if c.isspace():
            words.append("")
        else:
            words[-1] += small(c) if ascii_only else c
    if not ascii_only:
        words = [word.lower() for word in words]
    result = ""
    for word in words:
        word = figure(word)
        if word not in ("", "a", "an", "the"):
            result += (" " if result else "") + with_apostrophe(word)
    return result


def without_ends(text: str) -> str:
    start, end = 0, len(text)
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return text[start:end]


def small(c: str) -> str:
    return "i" if c == "İ" else c.lower()


def digit(c: str, ascii_only: bool) -> bool:
    return c != "" and (c in "0123456789" if ascii_only else c.isdecimal())


def comma_in_number(text: str, ascii_only: bool, several: bool) -> bool:
    state = 0  # 1: behind a digit, 2: behind commas after a digit
    for c in text:
        if digit(c, ascii_only):
            if state == 2:
                return True
            state = 1
        elif c == "," and (state == 1 or (several and state == 2)):
            state = 2
        else:
            state = 0
    return False


def figure(word: str) -> str:
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return "0" if word == "none" else str(names.index(word)) if word in names else word


FORMS = {form for form in CONTRACTIONS.values() if "'" in form}


def with_apostrophe(word: str) -> str:
    if word == "somebody'd":
        return "somebodyd"
    found = [word[:i] + "'" + word[i:] for i in range(len(word) + 1) if word[:i] + "'" + word[i:] in FORMS]
    return found[0] if found else word


def literal_score(prediction: str, answers: Sequence[str], metric: str) -> float:
    normal: dict[str, str] = {}
    texts = [prediction, *answers]
    if metric == "vqav2/official":
        texts = [without_ends("".join(" " if c in "\n\t" else c for c in text)) for text in texts]
    if metric != "vqav2/official" or any(text != texts[1] for text in texts[1:]):
        for text in set(texts):
            normal[text] = literal_normal(text, ascii_only=metric == "vqav2/official", textvqa=metric.startswith("textvqa"))
        texts = [normal[text] for text in texts]
    first, exact = 0.0, Fraction(0)
    for i in range(1, len(texts)):
        agreeing = 0
        for j in range(1, len(texts)):
            if j != i and texts[j] == texts[0]:
                agreeing += 1
        value = 1.0 if agreeing >= 3 else agreeing / 3
        first, exact = first + value, exact + Fraction(value)
    return float(exact / len(answers)) if metric.endswith("lmms-eval") else first / len(answers)


def literal_percent(values: Sequence[float], metric: str) -> float:
    added = 0.0
    for value in values:
        added += value
    if metric == "vqav2/official":
        hundredths = Fraction(100 * added / len(values)) * 100
        return ((2 * hundredths.numerator + hundredths.denominator) // (2 * hundredths.denominator)) / 100
    if metric == "gqa/official":
        return float("%.2f" % (added / len(values) * 100))
    return round(float("%.4f" % (added / len(values))) * 100, 2)


def literal_gqa(predictions: Sequence[str], examples: Sequence[Example], metric: str) -> tuple[list[float], dict[str, float]]:
    if metric == "gqa/lmms-eval":
        plain = lambda text: "".join(c for c in text.lower()[: len(text)] if not (33 <= ord(c) <= 126 and not c.isalnum()))  # noqa: E731
        return [1.0 if plain(without_ends(p)) == plain(e.answer) else 0.0 for p, e in zip(predictions, examples, strict=True)], {}
    answer = {e.id: p for e, p in zip(examples, predictions, strict=True)}
    gold = {e.id: e.answer for e in examples}
    scores: dict[str, list[float]] = {name: [] for name in ("binary", "open", "consistency", "validity", "plausibility")}
    tables: dict[str, dict[str, list[int]]] = {}
    for e in examples:
        if "balanced" in e.kinds:
            continue
        right = answer[e.id] == gold[e.id]
        scores["open" if e.kinds["structural"] == "query" else "binary"].append(1.0 if right else 0.0)
        for name, key in (("validity", "valid"), ("plausibility", "plausible")):
            among = ["color", "material", "shape"] if e.kinds["detailed"].find("Common") >= 0 else e.extras[key]
            scores[name].append(1.0 if answer[e.id] in among else 0.0)
        others = [i for i in e.extras["entailed"] if i != e.id]
        if right and others:
            scores["consistency"].append(sum(1.0 for i in others if answer[i] == gold[i]) / len(others))
        for group in e.extras.get("group", ()):
            table = tables.setdefault(group, {})
            table.setdefault(gold[e.id], [0, 0])[0] += 1
            table.setdefault(answer[e.id], [0, 0])[1] += 1
    further = {name: literal_percent(values, metric) for name, values in scores.items() if values}
    further.setdefault("consistency", 0.0)
    weighted, size = 0.0, 0
    for table in tables.values():
        distance, count = 0.0, 0
        for expected, observed in table.values():
            if expected:
                distance += float(observed - expected) ** 2 / expected
                count += expected
        weighted, size = weighted + distance * count, size + count
    further["distribution"] = float("%.2f" % (weighted / size / 100))
    return [1.0 if answer[e.id] == gold[e.id] else 0.0 for e in examples], further


def compared(metric: str, predictions: Sequence[str], examples: Sequence[Example]) -> tuple[int, list[int], bool, int]:
    """Our metric beside the rules above on one batch: sets, numbers of those that differ, whether a total does, scores above 0."""
    if metric == "textvqa/official":
        ten = [i for i, e in enumerate(examples) if len(e.answers) == 10]
        predictions, examples = [predictions[i] for i in ten], [examples[i] for i in ten]
    ours = score_answers(predictions, examples, metric)
    if metric.startswith("gqa"):
        values, further = literal_gqa(predictions, examples, metric)
    else:
        values, further = [literal_score(a, x.answers, metric) for a, x in zip(predictions, examples, strict=True)], {}
    wrong = [int(x.id or 0) for x, value, mine in zip(examples, values, ours.per_example, strict=True) if value != mine]
    counted = [value for value, x in zip(values, examples, strict=True) if metric != "gqa/official" or "balanced" not in x.kinds]
    total_differs = literal_percent(counted, metric) != ours.overall or further != ours.further
    return len(examples), wrong, total_differs, sum(value > 0 for value in values)


def batch(number: int) -> dict[str, tuple[int, list[int], bool, int]]:
    """Every metric on one batch of generated sets."""
    predictions, examples = generated(number)
    return {metric: compared(metric, predictions, examples) for metric in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    counts = ("sets", "disagreements", "totals", "disagreeing_totals", "scored_above_0")
    rows: dict[str, dict[str, int]] = {metric: dict.fromkeys(counts, 0) for metric in METRICS}
    first: dict[str, list[int]] = {metric: [] for metric in METRICS}
    with multiprocessing.Pool(args.processes) as pool:
        for number, found in enumerate(pool.imap(batch, range(args.sets // BATCH)), start=1):
            for metric, (sets, wrong, total_differs, above) in found.items():
                for name, value in zip(counts, (sets, len(wrong), 1, total_differs, above), strict=True):
                    rows[metric][name] += value
                first[metric] = (first[metric] + wrong)[:5]
            if number % 200 == 0:
                differing = sum(row["disagreements"] + row["disagreeing_totals"] for row in rows.values())
                log(f"{number * BATCH} sets, {differing} disagreements")
    write("fuzz", [{"metric": metric} | row | {"first_disagreements": first[metric]} for metric, row in rows.items()], seeds=[SEED])


if __name__ == "__main__":
    main()
