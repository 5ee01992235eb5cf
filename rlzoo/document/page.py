"""Documents as single, self-contained HTML pages: no network, one small script, readable in light and dark mode."""

from __future__ import annotations

import hashlib
import html
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from pathlib import Path

from rlzoo.document.blocks import Answer, Answers, Block, Code, Entry, Figure, Heading, Paragraph, Table, sort_value
from rlzoo.document.drawing import inline

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8").strip()
SCRIPT = "\n" + (Path(__file__).parent / "sort.js").read_text(encoding="utf-8")
LISTED = 4
"""The number of sections from which a page lists them at its beginning."""


def render_html(title: str, blocks: Iterable[Block]) -> str:
    """The page. All text is escaped; a content security policy forbids loading anything, and scripts but our own.

    The policy names that script by its hash: whatever else a model wrote into the page, a browser does not run it.
    """
    blocks = list(blocks)
    body = "\n".join(block_html(block) for block in blocks)
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    if len(sections) >= LISTED:
        body = body.replace("<h2", f"{_contents(sections)}\n<h2", 1)
    digest = b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{text(title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def text(value: str) -> str:
    """Text for HTML: escaped, and with characters replaced that are not allowed in a page."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in value))


def block_html(block: Block) -> str:
    """A block as an element of a page."""
    match block:
        case Heading():
            anchor = f' id="{_anchor(block.text)}"' if block.level == 2 else ""
            return f"<h{block.level}{anchor}>{text(block.text)}</h{block.level}>"
        case Paragraph():
            kind = ' class="lead"' if block.lead else ""
            return f"<p{kind}>{text(block.text)}</p>"
        case Code():
            return f"<pre><code>{text(block.text)}</code></pre>"
        case Figure():
            drawing = inline(block.drawing.svg, block.name, block.alt)
            caption = f"<figcaption>{text(block.shows)} {text(block.hides)}</figcaption>"
            return f"<figure>{_wide(drawing, 'figure')}{caption}</figure>"
        case Table():
            return _table(block)
        case Answers():
            return _answers(block)


def _wide(content: str, label: str) -> str:
    """What may be wider than a phone, in a box of its own that scrolls, with the keyboard too."""
    return f'<div class="wide" role="group" tabindex="0" aria-label="{label}">{content}</div>'


def _anchor(heading: str) -> str:
    return "section-" + re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def _contents(sections: Sequence[str]) -> str:
    links = "".join(f'<li><a href="#{_anchor(name)}">{text(name)}</a></li>' for name in sections)
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def _answers(block: Answers) -> str:
    def article(answer: Answer) -> str:
        kind, mark = ("right", "✓ right") if answer.correct else ("wrong", "✗ wrong")
        note = f"<p>{text(answer.note)}</p>" if answer.note else ""
        head = f'<h4>{text(answer.name)}</h4><p class="mark">{mark}</p>{note}'
        return f'<article class="{kind}">{head}<pre><code>{text(answer.text)}</code></pre></article>'

    columns = "\n".join(map(article, block.answers))
    question = f'<p class="problem">{text(block.name)}</p><pre><code>{text(block.prompt)}</code></pre>'
    label = text(f"answers to {block.name}")
    return f'{question}\n<div class="answers" role="group" tabindex="0" aria-label="{label}">\n{columns}\n</div>'


def _table(table: Table) -> str:
    def cell(tag: str, column: int, entry: Entry) -> str:
        is_number = table.is_number(column)
        kind = "name" if column == 0 else "number" if is_number else "prose" if table.is_prose(column) else "word"
        scope = ' scope="col"' if tag == "th" else ""
        value = sort_value(entry.text) if is_number and tag == "td" else None
        order = "" if value is None else f' data-value="{value:.12g}"'
        inner = f"<strong>{text(entry.text)}</strong>" if entry.best else text(entry.text)
        return f'<{tag}{scope} class="{kind}"{order}>{inner}</{tag}>'

    def row(tag: str, entries: Iterable[Entry]) -> str:
        return f"<tr>{''.join(cell(tag, column, entry) for column, entry in enumerate(entries))}</tr>"

    head = row("th", (Entry(name) for name in table.header))
    body = "\n".join(row("td", entries) for entries in table.rows)
    return _wide(f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>", "table")
