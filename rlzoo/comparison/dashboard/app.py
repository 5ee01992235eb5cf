"""The app of `rlzoo serve`: pages that read the folder of a run, and nothing else."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlzoo.comparison.dashboard.buffer_pages import groups_page, row_page, rows_page
from rlzoo.comparison.dashboard.buffers import RowQuery, WatchedBuffer
from rlzoo.comparison.dashboard.elements import h, join
from rlzoo.comparison.dashboard.layout import POLICY, REPORT_POLICY, Content, Frame
from rlzoo.comparison.dashboard.overview import cell_page, overview, settings_page
from rlzoo.comparison.dashboard.runs import WatchedRun
from rlzoo.comparison.dashboard.samples import SampleQuery, samples_page

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOCAL = ("localhost", "127.0.0.1", "::1")
"""The names under which a browser on this machine reaches the app."""


class Guarded:
    """Adds `HEADERS` to every answer, and refuses requests under a name that is not this machine's.

    A page elsewhere whose name was made to point here (DNS rebinding) sends such requests. One under an IP address
    cannot come from that: it is answered if the app listens on other than loopback.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str], trusts_addresses: bool) -> None:
        self._app, self._names, self._trusts_addresses = app, {*LOCAL, *map(str.lower, names)}, trusts_addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self._app if self._is_trusted(Headers(scope=scope).getlist("host")) else _REFUSAL
        await answer(scope, receive, with_headers)

    def _is_trusted(self, hosts: Sequence[str]) -> bool:
        if len(hosts) != 1:
            return False
        found = re.fullmatch(r"(\[([^]]*)\]|([^:]*))(:\d*)?", hosts[0])
        name = (found[2] or found[3] or "").lower() if found else ""
        return name in self._names or (self._trusts_addresses and _is_address(name))


_REFUSAL = PlainTextResponse("Unknown host name: use the address that rlzoo serve printed.\n", 400)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Dashboard:
    """The pages of one run. What was read is shared by all requests, which take turns."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for a folder without a run."""
        self._run = WatchedRun(folder)
        self._folder = str(folder)
        self._buffers: dict[tuple[str, ...], WatchedBuffer] = {}
        self._lock = Lock()

    def routes(self) -> list[Route]:
        """The pages by path. No part of a path or query is used as the name of a file."""
        pages = {
            "/": self.overview,
            "/cell/{cell:path}": self.cell,
            "/samples": self.samples,
            "/buffer/{buffer}": self.rows,
            "/buffer/{buffer}/groups": self.groups,
            "/buffer/{buffer}/row/{row:int}": self.row,
            "/settings": self.settings,
            "/report": self.report,
        }
        return [Route(path, page, methods=["GET"]) for path, page in pages.items()]

    def overview(self, request: Request) -> Response:
        """The run's state, cells and curves; for a saved buffer, its rows."""
        if self._run.is_buffer:
            return self.rows(request)
        with self._lock:
            query = request.query_params
            return self._answer(request, overview(self._run.look(), query.getlist("row"), query.get("status", "")), "/")

    def cell(self, request: Request) -> Response:
        """One cell."""
        with self._lock:
            view = self._run.look()
            found = next((one for one in view.cells if one.id == request.path_params["cell"]), None)
            if found is None:
                raise HTTPException(404)
            return self._answer(request, cell_page(view, found), "")

    def samples(self, request: Request) -> Response:
        """The completions of one problem."""
        query = request.query_params
        asked = SampleQuery(
            query.get("benchmark", ""), query.get("order", ""), whole(query, "place"), tuple(query.getlist("row")),
            query.get("seed", ""), "greedy" if query.get("decoding") == "greedy" else "sample",
        )  # fmt: skip
        with self._lock:
            view = self._run.look()
            return self._answer(request, samples_page(view, self._run.outcomes, asked), "/samples")

    def rows(self, request: Request) -> Response:
        """A page of a buffer's rows."""
        query = request.query_params
        asked = RowQuery(
            max(0, whole(query, "start")), query.get("source", ""), query.get("prompt", ""), query.get("q", "")[:1000]
        )
        with self._lock:
            buffer = self._buffer(request)
            return self._answer(request, rows_page(buffer, asked), f"/buffer/{buffer.key}")

    def groups(self, request: Request) -> Response:
        """A page of a buffer's groups."""
        query = request.query_params
        with self._lock:
            buffer = self._buffer(request)
            content = groups_page(buffer, whole(query, "start"), query.get("equal", ""))
            return self._answer(request, content, f"/buffer/{buffer.key}")

    def row(self, request: Request) -> Response:
        """One row of a buffer."""
        with self._lock:
            buffer = self._buffer(request)
            content = row_page(buffer, request.path_params["row"])
            if content is None:
                raise HTTPException(404)
            return self._answer(request, content, f"/buffer/{buffer.key}")

    def settings(self, request: Request) -> Response:
        """The configuration of the run."""
        with self._lock:
            content = settings_page(self._run.look(), self._folder, self._run.has_experiment)
            return self._answer(request, content, "/settings")

    def report(self, request: Request) -> Response:
        """The report of a finished run."""
        found = self._run.report()
        if found is None:
            raise HTTPException(404)
        page = self._frame().around_report(found.decode("utf-8", "replace"))
        return HTMLResponse(page, headers={"Content-Security-Policy": REPORT_POLICY})

    def failed(self, request: Request, error: Exception) -> Response:
        """The page of a request that cannot be answered."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        told = {404: "There is no such page.", 405: "Pages can only be read."}.get(status, "This cannot be shown.")
        why = "" if isinstance(error, HTTPException) else f"{type(error).__name__}: {error}"
        content = Content("Not found" if status == 404 else "Error", {"error": join(h("h1", told), h("p", why))})
        return HTMLResponse(self._frame().render(content, ""), status)

    def _buffer(self, request: Request) -> WatchedBuffer:
        key = request.path_params.get("buffer", "rows")
        found = next((one for one in self._watched() if one.key == key), None)
        if found is None:
            raise HTTPException(404)
        return found

    def _watched(self) -> list[WatchedBuffer]:
        """The buffers that there are now."""
        return [self._buffers.setdefault(parts, WatchedBuffer(self._run.folder, parts)) for parts in self._run.buffers]

    def _frame(self) -> Frame:
        buffers = self._watched()
        if self._run.is_buffer:
            return Frame(self._run.name, [(f"/buffer/{one.key}", "Rows") for one in buffers])
        several = len(buffers) > 1
        links = [("/", "Overview"), ("/samples", "Samples")]
        links += [(f"/buffer/{one.key}", one.name if several else "Buffer") for one in buffers]
        links += [("/report", "Report")] if self._run.has_report else []
        return Frame(self._run.name, [*links, ("/settings", "Settings")])

    def _answer(self, request: Request, content: Content, here: str) -> Response:
        """A page, or for its script, the sections of one that has changed ``since`` the version that it has."""
        since = request.query_params.get("since")
        if since is None:
            return HTMLResponse(self._frame().render(content, here))
        if since == content.version:
            return Response(status_code=204)
        told = {"version": content.version, "sections": content.sections, "seconds": content.seconds}
        return JSONResponse(told)


def whole(query: QueryParams, name: str) -> int:
    """A whole number of a query; 0 for anything else."""
    try:
        return int(query.get(name, "0"))
    except ValueError:
        return 0


def make_app(folder: Path, names: Sequence[str] = (), trusts_addresses: bool = False) -> ASGIApp:
    """The app for a run's folder, which answers under the loopback's names and ``names``.

    ``trusts_addresses``: also under any IP address. Raises UserError for a folder without a run.
    """
    dashboard = Dashboard(folder)
    handlers = {HTTPException: dashboard.failed, Exception: dashboard.failed}
    return Guarded(Starlette(routes=dashboard.routes(), exception_handlers=handlers), names, trusts_addresses)
