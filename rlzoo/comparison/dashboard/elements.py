"""HTML elements: all text is escaped, unless it is HTML that was made here or by `rlzoo.document`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlencode

from rlzoo.document.page import text


class Html(str):
    """HTML, which is not escaped again."""

    __slots__ = ()


Child = str | int | float | None | Iterable[Any]
VOID = frozenset({"input", "link", "meta", "br", "img"})
LONGEST = 20_000
"""The characters of a text that are shown."""


def join(*children: Child) -> Html:
    """Children one after another: nothing for None, text escaped, and the parts of anything iterable."""
    return Html("".join(map(_html, children)))


def _html(child: Child) -> str:
    if child is None or isinstance(child, Html):
        return child or ""
    return text(str(child)) if isinstance(child, str | int | float) else join(*child)


def h(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element. Attributes that are None or False are left out; ``class_`` stands for ``class``, ``_`` for ``-``."""
    told = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{tag}{told}>" + ("" if tag in VOID else f"{join(*children)}</{tag}>"))


def link(to: str, *children: Child, **attributes: str | None) -> Html:
    """A link to a page of this app."""
    return h("a", *children, href=to, **attributes)


def url(path: str, **query: str | int | list[str] | None) -> str:
    """A path with a query, without what is empty."""
    kept = [(name, value) for name, value in query.items() if value not in (None, "", [])]
    return path + (f"?{urlencode(kept, doseq=True)}" if kept else "")


def wide(*children: Child, label: str) -> Html:
    """What may be wider than a phone, in a box that scrolls, with the keyboard too."""
    return h("div", *children, class_="wide", role="group", tabindex=0, aria_label=label)


def table(header: Iterable[tuple[str, str]], rows: Iterable[Iterable[Child]], label: str) -> Html:
    """A table: the name and the class (``name``, ``number``, ``word`` or ``prose``) of each column, and its rows.

    A cell of a number may be a pair of what is shown and the value that it is sorted by.
    """
    columns = list(header)
    head = h("tr", [h("th", name, scope="col", class_=kind) for name, kind in columns])

    def cell(kind: str, value: Any) -> Html:
        shown, order = value if isinstance(value, tuple) else (value, None)
        return h("td", shown, class_=kind, data_value=None if order is None else f"{order:.12g}")

    body = [h("tr", [cell(kind, one) for (_, kind), one in zip(columns, row, strict=True)]) for row in rows]
    return wide(h("table", h("thead", head), h("tbody", body)), label=label)


def cut(value: str, most: int = LONGEST) -> str:
    """A text, of which no more than ``most`` characters are shown, with the number of those left out."""
    return value if len(value) <= most else f"{value[:most]}\n… {len(value) - most:,} more characters"


def pre(value: object, most: int = LONGEST) -> Html:
    """Text that a program or model wrote, verbatim: in a box that scrolls if it is long, and cut if it is endless."""
    return h("pre", h("code", cut(str(value), most)))


def facts(pairs: Iterable[tuple[str, Child]]) -> Html:
    """Names and values."""
    return h("dl", [[h("dt", name), h("dd", value)] for name, value in pairs if value not in (None, "")])
