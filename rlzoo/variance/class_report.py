"""The part of the report of an analysis on classes of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlzoo.document import Block, Entry, Heading, Paragraph, Table
from rlzoo.document.estimates import NONE, estimate, number

Found = Mapping[str, Any]


def _per_cent(found: Found | None) -> str:
    """A share with its interval, in per cent."""
    keys = ("value", "ci_low", "ci_high")
    return estimate(found and {key: None if found[key] is None else 100 * found[key] for key in keys})


CLASS_COLUMNS: dict[str, Callable[[Found, Found], str]] = {
    "% of tokens": lambda own, entry: number(100 * own["tokens"]),
    "% of Σ a²S": lambda own, entry: number(None if own["proxy"] is None else 100 * own["proxy"]),
    "% of tr Σ": lambda own, entry: _per_cent(own.get("variance_share")),
    "alone, % of tr Σ": lambda own, entry: _alone(own, entry),
    "% of ‖G‖²": lambda own, entry: _per_cent(own.get("gradient_share")),
}
"""Columns of the table of token classes → the text for a class of an objective."""


def _alone(own: Found, entry: Found) -> str:
    parts = own.get("trace_cov"), entry.get("data_noise", {}).get("trace_cov")
    one, whole = (None if part is None else part["value"] for part in parts)
    return number(100 * one / whole if one is not None and whole else None)


def _has_class_gradients(found: Found) -> bool:
    return any(
        "variance_share" in own
        for entry in found["objectives"].values()
        for own in entry.get("token_classes", {}).values()
    )


def _names(found: Found) -> list[str]:
    """The classes of tokens of all objectives, the largest of the first objective first."""
    return list(
        dict.fromkeys(name for entry in found["objectives"].values() for name in entry.get("token_classes", ()))
    )


def class_table(found: Found) -> tuple[Table, str] | None:
    """Each class's share of an objective's noise, or of the proxy Σ a²S if that was not measured; and of which.

    None without classes of tokens.
    """
    if not (names := _names(found)):
        return None
    column = "% of tr Σ" if _has_class_gradients(found) else "% of Σ a²S"
    rows = []
    for label, entry in found["objectives"].items():
        own = entry.get("token_classes", {})
        cells = [CLASS_COLUMNS[column](own[name], entry) if name in own else NONE for name in names]
        rows.append([Entry(label), *map(Entry, cells)])
    return Table(["objective", *names], rows), column


def class_blocks(found: Found) -> Iterator[Block]:
    """Which classes of tokens carry the noise of each objective."""
    if not _names(found):
        return
    measured = _has_class_gradients(found)
    columns = list(CLASS_COLUMNS) if measured else ["% of tokens", "% of Σ a²S"]
    yield Heading("By class of token")
    told = (
        "Each class's share of the learned tokens, and of Σ a²S, the logit-space proxy of squared gradient norms, in "
        "which a is a token's weight in the loss."
    )
    if measured:
        told += (
            " A prompt's gradient is the sum of its classes' parts g^k: the shares of tr Σ are tr Cov(g^k, g)/tr Σ and "
            "those of ‖G‖² are ⟨G^k, G⟩/‖G‖², which sum to 100 %; one is negative where a class's gradient opposes the "
            "others'. A class's noise alone, tr Σ^k/tr Σ, leaves out covariances between classes and does not sum to "
            "100 %. Intervals are jackknifed over prompts."
        )
    yield Paragraph(told)
    rows = [
        [Entry(label), Entry(name), *(Entry(CLASS_COLUMNS[column](own, entry)) for column in columns)]
        for label, entry in found["objectives"].items()
        for name, own in entry.get("token_classes", {}).items()
    ]
    yield Table(["objective", "class", *columns], rows)
