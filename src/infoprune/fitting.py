"""Questions and images that a model's processor can't take, found before the work and not hours into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from infoprune.data import Example, Loaded, load_counted
from infoprune.data.images import sizes
from infoprune.data.problems import Problems
from infoprune.errors import DataError
from infoprune.prompts import PromptEncoder

MOST = 1000  # questions to leave out: with more, something else is wrong


def load_fitting(
    encoder: PromptEncoder,
    spec: str,
    *,
    default_split: str = "train",
    skip_bad: bool = False,
    notify: Callable[[str], None] = lambda message: None,
) -> list[Example]:
    """The examples that ``spec`` names, of which a model's ``encoder`` takes all: :func:`infoprune.data.load_examples`, :func:`fitting`."""
    loaded = load_counted(spec, default_split=default_split, skip_bad=skip_bad, notify=notify)
    return fitting(encoder, loaded, spec, skip_bad=skip_bad, notify=notify).examples


def fitting(
    encoder: PromptEncoder, loaded: Loaded, source: str, *, skip_bad: bool = False, notify: Callable[[str], None] = lambda message: None
) -> Loaded:
    """``loaded`` without the examples that ``encoder`` can't take, which are counted as skipped.

    Processors refuse images that are too thin or too small, and models whose positions are learned refuse texts that are too long. So
    the ends are tried, until one is taken at each: to try all would take as long as much of the work itself.

    Raises:
        DataError: There are such examples and ``skip_bad`` is false, or there are no others, or more than :data:`MOST`.
    """
    problems, examples = Problems(source), loaded.examples
    bad: set[int] = set()
    for order in _ends(examples):
        for index in (index for index in order if index not in bad):
            complaint, name = _complaint(encoder, examples[index]), examples[index].image.name
            if complaint is None:
                break
            if len(bad) == MOST:
                raise DataError(f"{source} has more than {MOST:,} questions that the model can't take, such as {name}: {complaint}")
            bad.add(index)
            problems.add("question that the model can't take", f"{name}: {complaint}")
    left = [example for index, example in enumerate(examples) if index not in bad]
    problems.settle(len(left), skip_bad=skip_bad, notify=notify)
    return Loaded(left, loaded.skipped + len(bad))


def _ends(examples: Sequence[Example]) -> list[list[int]]:
    """Indices with the thinnest images first, with the smallest, and with the longest texts."""
    found = sizes(example.image for example in examples)
    shapes = [sorted(found[example.image]) for example in examples]
    texts = [len(example.prompt or example.question) + len(example.answer) for example in examples]
    keys: list[Callable[[int], float]] = [lambda i: shapes[i][0] / shapes[i][1], lambda i: shapes[i][0], lambda i: -texts[i]]
    return [sorted(range(len(examples)), key=key) for key in keys]


def _complaint(encoder: PromptEncoder, example: Example) -> str | None:
    """Why it can't be encoded."""
    try:
        image = example.load_image()
        encoder.encode(example, image) if example.answered else encoder.encode_question(example, image)
    except DataError as error:
        return str(error)
    return None
