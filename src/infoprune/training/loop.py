"""The one training loop: gates and recovery are stages of it. Resumable at any step, the same on one process and on many.

Everything random is a function of the seed and the step, so a stage's state is its step, its parameters, Adam's moments and what the
stage itself keeps. Processes share a step's rows; their terms add up to the mean over all rows, and so do their gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from infoprune.data import Example
from infoprune.errors import CalibrationError, InfoPruneError
from infoprune.packing import PackedBatch, pack
from infoprune.progress import Progress
from infoprune.prompts import PromptEncoder
from infoprune.training.data import Stream
from infoprune.training.sharding import as_part, whole
from infoprune.training.state import WorkFolder, load_state, optimizer_tensors, optimizer_updates, restore_optimizer_, save_state

CLIP_NORM = 1.0
ROWS_PER_FORWARD = 8  # at most
NOT_STARTED = "The experiment tracker could not be started: {} Set it up, or leave out --tracker."
GLOO_SECONDS = 0.5  # its threads want a millisecond; processors may be busy
Terms = dict[str, tuple[float, torch.Tensor]]  # by name: coefficient and value
Found = TypeVar("Found")


@dataclass(frozen=True)
class Totals:
    """Denominators of a step, over all processes: answer tokens and real tokens."""

    targets: int
    tokens: int


class Stage(Protocol):
    """What the loop trains."""

    name: str
    steps: int
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    def learning_rate(self, step: int) -> float:
        """Rate of update ``step``."""
        ...

    def begin(self, step: int) -> None:
        """Before the forward passes of a step."""
        ...

    def data_terms(self, batch: PackedBatch, rows: Sequence[Sequence[Example]], totals: Totals, place: int) -> Terms:
        """Terms that depend on data: this batch's share of the mean over the step. ``place``: that of its first row in the step."""
        ...

    def shared_terms(self, step: int) -> Terms:
        """Terms that don't, equal on all processes."""
        ...

    def end(self, step: int, values: dict[str, float]) -> bool:
        """After an update: may add to ``values``, says whether to stop."""
        ...

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What else a resumed run needs."""
        ...

    def restore(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Put :meth:`state` back; parameters are in place already."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """Whether the trackers can be used here; Accelerate leaves out without a word what is not installed.

    Raises:
        InfoPruneError: Some are not installed; says which.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    if missing := [name for name in names if name not in available]:
        raise InfoPruneError(
            f"Trackers that are not installed: {', '.join(missing)}. pip install {' '.join(missing)}, or leave out --tracker."
        )


@dataclass
class Processes:
    """The processes that share the work; one, unless started with ``accelerate launch``.

    Attributes:
        accelerator: Of Hugging Face Accelerate; ``None`` for a single process without trackers.
    """

    accelerator: Any = None

    @classmethod
    def current(
        cls, device: torch.device, trackers: Sequence[str] = (), logs: Path | None = None, config: dict[str, Any] | None = None
    ) -> Processes:
        """Join the processes that the launcher started; call :meth:`end` when they have done their work.

        Args:
            device: That of the model.
            trackers: Names of experiment trackers, see :func:`check_trackers`.
            logs: Folder of the trackers that write files.
            config: Hyperparameters for the trackers, a flat mapping to values of simple types.

        Raises:
            InfoPruneError: A strategy that training does not support, or a tracker that does not start.
        """
        from accelerate import Accelerator, DistributedType

        try:
            accelerator = Accelerator(cpu=device.type == "cpu", log_with=list(trackers) or None, project_dir=logs)
        except (ImportError, ValueError) as error:
            raise InfoPruneError(f"Accelerate could not start: {error}") from error
        supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if accelerator.distributed_type not in supported:
            raise InfoPruneError(
                f"Training does not run under {accelerator.distributed_type.value}. Use a plain multi-process launch; --shard spreads a "
                "large model over its processes."
            )
        if trackers:
            try:
                accelerator.init_trackers("infoprune", config)
            except Exception as error:  # each tracker has its own kinds: nobody logged in, an address that nobody answers
                raise InfoPruneError(NOT_STARTED.format(error)) from error
        return cls(accelerator)

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    @property
    def index(self) -> int:
        """Which one this is."""
        return 0 if self.accelerator is None else self.accelerator.process_index

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over processes."""
        if self.count == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum").to(values.device)

    def agree(self, *values: float) -> tuple[float, ...]:
        """What the first of them found: decisions must be the same, and their last bits need not be."""
        if self.count == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return tuple(self.sum(found if self.index == 0 else torch.zeros_like(found)).tolist())

    def same(self, value: Found) -> Found:
        """What the first of them has."""
        if self.count == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, device=self.accelerator.device)
        return held[0]

    def same_weights_(self, model: nn.Module) -> None:
        """Those of the first of them: closed forms on other processors differ in their last bits."""
        if self.count > 1:
            with torch.no_grad():
                for tensor in model.state_dict(keep_vars=True).values():
                    held = tensor.detach().to(self.accelerator.device).contiguous()
                    torch.distributed.broadcast(held, 0)
                    tensor.data.copy_(held)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    def log(self, values: dict[str, float], step: int) -> None:
        """To the trackers."""
        if self.accelerator is not None:
            self.accelerator.log(values, step=step)

    def end(self) -> None:
        """Let the trackers finish: what they still hold is written, and the run counts as ended."""
        for tracker in () if self.accelerator is None else self.accelerator.trackers:
            tracker.finish()  # not end_training, which would end the launcher's process group too: the caller may go on with it


def leave_processes() -> None:
    """At a program's very end: leave the group that the launcher started, if this process is in one.

    Gloo's threads may still hold tensors whose release needs the interpreter; if it ends first, they abort a process whose work is done
    (github.com/pytorch/pytorch/pull/179291). Nothing joins these threads, but while this one waits, they get what they need.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(GLOO_SECONDS)


@dataclass
class Trained:
    """What a stage's training was like.

    Attributes:
        history: Per step: the terms, the loss, and what the stage adds.
        questions: Questions seen.
        seconds: Wall time, resumed runs included.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    questions: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        rate = self.questions / self.seconds if self.seconds else None
        return {"steps": len(self.history), "questions": self.questions, "seconds": self.seconds, "questions_per_second": rate}


def train(
    stage: Stage,
    stream: Stream,
    encoder: PromptEncoder,
    device: torch.device,
    *,
    autocast: bool,
    processes: Processes,
    progress: Progress,
    work: WorkFolder | None = None,
    checkpoint_every: int = 50,
    rows_per_forward: int = ROWS_PER_FORWARD,
    steps_before: int = 0,
) -> Trained:
    """Train ``stage`` to its end, from where its state in ``work`` stopped.

    Trackers see one step that rises over all stages: ``steps_before`` is how many updates earlier stages have made.

    Raises:
        CalibrationError: The loss became NaN or infinite; the last state is kept.
        CheckpointError: The state can't be read or written.
    """
    result, first = _resume(stage, work)
    started = time.perf_counter() - result.seconds
    with progress.task(f"training {stage.name}", stage.steps) as advance:
        advance(first)
        for step in range(first, stage.steps):
            values, questions = _update(stage, stream, encoder, device, step, autocast, processes, rows_per_forward)
            stop = stage.end(step, values)
            result.history.append(values)
            result.questions += questions
            result.seconds = time.perf_counter() - started
            processes.log({f"{stage.name}/{name}": value for name, value in values.items()}, steps_before + step)
            progress.status({name: values[name] for name in values if name != "gradient"})
            advance(1)
            last = stop or step + 1 == stage.steps
            if work is not None and (last or (step + 1) % checkpoint_every == 0):
                _save(stage, work if processes.index == 0 else None, step + 1, last, result)
            if stop:
                break
    processes.wait()
    return result


def _resume(stage: Stage, work: WorkFolder | None) -> tuple[Trained, int]:
    held = load_state(work.file(stage.name)) if work is not None else None
    if held is None:
        return Trained(), 0
    tensors, meta = held
    with torch.no_grad():
        for name, parameter in stage.parameters.items():
            parameter.copy_(as_part(tensors[f"parameter.{name}"], parameter))
    restore_optimizer_(stage.optimizer, stage.parameters, tensors, meta["updates"])
    stage.restore({n.removeprefix("stage."): t for n, t in tensors.items() if n.startswith("stage.")}, meta["stage"])
    return Trained(meta["history"], meta["questions"], meta["seconds"]), stage.steps if meta["finished"] else meta["step"]


def _save(stage: Stage, work: WorkFolder | None, step: int, finished: bool, result: Trained) -> None:
    """Write the state, on the process that has ``work``; all of them put it together, tensor by tensor."""
    own, meta = stage.state()
    tensors = {f"parameter.{name}": value for name, value in stage.parameters.items()} | {f"stage.{n}": t for n, t in own.items()}
    tensors |= optimizer_tensors(stage.optimizer, stage.parameters)
    for name in list(tensors):  # in the host's memory: what is spread is too large for one device
        value = whole(tensors[name])
        tensors[name] = value.cpu() if work is not None else value.new_empty(0)
        del value
    if work is None:
        return
    run = {
        "updates": optimizer_updates(stage.optimizer),
        "history": result.history,
        "questions": result.questions,
        "seconds": result.seconds,
    }
    save_state(work.file(stage.name), tensors, {"step": step, "finished": finished, "stage": meta, **run})


def _update(
    stage: Stage, stream: Stream, encoder: PromptEncoder, device: torch.device, step: int, autocast: bool, processes: Processes, size: int
) -> tuple[dict[str, float], int]:
    rows = stream.step(step)
    own = rows[processes.index :: processes.count]
    parts = [own[i : i + size] for i in range(0, len(own), size)]
    batches = [pack(encoder, part) for part in parts]  # on the device one by one: what a step has of pixels and masks need not fit
    counts = torch.tensor([sum(len(b.targets) for b in batches), sum(int(b.valid.sum()) for b in batches)], device=device)
    totals = Totals(*(int(v) for v in processes.sum(counts)))
    for group in stage.optimizer.param_groups:
        group["lr"] = stage.learning_rate(step) * group.get("scale", 1.0)
    stage.optimizer.zero_grad()
    stage.begin(step)
    sums: dict[str, torch.Tensor] = {}
    for number, (batch, part) in enumerate(zip(batches, parts, strict=True)):
        place = processes.index + number * size * processes.count
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            terms = stage.data_terms(batch.to(device), part, totals, place)
        _backward(terms, sums)
    shared = stage.shared_terms(step)
    _backward({name: (weight / processes.count, value) for name, (weight, value) in shared.items()}, {})
    _sum_gradients(stage.parameters, processes)
    norm = nn.utils.clip_grad_norm_(list(stage.parameters.values()), CLIP_NORM)
    reduced = processes.sum(torch.stack(list(sums.values())))
    values = {name: float(value) for name, value in zip(sums, reduced, strict=True)}
    values |= {name: float(value.detach()) for name, (_, value) in shared.items()} | {"gradient": float(whole(norm))}
    if not torch.isfinite(torch.tensor(list(values.values()))).all():
        raise CalibrationError(f"Training {stage.name} met NaN or infinity at step {step}: {values}. Lower its learning rate.")
    stage.optimizer.step()
    return values, sum(len(row) for row in rows)


def _backward(terms: Terms, sums: dict[str, torch.Tensor]) -> None:
    loss = sum((weight * value for weight, value in terms.values() if weight), torch.zeros(()))
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        loss.backward()
    for name, (_, value) in terms.items():
        sums[name] = sums.get(name, 0.0) + value.detach()


def _sum_gradients(parameters: dict[str, nn.Parameter], processes: Processes) -> None:
    if processes.count == 1:
        return
    for parameter in parameters.values():
        if isinstance(parameter, DTensor):  # summed while the layer's backward pass ran
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(processes.sum(parameter.grad))


def check_finite(stage: str, step: int, loss: float) -> None:
    """A loss on validation questions must be a number: what is not would be worse than nothing, and better than nothing.

    Raises:
        CalibrationError: It is not.
    """
    if not math.isfinite(loss):
        raise CalibrationError(f"Validating {stage} at step {step} found a loss of {loss}. Lower its learning rate, or train in float32.")


def one_cycle(step: int, steps: int, warmup: float = 0.1) -> float:
    """Linear rise over ``warmup`` of the steps, then a cosine to zero; the share of the peak rate."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - rise) / max(1, steps - rise)))))


def wants_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to compute under bfloat16 autocast; ``auto``: where the hardware multiplies it faster than float32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device.type == "cpu" and any(check() for check in checks if check is not None)
