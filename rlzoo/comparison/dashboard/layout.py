"""The frame of every page: navigation, style, and the script that refreshes it."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlzoo.comparison.dashboard.elements import Html, h, link
from rlzoo.document import page

HERE = Path(__file__).parent
STYLE = "\n" + page.STYLE + "\n" + (HERE / "dashboard.css").read_text(encoding="utf-8")
_SORT = f"\nconst sortTables = (document) => {{\n{page.SCRIPT}\n}};\n"
SCRIPT = _SORT + (HERE / "refresh.js").read_text(encoding="utf-8")
"""The sorting of a report's tables, and the refreshing that calls it again."""


def _digest(source: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; img-src data:; style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)}; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""Nothing is loaded, and no script runs but ours, whatever a model wrote."""
REPORT_POLICY = (
    f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {_digest(page.SCRIPT)}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""For report.html, which has its own style, and that of its figures."""


@dataclass(frozen=True)
class Content:
    """A page: its title, and its sections by id, which are replaced when they change."""

    title: str
    sections: Mapping[str, Html]
    seconds: float | None = None
    """How often the page asks for changes; None: never."""

    @property
    def version(self) -> str:
        """What tells the content from another."""
        return hashlib.sha256("\0".join(self.sections.values()).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Frame:
    """What all pages of a run have around their content."""

    name: str
    links: Sequence[tuple[str, str]] = field(default=())
    """Path and name of each page in the navigation."""

    def navigation(self, here: str, style: str | None = None) -> Html:
        """The links to all pages, given the path of the one that they stand on."""
        links = [h("li", link(to, name, aria_current="page" if to == here else None)) for to, name in self.links]
        return h("nav", h("ul", links), aria_label="Pages", style=style)

    def around_report(self, report: str) -> str:
        """A report with the navigation before it."""
        return report.replace("<body>", f"<body>\n{self.navigation('/report', 'margin-bottom: 2rem')}", 1)

    def render(self, content: Content, here: str) -> str:
        """The page as HTML."""
        body = [h("section", html, id=f"part-{name}") for name, html in content.sections.items()]
        main = h(
            "main", body, data_version=content.version,
            data_seconds=None if content.seconds is None else f"{content.seconds:g}",
        )  # fmt: skip
        title = content.title if content.title == self.name else f"{content.title} · {self.name}"
        head = [
            h("meta", charset="utf-8"),
            h("meta", name="viewport", content="width=device-width, initial-scale=1"),
            h("title", f"{title} · rlzoo"),
            h("link", rel="icon", href="data:,"),
            Html(f"<style>{STYLE}</style>"),
        ]
        frame = h("header", h("p", self.name, class_="run"), self.navigation(here))
        lost = h("p", "No connection to rlzoo serve: the page is as it was.", id="lost", role="status", hidden=True)
        script = Html(f"<script>{SCRIPT}</script>")
        whole = h("html", h("head", head), h("body", frame, lost, main, script), lang="en")
        return f"<!doctype html>\n{whole}\n"
