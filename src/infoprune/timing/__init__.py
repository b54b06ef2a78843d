"""Measured time as a cost: a table of this machine, and what it says of a model's sites."""
