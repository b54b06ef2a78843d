"""What the tables are made with: result files, Markdown, and where figures come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def source(name: str, rows: list[dict[str, Any]] | None = None) -> str:
    """Circumstances of a result file, or of some rows; those made in several runs say their own command, commit and processor."""
    meta = load(name)["meta"]
    own = load(name)["rows"] if rows is None else rows
    told = {key: list(dict.fromkeys(row[key] for row in own if key in row)) or [meta[key]] for key in ("command", "commit", "hardware")}
    commands, commits, hardware = "; ".join(told["command"]), ", ".join(told["commit"]), ", ".join(told["hardware"])
    versions = ", ".join(f"{key} {value}" for key, value in meta["versions"].items())
    return f"\n\n`{commands}`, commit {commits}, {meta['date']}; {hardware}, {meta['threads']} threads; {versions}."


def drop(row: dict[str, Any]) -> str:
    """Paired drop with its interval."""
    return f"{row['drop_points']:.2f} [{row['drop_ci95'][0]:.2f}, {row['drop_ci95'][1]:.2f}]"
