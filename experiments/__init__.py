"""Experiment files by name. Run one with ``rlzoo compare NAME``."""

if __name__ != "rlzoo.experiments":
    raise ImportError("use rlzoo.experiments, not experiments: this folder belongs to the rlzoo package")
