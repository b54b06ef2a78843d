"""Question-answering data: one ``Example`` type, whatever the source."""

from infoprune.data.example import Example, subset
from infoprune.data.sources import load_examples

__all__ = ["Example", "load_examples", "subset"]
