"""``infoprune families``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from infoprune.cli.console import console, print_json


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("families")(families)


def families(json_output: Annotated[bool, typer.Option("--json", help="Print the table as JSON to standard output.")] = False) -> None:
    """List the supported model families and the towers that each may hold."""
    import transformers

    from infoprune.families import FAMILIES

    known = transformers.CONFIG_MAPPING
    rows = [
        {
            "family": name,
            "vision": {kind: _kinds(tower) for kind, tower in family.vision_towers.items()},
            "text": {kind: _kinds(tower) for kind, tower in family.text_towers.items()},
            "shares_prefix": family.shares_prefix,
            "available": name in known,
        }
        for name, family in FAMILIES.items()
    ]
    if json_output:
        print_json({"transformers": transformers.__version__, "families": rows})
        return
    table = Table(title=f"families, with Transformers {transformers.__version__}")
    for column in ("family (model_type)", "vision towers", "language models"):
        table.add_column(column)
    for row in rows:
        name = row["family"] if row["available"] else f"{row['family']} (needs another version of Transformers)"
        table.add_row(name, *(", ".join(row[tower]) for tower in ("vision", "text")))
    console.print(table)


def _kinds(tower: Any) -> dict[str, str]:
    """Which attention and which FFN a tower has."""
    kinds = (tower, *tower.others)
    attention = ("cross" if kind.attention.startswith("cross") else "self, fused projections" if kind.qkv else "self" for kind in kinds)
    return {"attention": ", ".join(dict.fromkeys(attention)), "ffn": "gated" if tower.gate else "plain"}
