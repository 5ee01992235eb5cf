"""Which built-in objectives are compared with another implementation; tests/test_trl_parity.py checks this list."""

from __future__ import annotations

from collections.abc import Mapping

TRL = "TRL 1.16"
COMPARED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "a-star-po", "aot", "apo", "bco", "cispo", "dapo", "dft", "discopop", "dpo", "dr-grpo", "exo", "grpo",
            "gspo", "kto", "nca", "opd", "orpo", "rloo", "sapo", "sdft", "sft", "simpo", "sppo", "vespo",
        ),
        TRL,
    ),
    "ppo": f"{TRL} without critic",
}  # fmt: skip
"""Objective → the implementation whose loss and gradient, on the same model and rows, equal its own."""
