"""Models of infoprune in lmms-eval: ``lmms-eval --model infoprune --model_args pretrained=DIR --tasks ... --batch_size 16``.

lmms-eval finds :func:`manifest` through the entry point group ``lmms_eval.models``. Any supported model can be named, compressed or
dense. Prompts are made as everywhere in infoprune: by the processor's chat template, images first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.utils import Collator  # pyright: ignore[reportMissingImports]
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig

from infoprune.data import Example
from infoprune.errors import InfoPruneError
from infoprune.model import load
from infoprune.packing import answer_logits, pack_encoded
from infoprune.resolve import family_of

MAX_NEW_TOKENS = 1024  # where a task sets none, as lmms-eval's own models
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
T = TypeVar("T")


def manifest() -> Any:
    """What lmms-eval's registry asks of a plugin."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id="infoprune", simple_class_path=f"{__name__}.{InfoPrune.__name__}")


@dataclass(frozen=True)
class _Question:
    """One request: its text, what else it gives (settings or the continuation), its images, and where it comes from."""

    text: str
    given: Any
    images: list[Any]
    where: str


class InfoPrune(lmms):
    """A compressed or dense vision-language model, for lmms-eval's tasks of the simple kind."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        prompt_suffix: str = "",
    ) -> None:
        """Load the model.

        Args:
            pretrained: ``demo``, a checkpoint folder, or a hub id.
            batch_size: Questions that are answered at once.
            max_batch_size: Always given by lmms-eval; only means something where sizes are found by trying, which is not done here.
            device: ``cpu``, ``cuda`` or ``mps``; ``None``, or several processes: what accelerate chooses.
            dtype: Precision to compute in: ``float32``, ``bfloat16`` or ``float16``.
            trust_remote_code: Allow code that the checkpoint ships; infoprune's own checkpoints don't need it.
            prompt_suffix: Appended to every question.

        Raises:
            InfoPruneError: A setting is unusable, or the model can't be loaded.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InfoPruneError(f"The batch size must be a whole number of at least 1, not '{batch_size}'.")
        if dtype not in DTYPES:
            raise InfoPruneError(f"Unknown dtype '{dtype}'. Known: {', '.join(DTYPES)}.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self.vlm: Any = load(
            pretrained,
            device=device if device and self._world_size == 1 else str(self.accelerator.device),
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            prompt_suffix=prompt_suffix,
        )
        self.vlm.processor.tokenizer.padding_side = "left"

    @property
    def device(self) -> torch.device:
        """Where lmms-eval gathers the processes' figures."""
        return self.accelerator.device

    def clean(self) -> None:
        """Give the memory back, for tasks that load a judge afterwards."""
        self.vlm = None
        super().clean()

    @torch.inference_mode()
    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, cut at the task's stop strings.

        Raises:
            InfoPruneError: A document has something else than images, or other numbers of them than the family's processor takes.
        """

        def answer(questions: list[_Question]) -> list[str]:
            options, stops = generation_options(questions[0].given)
            encoder = self.vlm.encoder
            with self._readable(questions):
                texts = [encoder.prompt_of(Example(Path(), q.text, ""), images=len(q.images)) for q in questions]
                inputs = encoder.inputs(texts, [question.images for question in questions])
            inputs = {name: self._placed(value) for name, value in inputs.items()}
            new = self.vlm.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
            return [cut(text, stops) for text in self.vlm.processor.batch_decode(new, skip_special_tokens=True)]

        return self._in_batches(requests, answer, group_by=lambda args: args[1])

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each continuation, its mean negative log-likelihood per token in nats, and whether it would be generated.

        Sign and mean are what lmms-eval's own models return and its multiple choice expects, which takes the smallest. The token that
        ends the answer counts, or the beginning of a longer choice could not be told from a choice.

        Raises:
            InfoPruneError: As in :meth:`generate_until`.
        """

        def answer(questions: list[_Question]) -> list[tuple[float, bool]]:
            encoder = self.vlm.encoder
            with self._readable(questions):
                examples = [Example(Path(), question.text, question.given.strip()) for question in questions]
                encoded = [[encoder.encode(example, q.images)] for example, q in zip(examples, questions, strict=True)]
                batch = pack_encoded(encoder, encoded, encoder.image_inputs([question.images for question in questions]))
            batch = batch.to(self.vlm.device)
            batch.inputs.update({name: self._placed(value) for name, value in batch.inputs.items()})
            logits = answer_logits(self.vlm.model, batch).float()
            losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            right = logits.argmax(-1) == batch.targets
            own = [batch.question == number for number in range(len(questions))]
            return [(float(losses[mine].mean()), bool(right[mine].all())) for mine in own]

        return self._in_batches(requests, answer)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not there: prompts are of one turn.

        Raises:
            InfoPruneError: Always.
        """
        raise InfoPruneError("infoprune answers one question at a time; tasks of several rounds can't be run with it.")

    def _in_batches(
        self, requests: Sequence[Any], answer: Callable[[list[_Question]], list[T]], group_by: Callable[[Any], Any] | None = None
    ) -> list[T]:
        """Answers in the order of the requests, found for those of similar length, equal settings and equal numbers of images together."""
        grouping = {} if group_by is None else {"group_fn": group_by, "grouping": True}
        order = Collator([request.args for request in requests], lambda args: -len(args[0]), **grouping)
        found: list[T] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="infoprune") as bar:
            for chunk in order.get_batched(n=self.batch_size):
                questions = [self._question(args) for args in chunk]
                places = sorted(range(len(questions)), key=lambda place: len(questions[place].images))
                answers: dict[int, T] = {}
                for _, group in groupby(places, key=lambda place: len(questions[place].images)):
                    members = list(group)
                    answers |= dict(zip(members, answer([questions[place] for place in members]), strict=True))
                found += [answers[place] for place in range(len(questions))]
                bar.update(len(questions))
        return order.get_original(found)

    def _question(self, args: tuple[Any, ...]) -> _Question:
        if len(args) != 6:
            raise InfoPruneError("This task scores continuations without their document (acc_mutual_info), which infoprune can't.")
        text, given, to_visual, number, task, split = args
        document, where = self.task_dict[task][split][number], f"document {number} of the task '{task}'"
        visuals = to_visual(document) or []
        other = next((type(visual).__name__ for visual in visuals if not isinstance(visual, Image.Image)), None)
        if other:
            raise InfoPruneError(f"{where.capitalize()} has a {other} beside or instead of images; infoprune evaluates images alone.")
        return _Question(text, given(document) if callable(given) else given, [visual.convert("RGB") for visual in visuals], where)

    @contextmanager
    def _readable(self, questions: list[_Question]) -> Iterator[None]:
        """Say it in one sentence where a processor can't take what a task gives: processors raise many kinds of errors then."""
        try:
            yield
        except InfoPruneError:
            raise
        except Exception as error:
            count, family = len(questions[0].images), family_of(self.vlm.model).model_type
            raise InfoPruneError(
                f"The {family} processor of '{self.vlm.model_id}' can't take {count} image{'s' * (count != 1)} in one question "
                f"({questions[0].where}): {type(error).__name__}: {error}"
            ) from error

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.vlm.device, self.vlm.model.dtype if value.is_floating_point() else None)


def generation_options(settings: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What ``generate`` and :func:`cut` are called with for a task's settings: those that ``generate`` knows, greedy at temperature 0."""
    stops, defaults = settings.get("until") or (), GenerationConfig()
    known = {name: value for name, value in settings.items() if value is not None and hasattr(defaults, name)}
    warm = bool(known.get("temperature"))
    options = {"max_new_tokens": MAX_NEW_TOKENS} | known | {"do_sample": warm and known.get("do_sample", True)}
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in SAMPLING}
    return options, (stops,) if isinstance(stops, str) else tuple(stops)


def cut(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the first of the stop strings, without white space around it."""
    text = text.strip()
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))].strip()
