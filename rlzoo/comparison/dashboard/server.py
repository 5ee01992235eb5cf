"""Serving the app: the socket, the warning, the browser, and a quiet end."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
import webbrowser
from pathlib import Path

from rlzoo.errors import UserError


def serve(folder: Path, host: str, port: int, opens: bool) -> None:
    """Serve the pages of a run until Ctrl-C, which is raised as KeyboardInterrupt.

    Prints the address. Raises UserError without the packages, for a folder without a run, and for an address that
    cannot be listened on.
    """
    try:
        import uvicorn

        from rlzoo.comparison.dashboard.app import make_app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("uvicorn", "starlette"):
            raise
        raise UserError("rlzoo serve needs Starlette and Uvicorn: pip install 'rlzoo[serve]'") from None
    is_local = is_loopback(host)
    app = make_app(folder, [host, *([] if is_local else _own_names())], trusts_addresses=not is_local)
    with listening(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"
        if not is_local:
            print(f"anyone who reaches {address} can read the run: there is no password", file=sys.stderr)
        print(f"serving {folder} at {address} (Ctrl-C ends it)", flush=True)
        if opens and not webbrowser.open(address):
            print("no browser was found: open the address yourself", file=sys.stderr)
        config = uvicorn.Config(
            app, log_level="critical", access_log=False, lifespan="off", server_header=False, ws="none",
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0: at a free one. Raises UserError if it cannot."""
    where = f"--host {host} --port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"{where}: no such address ({getattr(error, 'strerror', None) or error})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use: give another with --port, or --port 0 for a free one") from None
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where} cannot be listened on ({reason}): give another with --port or --host") from None
    return listener


def _own_names() -> list[str]:
    return [socket.gethostname(), socket.getfqdn()]
