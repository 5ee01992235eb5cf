"""Hooks of mkdocs: what GitHub shows of the repository, and a site of docs/ alone does not.

README.md is the home page, the other pages at the top are pages of the site, and every other file or folder outside
docs/ that a page links to gets a page with its text. Links are rewritten accordingly: pages keep links that GitHub
follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
HOME = "README.md"
SOURCE = "source"
CODE_OR_LINK = re.compile(r"^ *```.*?^ *```|`[^`\n]+`|(?<=\]\()[^)\s#]+(?=(?:#[^)\s]*)?\))", re.DOTALL | re.MULTILINE)
ITEM = re.compile(r"(?:[-*]|\d+\.) +")

_origins: dict[str, str] = {}
"""The path in the repository of each page, by its path in the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that is linked to, from these pages too."""
    _origins.clear()
    _origins.update({file.src_uri: f"docs/{file.src_uri}" for file in files})
    texts = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    at_the_top = [path.name for path in sorted(ROOT.glob("*.md"))]
    wanted = [*at_the_top, *(target for origin, text in texts for target in targets(text, origin))]
    while wanted:
        target = wanted.pop()
        place = place_in_site(target)
        if place in _origins:
            continue
        text = text_of(target)
        files.append(File.generated(config, place, content=text))
        _origins[place] = target
        wanted += targets(text, target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links, and lay lists out as Python-Markdown reads them."""
    here = page.file.src_uri
    if here == "index.md":
        page.meta["hide"] = ["navigation"]
    origin = _origins[here]

    def rewritten(found: re.Match[str]) -> str:
        target = in_repository(found[0], origin)
        return found[0] if target is None else relpath(place_in_site(target), dirname(here) or ".")

    return "\n".join(indented(CODE_OR_LINK.sub(rewritten, markdown).splitlines()))


def targets(text: str, origin: str) -> list[str]:
    """The files and folders outside docs/ that the text of a page links to, by their paths in the repository."""
    found = [in_repository(link[0], origin) for link in CODE_OR_LINK.finditer(text)]
    return [target for target in found if target is not None and not target.startswith("docs/")]


def in_repository(link: str, origin: str) -> str | None:
    """The path in the repository that a link of a page leads to; None for code, and for links that leave it."""
    if "`" in link or ":" in link:
        return None
    target = normpath(f"{dirname(origin)}/{link}").lstrip("/")
    path = (ROOT / target).resolve()  # a linked folder has one place
    return str(path.relative_to(ROOT)) if path.exists() and path.is_relative_to(ROOT) else None


def place_in_site(target: str) -> str:
    """Where the site has a file or folder of the repository."""
    if target == HOME:
        return "index.md"
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target.endswith(".md") and "/" not in target:
        return target
    return f"{SOURCE}/{target}/index.md"


def text_of(target: str) -> str:
    """A file or folder of the repository as a page in Markdown."""
    path = ROOT / target
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    head = f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n\n# {target}\n\n"
    if path.is_dir():
        names = sorted({file.relative_to(path).parts[0] for kind in ("py", "yaml") for file in path.rglob(f"*.{kind}")})
        return head + "\n".join(f"- [{name}]({path.name}/{name})" for name in names if not name.startswith("_"))
    language = {".py": "python", ".yaml": "yaml"}.get(path.suffix, "text")
    return f"{head}````{language}\n{path.read_text(encoding='utf-8')}````\n"


def indented(lines: list[str]) -> Iterator[str]:
    """Lines in which lists are as Python-Markdown wants them.

    What belongs to an item is indented by four spaces, and an item that follows one of several paragraphs is set apart.
    """
    width, is_apart = 0, False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if found := ITEM.match(line):
            if width and is_apart:
                yield ""
            width, is_apart = len(found[0]), False
        elif line and indent < width:
            width = 0
        is_apart = bool(width) and (is_apart or not line)
        yield " " * (4 - width) + line if line and width and indent >= width else line
