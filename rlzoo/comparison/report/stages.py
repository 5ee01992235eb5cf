"""The parts of a report about training in stages: the warm-up."""

from __future__ import annotations

from rlzoo.comparison.report.schema import Results
from rlzoo.comparison.report.tables import amount, seconds


def start(results: Results) -> str:
    """A sentence about the model that every cell started from."""
    if (warm := results.warm_up) is None:
        return "Every algorithm started from the base model."
    config = results.config if isinstance(results.config, dict) else {}
    own = (config.get("warm_up") or {}).get("train") or config.get("train") or {}
    learned = f" on {own['source']}" if "source" in own else ""
    model = config.get("model", "the model")
    return (
        f"The base model, from which every algorithm started, is {model} after a warm-up that all cells share: "
        f"{warm.steps} steps of {warm.objective}{learned}, with {amount(warm.costs.gradient_tokens)} gradient tokens, "
        f"{amount(warm.costs.flops)} FLOPs and {seconds(warm.costs.wall_seconds)}, which are not part of any cell's "
        "costs."
    )
