"""``rlzoo serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option

from rlzoo.cli import options

PORT = 8765


def port_number(text: str) -> int:
    """A port on the command line. Raises BadParameter for anything else."""
    if not 0 <= (number := options.whole(text)) <= 65535:
        raise BadParameter(f"{number} is no port: give 0 to 65535")
    return number


def serve(
    run: Annotated[
        str,
        Argument(
            metavar="RUN",
            help="Folder that rlzoo compare, train or rollout writes, or the name of a study (see rlzoo results).",
        ),
    ],
    host: Annotated[
        str, Option(metavar="ADDRESS", help="Address to listen on; any but 127.0.0.1 lets other machines read the run.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(metavar="N", parser=port_number, help="Port to listen on; 0: any free one.")] = PORT,
    opens: Annotated[bool, Option("--open", help="Open the page in a browser.")] = False,
) -> int:
    """Show a running or finished run in a browser: cells, live curves, samples side by side, and the buffer's rows.

    It only reads. Needs Starlette and Uvicorn: pip install 'rlzoo[serve]'.

    Examples:
      rlzoo serve runs/arithmetic
      rlzoo serve runs/buffer --port 0 --open
    """
    from rlzoo.comparison.dashboard.server import serve
    from rlzoo.config import EXPERIMENTS

    study = EXPERIMENTS / "results" / run
    is_study = not Path(run).is_dir() and "/" not in run and (study / "results.json").is_file()
    serve(study if is_study else Path(run), host, port, opens)
    return 0
