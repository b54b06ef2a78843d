"""What was tested for each supported model family: runs the shared test suite and writes what its capability tests found.

    python benchmarks/families.py

Models are tiny and random, one per family and combination of towers, with the family's own processor where it needs no torchvision.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import log, write
from infoprune.families import FAMILIES

ROOT = Path(__file__).parents[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "capabilities.json"
        suites = ["tests/test_families.py", "tests/test_export.py"]
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *suites, "--capabilities", str(found)]
        code = subprocess.run(command, cwd=ROOT, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        if not found.is_file():
            sys.exit(f"The suite did not run to its end (status {code}).")
        records = json.loads(found.read_text())
    missing = sorted(set(FAMILIES) - {record["family"] for record in records.values()})
    log(f"{len(records)} models of {len(FAMILIES)} families, suite status {code}")
    if missing:
        sys.exit(f"These families were not tested: {', '.join(missing)}.")
    write("families", [{"model": name, **record} for name, record in records.items()])


if __name__ == "__main__":
    main()
