"""Reports as lists of blocks, written as Markdown with separate figures and as a single HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlzoo.document.blocks import Answer, Answers, Block, Code, Entry, Figure, Heading, Paragraph, Table
from rlzoo.document.drawing import standalone
from rlzoo.document.markdown import FIGURES, render_markdown
from rlzoo.document.page import render_html
from rlzoo.jobs.outputs import write_atomically

__all__ = [
    "Answer",
    "Answers",
    "Block",
    "Code",
    "Entry",
    "Figure",
    "Heading",
    "Paragraph",
    "Table",
    "render_markdown",
    "write_document",
]


def write_document(directory: Path, title: str, blocks: Sequence[Block]) -> None:
    """Write report.md, report.html and figures/ into a directory, each file atomically."""
    files = {
        directory / FIGURES / f"{block.name}.svg": standalone(block.drawing.svg)
        for block in blocks
        if isinstance(block, Figure)
    }
    files[directory / "report.md"] = render_markdown(blocks)
    files[directory / "report.html"] = render_html(title, blocks)
    for path, content in files.items():
        write_atomically(path, content)
