"""Built-in tasks and a small base model, so that everything works without network access."""

from __future__ import annotations

from pathlib import Path

from rlzoo.worlds import arithmetic

WORLD_PREFIX = "world:"
EMBEDDED_BASE = Path(__file__).parent / "base"
"""The folder of the base model, which `rlzoo.worlds.recipe` trains."""

WORLDS = {
    "arithmetic": tuple(arithmetic.SPLITS),
    "facts": ("train", "validation", "test", "unseen"),
    "both": ("train", "validation", "test"),
}
