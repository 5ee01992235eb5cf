"""Documents as Markdown, with figures in separate files."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rlzoo.document.blocks import Answer, Answers, Block, Code, Entry, Figure, Heading, Paragraph, Table

FIGURES = "figures"
INTERVAL = re.compile(r"\\\[([−+\d.,e]+, [−+\d.,e]+)\\\](?![(\[:])")
"""An escaped interval, which no renderer takes for a link."""


def render_markdown(blocks: Iterable[Block]) -> str:
    """The document as Markdown. Text is escaped; text written by a model or a program is fenced."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def text(value: str) -> str:
    """Text for Markdown, in one line, with every character escaped that Markdown or HTML would interpret."""
    plain = "".join(c if c.isprintable() else " " for c in value)
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", " ".join(plain.split()))
    return INTERVAL.sub(r"[\1]", escaped)


def fence(value: str, language: str) -> str:
    """A fenced block, with a fence longer than any run of backticks inside."""
    plain = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in value)
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    return f"{ticks}{language}\n{plain}\n{ticks}"


def _block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {text(block.text)}"
        case Paragraph():
            return f"**{text(block.text)}**" if block.lead else text(block.text)
        case Code():
            return fence(block.text, block.language)
        case Figure():
            return f"![{text(block.alt)}]({FIGURES}/{block.name}.svg)\n\n{text(f'{block.shows} {block.hides}')}"
        case Table():
            return _table(block)
        case Answers():
            return "\n\n".join([text(block.name), fence(block.prompt, "text"), *map(_answer, block.answers)])


def _answer(answer: Answer) -> str:
    mark = "✓ right" if answer.correct else "✗ wrong"
    return f"{text(answer.name)}: {text(', '.join(filter(None, [mark, answer.note])))}\n\n{fence(answer.text, 'text')}"


def _table(table: Table) -> str:
    def row(entries: Iterable[Entry]) -> str:
        return f"| {' | '.join(f'**{text(e.text)}**' if e.best else text(e.text) for e in entries)} |"

    rule = "|".join("---:" if table.is_number(column) else ":---" for column in range(len(table.header)))
    return "\n".join([row(Entry(name) for name in table.header), f"|{rule}|", *(row(r) for r in table.rows)])
