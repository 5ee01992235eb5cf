"""Model and data set cards: a README.md with metadata for the Hub, and blocks for a reader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import CardData, metadata_load, try_to_load_from_cache

from rlzoo.document.blocks import Block, Code, Entry, Heading, Paragraph, Table
from rlzoo.document.markdown import render_markdown
from rlzoo.jobs.runs import versions
from rlzoo.jobs.sharing import CARD, COMMAND, hub_id, public
from rlzoo.jobs.sources import path_of

TAG = "rlzoo"


def card(metadata: CardData, blocks: Iterable[Block]) -> str:
    """The card: metadata as a YAML header, then the blocks."""
    return f"---\n{metadata.to_yaml()}\n---\n\n{render_markdown(blocks)}"


def metadata_of(source: str, kind: Literal["model", "dataset"] = "model") -> Mapping[str, Any]:
    """The metadata in the card of a local folder, or of a repository on the Hub as far as it is cached; none without
    one."""
    if (folder := path_of(source)).is_dir():
        file: Any = folder / CARD
    else:
        file = None if (name := hub_id(source)) is None else try_to_load_from_cache(name, CARD, repo_type=kind)
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return {}
    try:
        return metadata_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError):  # a card that somebody has written
        return {}


def data_sets_of(source: str) -> list[str]:
    """The data sets on the Hub that a source of data comes from: itself, or else those that its card names."""
    if (name := hub_id(source)) is not None:
        return [name]
    above = metadata_of(source, "dataset").get("source_datasets") or ()
    return [above] if isinstance(above, str) else list(above)


def configuration_hash(configuration: Mapping[str, Any]) -> str:
    """The SHA-256, in hexadecimal, of settings as JSON with sorted keys, as others see them (see `public`)."""
    return hashlib.sha256(json.dumps(public(configuration), sort_keys=True).encode()).hexdigest()


def facts(rows: Mapping[str, str], what: str = "") -> Table:
    """A table of names and values; values that are empty are left out."""
    kept = {name: value for name, value in rows.items() if value}
    return Table([what, "value"], [[Entry(name), Entry(value)] for name, value in kept.items()], words=["value"])


def how_it_was_made(configuration: Mapping[str, Any], repeat: str | None = None) -> Iterator[Block]:
    """The command that this process runs, if any, the configuration with its hash, and the versions.

    The configuration is shown, unless there is a command to ``repeat`` this from the file experiment.yaml beside the
    card.
    """
    yield Heading("How this was made")
    if commands := list(dict.fromkeys(filter(None, [COMMAND.get(), repeat]))):
        yield Code("\n".join(commands), "sh")
    digest = configuration_hash(configuration)
    if repeat is None:
        yield Paragraph("The configuration, with every default filled in:")
        yield Code(yaml.safe_dump(public(configuration), sort_keys=False, allow_unicode=True).rstrip(), "yaml")
    where = "" if repeat is None else " in experiment.yaml"
    yield Paragraph(
        f"SHA-256 of the configuration{where}, as JSON with sorted keys and with base names in place of paths: {digest}"
    )
    yield Paragraph("Versions:")
    yield Code("\n".join(f"{name} {version}" for name, version in versions().items()))
