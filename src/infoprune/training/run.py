"""One training run: its data, processes and work folder, and the two stages that compression may ask for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from infoprune.architecture import AttentionSite, TowerName
from infoprune.calibration_batches import rows_that_fit
from infoprune.checkpoint import save
from infoprune.criteria.heads import Block
from infoprune.data import Example, parse_spec, same_images, subset
from infoprune.errors import CheckpointError, DataError, InfoPruneError
from infoprune.evaluation.quality import can_share_prefix
from infoprune.fitting import load_fitting
from infoprune.freeze import frozen
from infoprune.model import VLM, load
from infoprune.packing import PackedBatch, answer_logits, batches
from infoprune.plan import Compensation
from infoprune.progress import Progress
from infoprune.prompts import PromptEncoder
from infoprune.steps import fingerprint
from infoprune.training.costs import Costs
from infoprune.training.data import Stream, VisionCache, hold_out, images_of_rows, rows_of
from infoprune.training.ffn_gates import FFNGates, FFNPart, Sizes
from infoprune.training.gates import HeadGates, deterministic_gate, start_locations
from infoprune.training.heads import BestGates, Choice, GateStage, binarise
from infoprune.training.loop import ROWS_PER_FORWARD, Processes, Trained, train, wants_bfloat16
from infoprune.training.options import TrainingOptions
from infoprune.training.recovery import RecoveryStage, add_lora, cut_towers, fixed_features, layer_weights, validated
from infoprune.training.sharding import spread
from infoprune.training.state import WorkFolder, load_state, save_state

CUT, COSTS = "cut", "costs"
Found = TypeVar("Found")


@dataclass(frozen=True)
class LearnedHeads:
    """Outcome of gate training.

    Attributes:
        choice: What to keep.
        start: Units that the gates would have kept before they trained.
        trained: How training went.
        gates: Test-time gates by path at the end.
        trajectory: Test-time gates of all units, in the order of ``gates``, at every refresh.
        cost_share: Expected share of the cost of what is gated at the end, and what was aimed at.
        best: The validated choice that is kept, and what the others scored.
    """

    choice: Choice
    start: Choice
    trained: Trained
    gates: dict[str, list[float]]
    trajectory: list[list[float]]
    cost_share: tuple[float, float]
    best: BestGates

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return self.trained.as_dict() | {
            "gates": self.gates, "cost_share": self.cost_share[0], "target_share": self.cost_share[1], "history": self.trained.history,
            "trajectory": self.trajectory, "validation": self.best.losses, "kept_of_step": self.best.step,
            **({} if self.choice.sizes is None else {"sizes": self.choice.sizes}),
        }  # fmt: skip


@dataclass(frozen=True)
class GatedFFNs:
    """FFNs whose sizes are gated along with the heads.

    Attributes:
        parts: What is gated.
        start: Sizes to start from.
        target: Share of the dense cost of heads and FFNs together.
        multiple: Sizes are multiples of it.
    """

    parts: list[FFNPart]
    start: Sizes
    target: float
    multiple: int


@dataclass(frozen=True)
class TrainingRun:
    """Data, processes and work folder of one run.

    Attributes:
        options: How to train.
        examples: Training questions, none of them on a validation image.
        validation: Questions to stop early on.
        seed: Seed of every draw.
        processes: Who shares the work.
        progress: Shows the steps.
        work: Where state is kept; ``None``: nowhere.
    """

    options: TrainingOptions
    examples: list[Example]
    validation: list[Example]
    seed: int
    processes: Processes
    progress: Progress
    work: WorkFolder | None = None

    def learn_heads(
        self,
        vlm: VLM,
        sites: Sequence[AttentionSite],
        blocks: dict[str, Block],
        costs: Costs,
        target: float,
        prior: Sequence[float],
        compensation: Compensation,
        ffn: GatedFFNs | None = None,
        teacher: VLM | None = None,
    ) -> LearnedHeads:
        """Train gates on ``sites`` under ``target`` of their dense cost, starting from ``prior``, a percentile per unit.

        With ``ffn`` its sizes train along, and the target is its own. ``vlm`` is unchanged: a LoRA that trains along is left behind.
        ``teacher``: where ``vlm``, all gates open, is not what shall teach.
        """
        options, model = self.options, vlm.model
        # Gates that are open beyond doubt would never move, though FFNs may be worth trading a head for.
        aim = target if ffn is None else min(target, 1 - float(costs.unit.min()) / costs.dense)
        gates = HeadGates(list(sites), start_locations(torch.tensor(prior), options.gate_prior, costs, aim))
        start = Choice(binarise(HeadGates(list(sites), torch.tensor(prior)), costs, target))
        sizes = FFNGates([] if ffn is None else ffn.parts, None if ffn is None else ffn.start)
        multiple, target = (1, target) if ffn is None else (ffn.multiple, ffn.target)
        towers: set[TowerName] = {gated.tower for gated in (*sites, *sizes.parts)}
        extra: dict[str, Any] = {}
        wrapper = None
        with frozen(model), frozen((teacher or vlm).model), self._taught(teacher if options.distillation_weight else None) as taught:
            if options.gate_lora:
                assert vlm.architecture is not None
                wrapper, lora = add_lora(model, vlm.architecture, options.gate_lora, self.seed, towers)
                extra = {"extra": lora}
            elif not self._spreads and towers == {"text"}:
                extra = {"cache": VisionCache(vlm)}
            # While a copy is spread, the model itself waits in the host's memory: all that computes is where the copy is.
            with (
                self._spread(vlm, vlm) as working,
                gates.to(working.device).attached(working.model),
                sizes.to(working.device).attached(working.model),
            ):
                stage = GateStage(
                    working.model, gates, blocks, costs, target, options, lambda: self._validation(working), compensation=compensation,
                    agree=self.processes.agree, same=self.processes.same, seed=self.seed, ffn=sizes, multiple=multiple,
                    autocast=self._autocast(working), taught=taught, **extra,
                )  # fmt: skip
                if ffn is None and all(len(start.kept[site.path]) == site.num_units for site in sites):
                    self.progress.note("all heads stay under this budget: gates have nothing to choose, and do not train")
                    stage.steps = 0
                trained = self._train(stage, working, vlm, options.gate_images_per_step, rows_per_forward=1)
        if wrapper is not None:
            wrapper.unload()
        values = {path: z.tolist() for path, z in gates.by_site(deterministic_gate(gates.log_alpha.detach())).items()}
        expected = trained.history[-1]["cost"] if trained.history else 1.0
        return LearnedHeads(stage.best.choice, start, trained, values, stage.trajectory, (expected, target), stage.best)

    def best_cut(self, cut: Callable[[str], VLM], names: Sequence[str]) -> tuple[str, dict[str, tuple[float, ...]]]:
        """The name whose cut model has the least cross-entropy on validation questions; and accuracy and cross-entropy of all.

        What gates learn before the last refit need not hold behind it, so it is the cut models that compete. Not by right answers, of
        which models near the dense one have some to win or lose by chance alone.
        """
        figures = {name: self.processes.agree(*validated(cut(name), self.validation)) for name in names}
        return min(figures, key=lambda name: figures[name][1]), figures

    def remembered(self, name: str, find: Callable[[], Found]) -> Found:
        """What the first process finds; a resumed run goes on with what was found first. Anything that JSON has, without tuples."""
        file = None if self.work is None else self.work.file(name)
        known = self._known(file)
        if known is not None:
            return known[1]["found"]
        found = self.processes.same(find())
        if file is not None and self.processes.index == 0:
            save_state(file, {}, {"found": found})
        self.processes.wait()
        return found

    def _known(self, file: Path | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What the first process finds in ``file``: one that comes later might find what the first has written meanwhile."""
        return None if file is None else self.processes.same(load_state(file) if self.processes.index == 0 else None)

    def measured(self, like: Costs, measure: Callable[[], Costs]) -> Costs:
        """What the first process measures, so that all train on the same; a resumed run goes on with what was measured first.

        ``like``: costs of the same blocks and units.
        """
        file = None if self.work is None else self.work.file(COSTS)
        known = self._known(file)
        if known is not None:
            return replace(like, **known[0])
        found = self.processes.same(measure() if self.processes.index == 0 else like)  # alone: others would slow it down
        if file is not None and self.processes.index == 0:
            save_state(file, {"fixed": found.fixed, "unit": found.unit}, {})
        self.processes.wait()
        return found

    def recover(self, student: VLM, teacher: VLM, *, steps_before: int = 0) -> dict[str, Any]:
        """Train ``student`` in place and leave its best validated weights; returns figures for the report.

        Only the towers that its plan cuts train: one that :attr:`CompressionOptions.towers` leaves out stays as it is.
        ``steps_before``: updates of the gates, from which trackers count on.
        """
        options, wrapper = self.options, None
        assert teacher.architecture is not None
        towers = cut_towers(student.plan, teacher.architecture)
        with frozen(teacher.model), frozen(student.model):
            if options.recovery == "lora":
                wrapper, _ = add_lora(student.model, teacher.architecture, options.lora_rank, self.seed, towers)
            else:
                layer_weights(student.model, teacher.architecture, towers)
            with self._spread(teacher, teacher) as known, self._spread(student, teacher) as learner:
                parameters = {name: p for name, p in learner.model.named_parameters() if p.requires_grad}
                cache = None if self._spreads else VisionCache(teacher)
                fixed = not self._spreads and fixed_features(student.model, teacher.architecture)
                stage = RecoveryStage(
                    learner, known, parameters, self.validation, options, autocast=self._autocast(learner), cache=cache,
                    own_cache=VisionCache(student) if fixed else None, notify=self.progress.note, agree=self.processes.agree,
                )  # fmt: skip
                trained = self._train(stage, learner, teacher, options.images_per_step, steps_before)
                stage.keep_best_()
        if wrapper is not None:
            wrapper.merge_and_unload()
        for parameter in student.model.parameters():
            parameter.grad = None
        return trained.as_dict() | {"method": options.recovery, "best": stage.best.__dict__, "went_back": stage.went_back,
                                    "history": trained.history}  # fmt: skip

    def saved_cut(self, vlm: VLM) -> tuple[VLM, dict[str, Any]] | None:
        """The model that an interrupted run cut out of ``vlm``, and its report.

        Raises:
            CheckpointError: It is damaged.
        """
        if self.work is None or not (self.work.path / CUT).is_dir():
            return None
        folder = self.work.path / CUT
        try:
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            found = load(folder, device=str(vlm.device), dtype=vlm.model.dtype, trust_remote_code=vlm.trusted)
            return found.copy(), report  # weights of a file lie elsewhere in memory, on which the last bits of products may depend
        except (CheckpointError, OSError, ValueError) as error:
            raise CheckpointError(f"The cut model of an interrupted run is damaged ({error}). Delete {folder} to cut again.") from error

    def save_cut(self, vlm: VLM, report: dict[str, Any]) -> None:
        """Keep the cut model, so that a resumed run need not cut again."""
        if self.work is not None and self.processes.index == 0:
            save(vlm, self.work.path / CUT, extra=report, dtype=vlm.model.dtype)
        self.processes.wait()

    def check_shares(self, name: str) -> None:
        """Check that every process gets images of a step, and equally many where they share a model.

        Args:
            name: The option that says how many images a step has.

        Raises:
            InfoPruneError: They do not; says what to change.
        """
        count, images = self.processes.count, getattr(self.options, name)
        if images < count:
            raise InfoPruneError(f"{count} processes can't share {images} images per step; raise {name} (recipes take it).")
        if self.options.shard and images % count:
            raise InfoPruneError(
                f"Processes that share a model need equal parts of a step: {images} images can't be dealt out to {count}. Make {name} a "
                "multiple of that."
            )

    @property
    def told(self) -> dict[str, Any]:
        """Options, and what was validated on, for the report."""
        return {
            "options": asdict(self.options), "seed": self.seed, "processes": self.processes.count, "questions": len(self.examples),
            "validation": {"questions": len(self.validation), "fingerprint": fingerprint(self.validation)},
        }  # fmt: skip

    @property
    def _spreads(self) -> bool:
        return self.options.shard and self.processes.count > 1

    @contextmanager
    def _spread(self, vlm: VLM, dense: VLM) -> Iterator[VLM]:
        """``vlm``, or where the options ask for it a copy of it that is spread over the processes, by the layers of ``dense``."""
        if not self._spreads:
            yield vlm
            return
        assert dense.architecture is not None
        device = vlm.device
        with spread(vlm.model, dense.architecture.layers, device) as model:
            yield replace(vlm, model=model)

    @contextmanager
    def _taught(self, teacher: VLM | None) -> Iterator[Callable[[PackedBatch, Sequence[Path]], torch.Tensor] | None]:
        """The teacher's answer logits for a batch and the image of each row; ``None`` without a teacher."""
        if teacher is None:
            yield None
            return
        cache = None if self._spreads else VisionCache(teacher)
        with self._spread(teacher, teacher) as known:
            yield lambda batch, images: answer_logits(known.model, batch if cache is None else cache.replace(batch, images))

    def _validation(self, vlm: VLM) -> Iterator[tuple[PackedBatch, list[Path]]]:
        """Batches of the validation questions on the model's device, and the image of each row."""
        for batch, indices in batches(vlm.encoder, self.validation, share_prefix=can_share_prefix(vlm)):
            yield batch.to(vlm.device), images_of_rows(batch, [self.validation[index] for index in indices])

    def _autocast(self, vlm: VLM) -> bool:
        return wants_bfloat16(self.options.precision, vlm.device)

    def _train(
        self, stage: Any, vlm: VLM, dense: VLM, images_per_step: int, steps_before: int = 0, rows_per_forward: int = ROWS_PER_FORWARD
    ) -> Trained:
        """Train ``stage`` on ``vlm``, which may be compressed, in forward passes of as many rows as memory is meant to hold at most."""
        rows = rows_of(self.examples, self.options.questions_per_image, share_prefix=can_share_prefix(vlm))
        assert dense.architecture is not None
        # A model that is spread is spread for want of memory, and does not tell what it keeps.
        fitting = 1 if self._spreads or rows_per_forward == 1 else rows_that_fit(vlm, dense.architecture, rows, rows_per_forward)
        return train(
            stage, Stream(rows, images_per_step, self.seed), vlm.encoder, vlm.device, autocast=self._autocast(vlm),
            processes=self.processes, progress=self.progress, work=self.work, checkpoint_every=self.options.checkpoint_every,
            rows_per_forward=fitting, steps_before=steps_before,
        )  # fmt: skip


def _is_test(validation: str) -> bool:
    """Whether data for validation are the split that ``evaluate`` takes by default."""
    spec = parse_spec(validation)
    if spec.benchmark is None:
        return spec.split == "test"
    return spec.benchmark.split(spec.split, "validation") in (spec.benchmark.split(None, "test"), "test")


def split(
    encoder: PromptEncoder, pool: Sequence[Example], options: TrainingOptions, seed: int, progress: Progress, *, skip_bad: bool = False
) -> tuple[list[Example], list[Example]]:
    """Training and validation questions; no image is in both.

    Raises:
        DataError: The validation data can't be read or have all images, or there is a single image only.
    """
    if options.validation is None:
        train_part, validation = hold_out(pool, seed)
    else:
        validation = load_fitting(encoder, options.validation, default_split="validation", skip_bad=skip_bad, notify=progress.note)
        if _is_test(options.validation):
            progress.note(
                f"Warning: {options.validation} is what one tests on by default. It chooses weights here, so figures on it are no "
                "independent test."
            )
        shared = same_images([e.image for e in pool], [e.image for e in validation])
        train_part = [example for example in pool if example.image not in shared]
        if shared:
            progress.note(
                f"left out {len(pool) - len(train_part):,} questions on {len(shared):,} training images that are in the validation data"
            )
        if pool and not train_part:
            raise DataError(f"All training images are in {options.validation}, too. Give other --validation data, or none.")
    groups: dict[Path, list[Example]] = {e.image: [] for e in subset(validation, options.validation_questions, seed=seed)}
    for example in validation:  # whole images, whose questions share their tokens, but for the last
        if example.image in groups:
            groups[example.image].append(example)
    return train_part, [example for group in groups.values() for example in group][: options.validation_questions]
