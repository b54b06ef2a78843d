r"""GQA's figures (Hudson & Manning 2019, section 4.4): accuracy on balanced questions, and how a model's answers hang together.

* Consistency: over counted questions answered right that entail others, the mean of the share of entailed questions answered right.
* Validity and plausibility: the share of answers that are among the question's valid, or plausible, answers by the file of choices. Where
  the question's detailed type contains "Common", the choices are color, material and shape.
* Distribution: the chi-square distance $\sum_a (o_a - e_a)^2 / e_a$ of predicted counts $o$ from true counts $e$ over the true answers $a$
  of each group of questions, averaged over groups by their size, divided by 100. Lower is better.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence

from infoprune.data import Example
from infoprune.evaluation.metrics.scores import Scores, four_decimals_of_share, gathered, total, two_decimals_printed

COMMON = ("color", "material", "shape")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def official(answers: Sequence[str], examples: Sequence[Example]) -> Scores:
    """As GQA's own script: an answer is right if it equals the reference to the letter; nothing is normalised.

    ``further`` has ``binary`` and ``open`` (structural type "query"), ``consistency``, ``validity``, ``plausibility`` and ``distribution``,
    as far as the examples carry what each needs; ``notes`` says of the others why not.
    """
    right = [float(answer == example.answer) for answer, example in zip(answers, examples, strict=True)]
    counted = counted_questions(examples)
    chosen = [(answer, example, value) for answer, example, value, use in zip(answers, examples, right, counted, strict=True) if use]
    further, notes = {}, []
    for name, is_open in (("binary", False), ("open", True)):
        values = [value for _, e, value in chosen if "structural" in e.kinds and (e.kinds["structural"] == "query") == is_open]
        if values:  # the script gives 0 to a kind that no question has
            further[name] = two_decimals_printed(values)
    for name, found in (
        ("consistency", consistency(examples, right, counted)),
        *((name, _share_among(name, chosen)) for name in ("validity", "plausibility")),
        ("distribution", distribution(chosen)),
    ):
        if isinstance(found, str):
            notes.append(f"{name} not computed: {found}")
        else:
            further[name] = found
    return gathered("gqa/official", right, examples, two_decimals_printed, counted=counted, further=further, notes=notes)


def counted_questions(examples: Sequence[Example]) -> list[bool]:
    """Which questions GQA's accuracy is about: the balanced ones, or all where none is."""
    counted = [example.kinds.get("balanced") != "no" for example in examples]
    return counted if any(counted) else [True] * len(examples)


def lmms_eval(answers: Sequence[str], examples: Sequence[Example]) -> Scores:
    """As lmms-eval's exact match: white space at the answer's ends goes, then case and ASCII punctuation; nothing else."""
    right = [float(_plain(answer.strip()) == _plain(example.answer)) for answer, example in zip(answers, examples, strict=True)]
    return gathered("gqa/lmms-eval", right, examples, four_decimals_of_share)


def _plain(text: str) -> str:
    # The original works on arrays of fixed width: a letter whose small form is longer pushes the last out, and final nulls are padding.
    return text.rstrip("\0").lower()[: len(text)].rstrip("\0").translate(_NO_PUNCTUATION).rstrip("\0")


def consistency(examples: Sequence[Example], right: Sequence[float], counted: Sequence[bool]) -> float | str:
    """Percent, or why there is none: entailed questions lie outside the balanced sets, so it needs the answers to a whole split."""
    by_id = {example.id: value for example, value in zip(examples, right, strict=True)}
    shares, missing, entailing = [], set(), False
    for example, value, counts in zip(examples, right, counted, strict=True):
        others = [id for id in example.extras.get("entailed", ()) if id != example.id]
        if not counts or not others:
            continue
        entailing = True
        missing |= {id for id in others if id not in by_id}
        if value and not missing:
            shares.append(total(by_id[id] for id in others) / len(others))
    if not entailing:
        return "no question says which others it entails."
    if missing:
        return f"{len(missing):,} entailed questions are not among these; evaluate the whole split, e.g. gqa:val_all."
    return two_decimals_printed(shares) if shares else 0.0


def _share_among(name: str, chosen: Sequence[tuple[str, Example, float]]) -> float | str:
    key = {"validity": "valid", "plausibility": "plausible"}[name]
    if any(key not in example.extras for _, example, _ in chosen):
        return "questions lack their choices; put the split's file of choices beside the questions."
    return two_decimals_printed([float(answer in _choices(example, key)) for answer, example, _ in chosen])


def _choices(example: Example, key: str) -> Sequence[str]:
    return COMMON if "Common" in example.kinds.get("detailed", "") else example.extras[key]


def distribution(chosen: Sequence[tuple[str, Example, float]]) -> float | str:
    """The chi-square distance described above, or why there is none."""
    true: dict[str, Counter[str]] = {}
    predicted: dict[str, Counter[str]] = {}
    for answer, example, _ in chosen:
        for group in example.extras.get("group", ()):
            true.setdefault(group, Counter())[example.answer] += 1
            predicted.setdefault(group, Counter())[answer] += 1
    if not true:
        return "no question belongs to a group."
    distances = [total((predicted[group][a] - e) ** 2 / e for a, e in counts.items()) * counts.total() for group, counts in true.items()]
    size = sum(counts.total() for counts in true.values())
    return float(f"{total(distances) / size / 100:.2f}")


METRICS: dict[str, Callable[[Sequence[str], Sequence[Example]], Scores]] = {"gqa/official": official, "gqa/lmms-eval": lmms_eval}
