"""The training-based scheme: gates that learn which heads to keep, and recovery of a compacted model."""
