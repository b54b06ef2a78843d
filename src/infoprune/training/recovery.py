"""Recovery: a compacted model learns back what it lost, from answers and from the dense model, and stops on data it did not train on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from infoprune.architecture import Architecture, TowerName
from infoprune.data import Example
from infoprune.errors import InfoPruneError
from infoprune.evaluation.quality import can_share_prefix
from infoprune.model import VLM
from infoprune.packing import PackedBatch, answer_logits, batches
from infoprune.plan import CompressionPlan
from infoprune.training import objective
from infoprune.training.data import VisionCache, images_of_rows
from infoprune.training.loop import Terms, Totals, check_finite, one_cycle
from infoprune.training.options import TrainingOptions
from infoprune.training.sharding import as_part, whole

LEAST_MAGNITUDE = 1e-3  # Adafactor's epsilon_2: what starts at zero must be able to leave it
NORMAL_MEDIAN = 0.6745  # median of |x| for a standard normal x
BOTH_TOWERS: frozenset[TowerName] = frozenset(("vision", "text"))
COLLAPSE = 2.0, 0.1  # times the best validation's cross-entropy, and nats beyond that: training that ends there has lost its way
DEPTHS = 3  # hidden states are compared after the last layer and at this many minus one evenly spaced layers before it


class Hidden:
    """Residual streams after a few language layers, taken along a forward pass."""

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        layers = [site.path.rpartition(".")[0] for site in architecture.attention if site.tower == "text"]
        places = sorted({round((k + 1) * len(layers) / DEPTHS) - 1 for k in range(DEPTHS)} - {-1})
        self.modules = [model.get_submodule(layers[place]) for place in places]

    @contextmanager
    def taken(self) -> Iterator[list[torch.Tensor]]:
        """The list that a forward pass within the block fills."""
        held: list[torch.Tensor] = []

        def hold(module: nn.Module, args: Any, output: Any) -> None:
            held.append(output[0] if isinstance(output, tuple) else output)

        handles = [module.register_forward_hook(hold) for module in self.modules]
        try:
            yield held
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class Validated:
    """What a validation found: accuracy in percent, cross-entropy per answer token, and the loss, with all terms of training."""

    accuracy: float
    cross_entropy: float
    loss: float


@dataclass
class Best:
    """The best validation so far: the one with the least loss.

    Not the one with most right answers: models that answer nearly all of a task have answers to win or lose by chance alone, and may be
    far from the dense model in everything else.
    """

    accuracy: float = -1.0
    cross_entropy: float = float("inf")
    loss: float = float("inf")
    step: int = -1
    worse: int = 0

    def update(self, found: Validated, step: int) -> bool:
        """Take a validation into account; whether it is the best."""
        if found.loss < self.loss:
            self.accuracy, self.cross_entropy, self.loss, self.step, self.worse = *astuple(found), step, 0
            return True
        self.worse += 1
        return False


class RecoveryStage:
    """The stage that trains a compacted model, the dense one being its teacher."""

    name = "recovery"

    def __init__(
        self, student: VLM, teacher: VLM, parameters: dict[str, nn.Parameter], validation: Sequence[Example], options: TrainingOptions,
        *, autocast: bool, cache: VisionCache | None = None, own_cache: VisionCache | None = None,
        notify: Callable[[str], None] = lambda message: None, agree: Callable[..., tuple[float, ...]] = lambda *values: values,
    ) -> None:  # fmt: skip
        """Take what is trained, and on what.

        ``agree`` makes figures the same on all processes. ``cache`` is the teacher's; ``own_cache`` the student's, if its image features
        do not change (:func:`fixed_features`).
        """
        assert teacher.architecture is not None
        self.student, self.teacher, self.parameters, self.validation, self.options = student, teacher, parameters, validation, options
        self.autocast, self.notify, self.agree = autocast, notify, agree
        self.went_back: list[int] = []
        self.steps = options.recovery_steps
        scaled = relative_groups(parameters) if options.recovery == "full" else list(parameters.values())
        self.optimizer = torch.optim.AdamW(scaled, lr=options.rate(options.recovery), weight_decay=0.0)
        self.cache, self.own_cache = cache, own_cache
        self.best = Best()
        self.best_parameters: dict[str, torch.Tensor] = {}
        self._hidden = [Hidden(vlm.model, teacher.architecture) for vlm in (student, teacher)] if options.hidden_weight else []

    def learning_rate(self, step: int) -> float:
        """One cycle, of half the height after every time that training went back."""
        return self.options.rate(self.options.recovery) * one_cycle(step, self.steps) * 0.5 ** len(self.went_back)

    def begin(self, step: int) -> None:
        """The first validation is of the model as it was cut."""
        if step == 0:
            self.validate(step)

    def data_terms(self, batch: PackedBatch, rows: Sequence[Sequence[Example]], totals: Totals, place: int) -> Terms:
        """Cross-entropy, and distillation of logits and hidden states."""
        return self._terms(batch, [row[0].image for row in rows], totals)[0]

    def _terms(self, batch: PackedBatch, images: Sequence[Path], totals: Totals) -> tuple[Terms, torch.Tensor]:
        """The terms, and the student's logits."""
        o = self.options
        with self._take(0) as seen:
            logits = answer_logits(self.student.model, batch if self.own_cache is None else self.own_cache.replace(batch, images))
        terms: Terms = {"cross_entropy": (o.cross_entropy_weight, objective.cross_entropy(logits, batch.targets) / totals.targets)}
        if not (o.distillation_weight or o.hidden_weight):
            return terms, logits
        with torch.no_grad(), self._take(1) as known:
            known_images = batch if self.cache is None else self.cache.replace(batch, images)
            taught = answer_logits(self.teacher.model, known_images)
        if o.distillation_weight:
            value = objective.distillation(logits, taught, o.distillation_temperature)
            terms["distillation"] = (o.distillation_weight, value / totals.targets)
        if o.hidden_weight:
            terms["hidden"] = (o.hidden_weight, objective.hidden_distance(seen, known, batch.valid) / totals.tokens)
        return terms, logits

    @contextmanager
    def _take(self, which: int) -> Iterator[list[torch.Tensor]]:
        if not self._hidden:
            yield []
            return
        with self._hidden[which].taken() as held:
            yield held

    def shared_terms(self, step: int) -> Terms:
        """None."""
        return {}

    def end(self, step: int, values: dict[str, float]) -> bool:
        """Validate now and then; go back to the best weights from a collapse; stop when patience is at its end."""
        if (step + 1) % self.options.evaluate_every and step + 1 < self.steps:
            return False
        found = self.validate(step + 1)
        values |= {f"validation_{name}": value for name, value in asdict(found).items()}
        factor, beyond = COLLAPSE
        if found.cross_entropy > factor * self.best.cross_entropy + beyond and step + 1 < self.steps:
            self._go_back_(step + 1, found.cross_entropy)
        return bool(self.options.patience) and self.best.worse >= self.options.patience

    def _go_back_(self, step: int, cross_entropy: float) -> None:
        """Start again from the best weights at half the rate.

        Models with much removed stand at cliffs, e.g. of a massive activation that attention rests on: one step beyond, and many more
        do not lead back.
        """
        self.keep_best_()
        self.optimizer.state.clear()  # its moments are those of the way down
        self.went_back.append(step)
        self.notify(
            f"recovery had lost its way after {step} steps (validation cross-entropy {cross_entropy:.3g}, {self.best.cross_entropy:.3g} "
            f"at its best, after {self.best.step}); it goes on from there at half the rate"
        )

    @torch.no_grad()
    def validate(self, step: int) -> Validated:
        """Look at the validation questions; keeps the best weights."""
        vlm = self.student
        accuracy, targets, tokens = Accuracy(), 0, 0
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for batch, indices in batches(vlm.encoder, self.validation, share_prefix=can_share_prefix(vlm)):
            images = images_of_rows(batch, [self.validation[index] for index in indices])
            moved = batch.to(vlm.device)
            with torch.autocast(vlm.device.type, torch.bfloat16, enabled=self.autocast):
                terms, logits = self._terms(moved, images, Totals(1, 1))
            accuracy.add(logits, moved)
            targets, tokens = targets + len(moved.targets), tokens + int(moved.valid.sum())
            for name, (weight, value) in terms.items():
                sums[name], weights[name] = sums.get(name, 0.0) + float(value), weight
        means = {name: sums[name] / (tokens if name == "hidden" else targets) for name in sums}
        loss = sum(weight * means[name] for name, weight in weights.items())
        found = Validated(*self.agree(accuracy.percent, means["cross_entropy"], loss))
        check_finite(self.name, step, found.loss)
        if self.best.update(found, step):
            self.best_parameters = {name: _set_aside(p) for name, p in self.parameters.items()}
        return found

    @torch.no_grad()
    def keep_best_(self) -> None:
        """Put the best validated weights in place."""
        for name, value in self.best_parameters.items():
            self.parameters[name].copy_(value)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The best weights, how good they were, and when training went back to them."""
        return self.best_parameters, {"best": dict(self.best.__dict__), "went_back": self.went_back}

    def restore(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """See :meth:`state`."""
        self.best, self.went_back = Best(**meta["best"]), list(meta["went_back"])
        self.best_parameters = {name: _set_aside(as_part(value, self.parameters[name])) for name, value in tensors.items()}


def _set_aside(parameter: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, since the device's is what training runs out of; parts of a spread model stay spread."""
    value = parameter.detach()
    return value.clone() if isinstance(value, DTensor) else value.to("cpu", copy=True)


@dataclass
class Accuracy:
    """Right answers among those counted so far: teacher-forced, a question at a time."""

    right: int = 0
    total: int = 0

    def add(self, logits: torch.Tensor, batch: PackedBatch) -> None:
        """Count a batch by its logits (targets, vocabulary)."""
        wrong = torch.zeros(batch.num_questions, device=logits.device)
        wrong.index_add_(0, batch.question, (logits.argmax(-1) != batch.targets).float())
        self.right, self.total = self.right + int((wrong == 0).sum()), self.total + batch.num_questions

    @property
    def percent(self) -> float:
        """Percent."""
        return 100 * self.right / self.total


@torch.no_grad()
def validated(vlm: VLM, questions: Sequence[Example]) -> tuple[float, float]:
    """Accuracy in percent and cross-entropy per answer token on ``questions``, teacher-forced."""
    accuracy, loss, targets = Accuracy(), 0.0, 0
    for batch, _ in batches(vlm.encoder, questions, share_prefix=can_share_prefix(vlm)):
        moved = batch.to(vlm.device)
        logits = answer_logits(vlm.model, moved)
        accuracy.add(logits, moved)
        loss, targets = loss + float(objective.cross_entropy(logits, moved.targets)), targets + len(moved.targets)
    return accuracy.percent, loss / targets


def cut_towers(plan: CompressionPlan | None, architecture: Architecture) -> frozenset[TowerName]:
    """The towers in which ``plan`` cuts anything, which are those that recovery trains; both where it cuts nothing, or is not known."""
    cut: set[str] = set() if plan is None else {*plan.heads, *plan.ffn}
    return frozenset(site.tower for site in (*architecture.attention, *architecture.ffn) if site.path in cut) or BOTH_TOWERS


def layer_weights(model: nn.Module, architecture: Architecture, towers: Collection[TowerName] = BOTH_TOWERS) -> dict[str, nn.Parameter]:
    """Parameters of all layers of ``towers`` and of the projector, made trainable; the rest is frozen.

    Embeddings of words, patches and positions and the language head stay as they are: nothing was cut there, words that no training
    data shows must keep their meaning, and the towers are most sensitive to their first map. So do the biases of keys where positions
    do not turn them: they add the same to all scores of a query, softmax does not see it, and Adam would make steps of rounding errors.
    """
    layers = tuple({f"{site.path.rpartition('.')[0]}." for site in architecture.attention if site.tower in towers})
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    inside = (*layers, *(f"{path}." for path in architecture.family.projector))
    paths = {"vision": architecture.family.vision, "text": architecture.family.text}
    unseen = {f"{s.path}.{s.names.key}.bias" for s in architecture.attention if not turns_keys(model.get_submodule(paths[s.tower]))}
    trainable = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(inside) and name not in unseen | embeddings)
        if parameter.requires_grad:
            trainable[name] = parameter
    return trainable


def turns_keys(tower: Any) -> bool:
    """Whether a tower has rotary positions, which turn a key's bias along with the key."""
    return getattr(tower.config, "rope_parameters", None) is not None


def relative_groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Optimiser groups whose rates are relative: each tensor's is the stage's rate times the tensor's :func:`typical_magnitude`.

    Adam moves every entry by about its rate, whatever the tensor's scale, and the scales of towers differ: a rate that suits one can
    be far too large for the other. After the relative step of Shazeer & Stern, "Adafactor" (arXiv 1804.04235), section 8.
    """
    return [{"params": [parameter], "scale": typical_magnitude(parameter)} for parameter in parameters.values()]


@torch.no_grad()
def typical_magnitude(tensor: torch.Tensor) -> float:
    """Standard deviation of a normal distribution around zero with the entries' median magnitude, at least :data:`LEAST_MAGNITUDE`.

    Adafactor takes the root mean square; a few massive entries, of which biases and down projections have many, rule that one.
    """
    return max(LEAST_MAGNITUDE, float(whole(tensor).abs().float().median()) / NORMAL_MEDIAN)


def require_peft() -> None:
    """Check that LoRA can be used.

    Raises:
        InfoPruneError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise InfoPruneError("LoRA needs peft: pip install peft")


def fixed_features(model: nn.Module, architecture: Architecture) -> bool:
    """Whether training leaves what the language model is told about images as it is: nothing outside that model trains.

    A vision tower that stays is not enough: the features that :class:`infoprune.training.data.VisionCache` keeps are, in most families,
    the projector's output, and full recovery trains the projector.
    """
    inside = f"{architecture.family.text}."
    return all(name.startswith(inside) for name, parameter in model.named_parameters() if parameter.requires_grad)


def add_lora(
    model: Any, architecture: Architecture, rank: int, seed: int, towers: Collection[TowerName] = BOTH_TOWERS
) -> tuple[Any, dict[str, nn.Parameter]]:
    """LoRA on every linear of every block of ``towers``, in place; merge with ``merge_and_unload`` of the returned wrapper.

    Raises:
        InfoPruneError: peft is not installed.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    blocks = tuple(f"{site.path}." for site in (*architecture.attention, *architecture.ffn) if site.tower in towers)
    targets = [name for name, module in model.named_modules() if name.startswith(blocks) and isinstance(module, nn.Linear)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapper = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, bias="none"))
    return wrapper, {name: p for name, p in model.named_parameters() if "lora_" in name}
