"""Problems and a small base model that ship with the package, so that everything works with no network."""

from __future__ import annotations

from pathlib import Path

from rlzoo.worlds import arithmetic

WORLD_PREFIX = "world:"
EMBEDDED_BASE = Path(__file__).parent / "base"
"""The folder of the base model; made by `rlzoo.worlds.recipe`."""

WORLDS = {
    "arithmetic": tuple(arithmetic.SPLITS),
    "facts": ("train", "validation", "test", "unseen"),
    "both": ("train", "validation", "test"),
}
