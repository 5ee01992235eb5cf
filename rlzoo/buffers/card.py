"""The data set card of a saved buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCardData

from rlzoo.buffers.buffer import Buffer
from rlzoo.buffers.overview import described, overview
from rlzoo.document import Block, Code, Heading, Paragraph
from rlzoo.document.cards import TAG, card, data_sets_of, facts, how_it_was_made
from rlzoo.jobs.sharing import FOLDER, public

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The Hub's categories of size, each with the number of rows that is too large for it."""
SHARDS = "data-*.arrow"
"""The files with the rows of a saved folder."""


def buffer_card(
    buffer: Buffer,
    name: str,
    lead: str,
    origin: Mapping[str, Any],
    configuration: Mapping[str, Any],
    sources: Sequence[str | None] = (),
) -> str:
    """The card of a buffer that is saved as ``name``: where its rows come from, what it holds, how it was made.

    ``lead`` says in a sentence what it is, and ``origin`` where it comes from, as names and values; ``sources`` are
    what it was made from, of which the metadata name the data sets on the Hub (see `data_sets_of`).
    """
    return card(_metadata(buffer, name, sources), _blocks(buffer, name, lead, origin, configuration))


def _metadata(buffer: Buffer, name: str, sources: Sequence[str | None]) -> DatasetCardData:
    size = next((label for most, label in SIZES if len(buffer) < most), "n>1M")
    known = dict.fromkeys(name for source in sources if source is not None for name in data_sets_of(source))
    return DatasetCardData(
        pretty_name=name,
        tags=[TAG, "offline-rl"],
        size_categories=[size],
        source_datasets=list(known) or None,
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": SHARDS}]}],
    )


def _blocks(
    buffer: Buffer, name: str, lead: str, origin: Mapping[str, Any], configuration: Mapping[str, Any]
) -> Iterator[Block]:
    yield Heading(name, level=1)
    yield Paragraph(lead)
    yield facts({what: _shown(value) for what, value in origin.items()}, "origin")
    yield Heading("What it holds")
    if len(buffer):
        yield facts(dict(described(overview(buffer))))
    yield Paragraph(
        "A row is a prompt and a completion, as text and as token ids, with the log-probs of the policy that sampled "
        "it, its reward and the problem that it belongs to. rlzoo opens it:"
    )
    yield Code(f"rlzoo buffer show {FOLDER}\nrlzoo train OBJECTIVE --buffer {FOLDER} --out MODEL", "sh")
    yield from how_it_was_made(configuration)


def _shown(value: Any) -> str:
    """A setting as text, for others to see."""
    plain = public(value)
    if isinstance(plain, Mapping):
        return ", ".join(f"{key}: {_shown(one)}" for key, one in plain.items() if one not in (None, {}, []))
    if isinstance(plain, list):
        return ", ".join(map(_shown, plain))
    return "" if plain is None else f"{plain:,}" if type(plain) is int else str(plain)
