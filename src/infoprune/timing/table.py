"""The cost table of a machine: measured seconds over a size, by what was measured; kept as JSON, and never believed unchecked."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from infoprune._version import __version__

TABLE_VERSION = 2
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Curve(_Strict):
    """Seconds over a size, a rank or a number of units: piecewise linear, constant beyond its ends.

    Attributes:
        sizes: Increasing.
        seconds: As many, never decreasing.
    """

    sizes: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    seconds: tuple[Seconds, ...]

    @model_validator(mode="after")
    def _check(self) -> Curve:
        if list(self.sizes) != sorted(set(self.sizes)) or list(self.seconds) != sorted(self.seconds):
            raise ValueError("sizes must increase, and seconds must not decrease")
        if len(self.sizes) != len(self.seconds):
            raise ValueError("there must be as many seconds as sizes")
        return self

    @classmethod
    def through(cls, sizes: Sequence[int], measured: Sequence[float]) -> Curve:
        """The never decreasing curve next to what was measured, in least squares: more work takes no less time, whatever noise says."""
        return cls(sizes=tuple(sizes), seconds=tuple(never_decreasing(measured)))

    def scaled(self, factor: float) -> Curve:
        """``factor`` times as many seconds."""
        return Curve(sizes=self.sizes, seconds=tuple(factor * value for value in self.seconds))

    def at(self, size: int) -> float:
        """Seconds at ``size``."""
        after = bisect_right(self.sizes, size)
        if after in (0, len(self.sizes)):
            return self.seconds[0 if after == 0 else -1]
        low, high = self.sizes[after - 1], self.sizes[after]
        below, above = self.seconds[after - 1], self.seconds[after]
        return below + (above - below) * (size - low) / (high - low)


def never_decreasing(values: Sequence[float]) -> list[float]:
    """Isotonic regression: those next to ``values`` in least squares (pool adjacent violators, Barlow et al. 1972)."""
    pools: list[tuple[float, int]] = []  # mean and number of values
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, number = pools.pop()
            mean, count = (mean * count + before * number) / (count + number), count + number
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


class Machine(_Strict):
    """What times depend on, beside what is timed."""

    processor: str
    threads: int
    device: str
    torch: str
    transformers: str
    infoprune: str
    dtype: str

    @classmethod
    def here(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """This one."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
        return cls(processor=name, threads=torch.get_num_threads(), device=device.type, torch=torch.__version__, dtype=str(dtype),
                   transformers=transformers.__version__, infoprune=__version__)  # fmt: skip


def _processor() -> str:
    if sys.platform == "darwin":  # where platform only knows the architecture
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return asked.stdout.strip() or platform.machine()
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = ""
    return named_in(told) or platform.processor() or platform.machine()


def named_in(cpuinfo: str) -> str:
    """The processor that Linux's ``/proc/cpuinfo`` tells of: its name, or on ARM, where it has none, the numbers of maker and part."""
    pairs = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())]
    names = [value for key, value in pairs if key == "model name"]
    return (
        names[0] if names else ", ".join(dict.fromkeys(f"{key} {value}" for key, value in pairs if key in ("CPU implementer", "CPU part")))
    )


class Wanted(_Strict):
    """What a table must hold to be of use: which machine and model, over which work, and the sizes of every curve by its name."""

    machine: Machine
    model: str
    vision_tokens: int
    prompt_tokens: int
    answer_tokens: int
    sizes: dict[str, tuple[int, ...]]

    @cached_property
    def digest(self) -> str:
        """Names the file."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class CostTable(_Strict):
    """Measured seconds: of the dense model from prompt to answer, and of parts of it over their sizes.

    Attributes:
        version: Format version.
        wanted: What it was measured for.
        end_to_end: Seconds of the dense model.
        curves: By name.
    """

    version: Literal[2] = TABLE_VERSION
    wanted: Wanted
    end_to_end: Seconds
    curves: dict[str, Curve]

    @model_validator(mode="after")
    def _check(self) -> CostTable:
        if {name: curve.sizes for name, curve in self.curves.items()} != self.wanted.sizes:
            raise ValueError("the curves are not those that were wanted")
        return self


def read_table(folder: Path, wanted: Wanted) -> CostTable | None:
    """The table for ``wanted`` in ``folder``; ``None`` where there is none, or none that can be trusted: it is measured again then."""
    try:
        found = CostTable.model_validate_json((folder / f"{wanted.digest}.json").read_bytes())
    except (OSError, ValidationError):
        return None
    return found if found.wanted == wanted else None


def write_table(folder: Path, table: CostTable) -> None:
    """Keep ``table``, written aside and renamed; where that can't be done, the next run measures again."""
    target = folder / f"{table.wanted.digest}.json"
    aside = target.with_suffix(f".{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(table.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        aside.replace(target)
    except OSError:
        with suppress(OSError):
            aside.unlink()
