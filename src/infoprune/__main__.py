"""``python -m infoprune``."""

from infoprune.cli import main

main()
