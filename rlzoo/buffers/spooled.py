"""Many items in flat memory: in a file without a name, which ends with its last user."""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any, TypeVar, overload

from rlzoo.buffers.schema import CHUNK

T = TypeVar("T")


def kept(items: Iterable[T]) -> Sequence[T]:
    """The items, in their order: a list if they are few, else `Spooled`."""
    left = iter(items)
    first = list(islice(left, CHUNK + 1))
    return first if len(first) <= CHUNK else Spooled(chain(first, left))


class Spooled(Sequence[T]):
    """Items that are read from a file when they are asked for; changing one does not change the file.

    The file has no name and only this process writes to it, so unpickling reads nothing from outside."""

    def __init__(self, items: Iterable[T]) -> None:
        self._file = tempfile.TemporaryFile(prefix="rlzoo-items-")  # noqa: SIM115
        self._ends = array("Q", [0])
        for item in items:
            self._ends.append(self._ends[-1] + self._file.write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL)))
        self._file.flush()
        self._places = range(len(self._ends) - 1)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Spooled[T]: ...
    def __getitem__(self, place: int | slice) -> T | Spooled[T]:
        if isinstance(place, slice):
            part: Spooled[T] = object.__new__(Spooled)
            part._file, part._ends, part._places = self._file, self._ends, self._places[place]
            return part
        start, end = self._ends[self._places[place]], self._ends[self._places[place] + 1]
        found: Any = pickle.loads(os.pread(self._file.fileno(), end - start, start))
        return found  # type: ignore[no-any-return]
