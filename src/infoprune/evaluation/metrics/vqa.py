r"""The accuracy of VQA and TextVQA: an answer is right as far as other people gave it, too.

For $n$ human answers $a_1, \dots, a_n$ and a prediction $p$, all normalised,

$$\mathrm{accuracy} = \frac1n \sum_i \min\Bigl(1, \tfrac13 \,\#\{j \ne i : a_j = p\}\Bigr)$$

(Antol et al. 2015; Goyal et al. 2017; Singh et al. 2019): of ten, 0, 0.3, 0.6, 0.9 and 1 for 0, 1, 2, 3 and at least 4 matches. The
normalisation is that of the benchmarks' scripts with all their quirks, which published figures contain; it is described step by step below.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from infoprune.evaluation.metrics.scores import total

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}

# Each is found with any one of its apostrophes left out. Forms with a capital are in the original's table, too, but never match.
_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form for form in _CONTRACTIONS.split() for place, character in enumerate(form) if character == "'"
} | {"somebody'd": "somebodyd"}  # the other way round in the original
PERIODS = 32  # removed at most; the original passes a flag of that value where a count is expected


@dataclass(frozen=True)
class Dialect:
    """Where the scripts differ.

    Attributes:
        number_commas: Text that contains it loses its punctuation instead of getting spaces for it.
        period: What goes of periods.
        lower: To lower case.
        tokenize: Before all else: lower case, no commas and question marks, a space before ``'s``.
    """

    number_commas: re.Pattern[str]
    period: re.Pattern[str]
    lower: Callable[[str], str]
    tokenize: bool = False


def _lower_by_character(text: str) -> str:
    # Python 2 knew neither letters that become two nor a sigma that depends on its place.
    return "".join(character.lower()[0] for character in text) if not text.isascii() else text.lower()


# The script of VQA is Python 2, where \d in a pattern without flags is a digit of ASCII.
VQA_SCRIPT = Dialect(re.compile(r"[0-9],[0-9]"), re.compile(r"\.(?![0-9])"), _lower_by_character)
LMMS_EVAL = Dialect(re.compile(r"\d,+\d"), re.compile(r"\.(?!\d)"), str.lower)
TEXTVQA = Dialect(LMMS_EVAL.number_commas, LMMS_EVAL.period, str.lower, tokenize=True)


@lru_cache(maxsize=1 << 17)
def normalize(text: str, dialect: Dialect) -> str:
    """An answer as it is compared.

    1. ``tokenize`` only: lower case; ``,`` and ``?`` go; ``'s`` gets a space before it.
    2. Newline and tab become spaces; white space at both ends goes.
    3. Each mark of :data:`PUNCTUATION` goes, if the text before this step has it next to a space or has commas in a number anywhere; else
       it becomes a space.
    4. Of periods that no digit follows the first 32 go. (The original means to spare those behind a digit, too, but its pattern looks
       for ``<=``.)
    5. Lower case; words by white space; ``none`` and ``zero`` to ``ten`` become figures; articles go; contractions get their apostrophe.
    """
    if dialect.tokenize:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = spaced(text)
    return _words(_without_punctuation(text, dialect), dialect)


def spaced(text: str) -> str:
    """Step 2 of :func:`normalize`."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str, dialect: Dialect) -> str:
    in_number = dialect.number_commas.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        if mark in out:
            out = out.replace(mark, "" if in_number or mark + " " in text or " " + mark in text else " ")
    return dialect.period.sub("", out, count=PERIODS)


def _words(text: str, dialect: Dialect) -> str:
    words = (NUMBERS.get(word, word) for word in dialect.lower(text).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def leave_one_out(prediction: str, references: Sequence[str], mean: Callable[[Sequence[float]], float]) -> float:
    """The equation above, for texts as they are compared.

    Args:
        prediction: The model's answer.
        references: What people answered, at least one.
        mean: Takes the mean; the scripts' roundings differ in the last bit.

    Returns:
        Within 0 to 1.
    """
    matches = sum(reference == prediction for reference in references)
    if not matches:
        return 0.0
    return mean([min(1.0, (matches - (reference == prediction)) / 3) for reference in references])


def vqav2_official(prediction: str, references: Sequence[str]) -> float:
    """As VQA's own script: compared as they are, case included, where all people wrote the same; normalised otherwise."""
    prediction, references = spaced(prediction), [spaced(reference) for reference in references]
    if len(set(references)) > 1:
        prediction, references = normalize(prediction, VQA_SCRIPT), [normalize(reference, VQA_SCRIPT) for reference in references]
    return leave_one_out(prediction, references, _mean)


def _always_normalized(prediction: str, references: Sequence[str], *, dialect: Dialect, mean: Callable[[Sequence[float]], float]) -> float:
    return leave_one_out(normalize(prediction, dialect), [normalize(reference, dialect) for reference in references], mean)


def _mean(values: Sequence[float]) -> float:
    return total(values) / len(values)


# lmms-eval takes the exact mean and rounds once.
vqav2_lmms_eval = partial(_always_normalized, dialect=LMMS_EVAL, mean=statistics.mean)
textvqa_official = partial(_always_normalized, dialect=TEXTVQA, mean=_mean)
textvqa_lmms_eval = partial(_always_normalized, dialect=TEXTVQA, mean=statistics.mean)
