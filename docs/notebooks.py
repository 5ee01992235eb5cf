"""Make the tutorials' notebooks again from their pages: python docs/notebooks.py

The code is that of the pages, block by block, which tests run. A block that is a file is written, a command runs in the
shell. Before them, a cell of the notebook's own makes a new folder for all that it writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parent / "tutorials"
BLOCK = re.compile(r"^```(?:python|yaml|(bash))\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (\S+\.(?:py|yaml))\n")
ITSELF = re.compile(r"\s+It is\s+\[a\s+notebook\].*?\.$", re.DOTALL | re.MULTILINE)
"""What a page says of its notebook."""
START = """\
# a new folder for what this notebook writes, with the kernel's own rlzoo and python in the shell
import os
import sys
import tempfile
from pathlib import Path

os.chdir(tempfile.mkdtemp(prefix="rlzoo-"))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
Path.cwd()
"""


def notebook(page: str) -> str:
    """The notebook of a page in Markdown, as the text of an .ipynb file."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    found = {"cells": [*cells(page)], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def cells(page: str) -> Iterator[dict[str, Any]]:
    """The cells: text as it is, a code cell for each block, and before the first section the one to start with."""
    introduction, sections = ITSELF.sub("", page, count=1).split("\n## ", 1)
    yield cell("introduction", "markdown", introduction)
    yield cell("start", "code", START)
    page = f"## {sections}"
    place = 0
    for number, block in enumerate(BLOCK.finditer(page)):
        yield cell(f"text-{number}", "markdown", page[place : block.start()])
        yield cell(f"code-{number}", "code", as_cell(block[2], bool(block[1])))
        place = block.end()
    yield cell("text-last", "markdown", page[place:])


def cell(name: str, kind: str, source: str) -> dict[str, Any]:
    """A cell of the notebook format, without outputs."""
    own: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"id": name, "cell_type": kind, "metadata": {}, "source": source.strip().splitlines(keepends=True), **own}


def as_cell(code: str, is_shell: bool) -> str:
    """A block as IPython runs it."""
    if is_shell:
        return re.sub(r"^(?!    )", "!", code.strip(), flags=re.MULTILINE)
    named = FILE.match(code)
    return f"%%writefile {named[1]}\n{code}" if named else code


if __name__ == "__main__":
    for path in TUTORIALS.glob("*.md"):
        path.with_suffix(".ipynb").write_text(notebook(path.read_text(encoding="utf-8")), encoding="utf-8")
