"""Documents as single, self-contained HTML pages: no scripts, no network, readable in light and dark mode."""

from __future__ import annotations

import html
from collections.abc import Iterable

from rlzoo.document.blocks import Block, Code, Entry, Figure, Heading, Paragraph, Table
from rlzoo.document.drawing import inline

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1d21; --soft: #5b616b; --line: #d9dce1; --page: #fff; --tint: #f4f5f7;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e9; --soft: #a0a6b0; --line: #383c44; --page: #16181c; --tint: #202329; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 60rem;
  background: var(--page); color: var(--ink); font: 1rem/1.55 var(--sans); }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; margin: 0 0 1rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p { max-width: 44rem; margin: .6rem 0; overflow-wrap: anywhere; }
p.lead { font-size: 1.1rem; padding-left: .9rem; border-left: 3px solid #0072b2; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .9rem .32rem 0; text-align: left; vertical-align: top; white-space: nowrap; }
th + th, td + td { padding-left: .9rem; }
.prose { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; border-bottom: 1.5px solid var(--line); }
td { border-bottom: 1px solid var(--line); }
.number { text-align: right; }
.name { position: sticky; left: 0; background: var(--page); }
figure { margin: 1.2rem 0; }
figure svg { display: block; width: 100%; min-width: 40rem; height: auto; overflow: visible; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: var(--sans) !important; }
figcaption { max-width: 44rem; margin-top: .5rem; font-size: .9rem; color: var(--soft); }
pre { margin: .4rem 0 1rem; padding: .7rem .9rem; background: var(--tint); border-radius: 6px;
  font-size: .85rem; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 40rem) {
  body { padding-top: 1.5rem; } h1 { font-size: 1.5rem; } p.lead { font-size: 1.02rem; }
}
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
""".strip()


def render_html(title: str, blocks: Iterable[Block]) -> str:
    """The page. All text is escaped; a content security policy in its head forbids scripts and loading anything."""
    body = "\n".join(_block(block) for block in blocks)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
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
</body>
</html>
"""


def text(value: str) -> str:
    """Text for HTML: escaped, and with characters replaced that are not allowed in a page."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in value))


def _block(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{text(block.text)}</h{block.level}>"
        case Paragraph():
            kind = ' class="lead"' if block.lead else ""
            return f"<p{kind}>{text(block.text)}</p>"
        case Code():
            return f"<pre><code>{text(block.text)}</code></pre>"
        case Figure():
            drawing = inline(block.svg, block.name, block.alt)
            caption = f"<figcaption>{text(block.shows)} {text(block.hides)}</figcaption>"
            return f'<figure><div class="wide">{drawing}</div>{caption}</figure>'
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    def cell(tag: str, column: int, entry: Entry) -> str:
        kind = "number" if table.is_number(column) else "prose" if column else "name"
        inner = f"<strong>{text(entry.text)}</strong>" if entry.best else text(entry.text)
        return f'<{tag} class="{kind}">{inner}</{tag}>'

    def row(tag: str, entries: Iterable[Entry]) -> str:
        return f"<tr>{''.join(cell(tag, column, entry) for column, entry in enumerate(entries))}</tr>"

    head = row("th", (Entry(name) for name in table.header))
    body = "\n".join(row("td", entries) for entries in table.rows)
    return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
