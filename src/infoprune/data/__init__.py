"""Question-answering data: one ``Example`` type, whatever the source."""

from infoprune.data.example import Example, subset
from infoprune.data.images import same_images
from infoprune.data.sources import DataSpec, Loaded, load_counted, load_examples, parse_spec

__all__ = ["DataSpec", "Example", "Loaded", "load_counted", "load_examples", "parse_spec", "same_images", "subset"]
