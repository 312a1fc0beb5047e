"""Checkpoints and the output directory: what is on disk, how it is written, how a run comes back from it."""
