"""Importing data sets in common formats (`rlzoo.buffers.examples`) as buffers.

Formats are recognised by their columns. Further columns of a row are kept in `Trajectory.columns`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import datasets

from rlzoo.buffers import cache, storage
from rlzoo.buffers.bad_rows import BadRows, collecting
from rlzoo.buffers.buffer import OfflineBuffer
from rlzoo.buffers.examples import (
    COMPLETIONS,
    GRADED,
    LAST,
    Example,
    ExampleFormat,
    recognise,
    require_same,
    require_text,
)
from rlzoo.buffers.files import BATCH, Item, batch_rows, object_row
from rlzoo.buffers.layouts import aliases, as_trl
from rlzoo.buffers.schema import to_row
from rlzoo.buffers.tables import SourceTable, chunks
from rlzoo.buffers.values import Columns, Row, find, own_id, renamed, usable
from rlzoo.errors import UserError, kind_of
from rlzoo.policy.chat import options_of
from rlzoo.policy.encoding import CUT, Encoded, RowCheck, Special, encode_batch, encode_steps, encode_tokens, got
from rlzoo.policy.turns import Steps
from rlzoo.types import Trajectory

Fits = Callable[[Sequence[int], Sequence[int]], None]
"""Called with the token ids of a prompt and a completion; raises UserError if the model cannot take them."""


def from_trl(
    rows: Iterable[Row] | datasets.Dataset,
    tokenizer: Any,
    max_length: int | None = None,
    max_completion_tokens: int | None = None,
    columns: Columns | None = None,
    bad: BadRows | None = None,
    special_tokens: Special = "reject",
    turns: str = LAST,
) -> OfflineBuffer:
    """A buffer from the rows of a TRL data set.

    Prompt-completion and language-modelling rows become demonstrations, a preference row two rows of reward 1 and 0, an
    unpaired one a row of reward 1 or 0, and graded rows samples with their reward. Of a conversation, the ``last`` turn
    of the assistant is learned from, ``all`` of them, or those whose key ``turns`` (such as ``weight``) is not 0; its
    completion begins with the first of these, or where the column of the completion does. ``prompt_id`` or ``id``
    identifies the prompt, else its text does. ``max_length`` limits prompt + completion, ``max_completion_tokens`` the
    completion, both in tokens; longer completions are cut. ``columns`` renames columns first. Text that spells a
    special token makes a row bad, or is counted with ``special_tokens="allow"``. ``bad`` collects the counts, which
    otherwise become warnings. Raises UserError naming the row (from 1) and the column, unless ``bad`` drops such rows.
    """
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        names = f" ({', '.join(map(str, rows))})" if isinstance(rows, Mapping) else ""
        raise UserError(
            f"from_trl takes the rows of one data set, and this is {kind_of(rows)}{names}: give a list of rows"
        )
    if isinstance(rows, datasets.Dataset):
        items: Iterator[Item] = batch_rows(rows.with_format("arrow").iter(BATCH), "")
        items = ((place.strip(), row) for place, row in items)
    else:
        items = ((f"row {number}", object_row(row, "row")) for number, row in enumerate(rows, 1))
    encoding = _Encoding(tokenizer, max_length, max_completion_tokens, special_tokens, turns)
    with collecting(bad) as bad:
        return OfflineBuffer.of_checked(cache.spooled(_rows(items, encoding, columns or {}, bad)))


def read_buffer(
    where: str,
    tokenizer: Any,
    max_completion_tokens: int | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    bad: BadRows | None = None,
    special_tokens: Special = "reject",
    fits: Fits | None = None,
    max_length: int | None = None,
    turns: str = LAST,
) -> OfflineBuffer:
    """A saved buffer (see `OfflineBuffer.load`), or a table or Hub data set in a format that `from_trl` reads.

    ``split``, ``columns``, ``special_tokens`` and ``turns`` are for tables. Demonstrations, and all completions of a
    table, are cut to ``max_completion_tokens``, and to what the prompt leaves of ``max_length``. A row that does not
    fit the model (``fits``, as from `Policy.row_check`) is a bad row. Raises UserError naming ``where``, the row and
    the column.

    Tokens are kept in the cache of `datasets` (`rlzoo.buffers.cache`) for the next time that the same table is read.
    """
    encoding = _Encoding(tokenizer, max_length, max_completion_tokens, special_tokens, turns, fits)
    with collecting(bad) as bad:
        return _read_buffer(where, bad, split, columns or {}, encoding)


def require_table(where: str, split: str | None = None) -> None:
    """Raise UserError unless there is something that `read_buffer` could read, before a model is loaded for it."""
    if not storage.is_folder(where):
        SourceTable.find(where, split)


def _read_buffer(where: str, bad: BadRows, split: str | None, columns: Columns, encoding: _Encoding) -> OfflineBuffer:
    if storage.is_folder(where):
        _require_plain(where, split, columns)
        return _saved(where, encoding, bad)
    table = SourceTable.find(where, split)
    settings = {"source": where, "split": split, "columns": columns, "bad_rows": bad.mode, **encoding.settings}
    key = cache.key(table.files, encoding.tokenizer, settings) if bad.untouched and encoding.is_known else None
    if (found := cache.find(key, bad)) is not None:
        return OfflineBuffer.of_checked(found)
    items, seen = table.rows(), list[Item]()
    for item in items:
        seen.append(item)
        if isinstance(item[1], dict):
            break
    if isinstance(seen[-1][1], dict) and {"prompt_ids", "completion_ids"} <= set(seen[-1][1]):
        _require_plain(where, split, columns)
        return _saved(where, encoding, bad)
    return OfflineBuffer.of_checked(
        cache.spooled(_rows(itertools.chain(seen, items), encoding, columns, bad), key, bad)
    )


def _require_plain(where: str, split: str | None, columns: Columns) -> None:
    """Raise UserError for settings of a table that are given with a saved buffer."""
    if columns:
        raise UserError(f"{where} is a saved buffer: only a table's columns can be given other names")
    if split is not None:
        raise UserError(f"{where} is a saved buffer, which has no split {split!r}: leave the split out")


def _saved(where: str, encoding: _Encoding, bad: BadRows) -> OfflineBuffer:
    """A saved buffer with its demonstrations cut. Samples are not cut, as their rewards are for the whole."""
    buffer, limit, whole = OfflineBuffer.load(where, bad), encoding.max_completion_tokens, encoding.max_length
    if any(
        most is not None and (buffer.tokens(*names) > most).any()
        for most, *names in ((limit, "completion_ids"), (whole,))
    ):
        buffer = OfflineBuffer.from_trajectories(_cut(buffer, encoding, bad))
    if encoding.fits is None or bad.mode == "reject":  # the caller checks all rows at once
        return buffer
    return _fitting(buffer, encoding.fits, bad)


def _cut(buffer: OfflineBuffer, encoding: _Encoding, bad: BadRows) -> Iterator[Trajectory]:
    """The rows of a saved buffer, with demonstrations cut; one of which nothing to learn from is left is bad."""
    whole, left = encoding.max_length, 0
    for number, row in enumerate(buffer, 1):
        rooms = (encoding.max_completion_tokens, None if whole is None else max(1, whole - len(row.prompt_ids)))
        limit, place = min(room for room in rooms if room is not None), f"row {number} of the buffer"
        if row.source == "demonstration" and len(row.completion_ids) > limit:
            tokens = len(row.completion_ids)
            with bad.at(place):
                row = _shortened(row, limit, encoding.tokenizer)
            if len(row.completion_ids) > limit:
                continue
            bad.note(place, {CUT: f"{limit} of {tokens} tokens are kept"})
        left += 1
        yield row
    bad.require_some(left)


def _shortened(row: Trajectory, limit: int, tokenizer: Any) -> Trajectory:
    """The row with the first tokens of its completion. Raises UserError if none of them is learned from."""
    kept, mask, tokens = row.completion_ids[:limit], row.completion_mask, len(row.completion_ids)
    if mask is not None and not any(mask[:limit]):
        raise UserError(
            f"the tokens learned from begin after the first {limit} of the completion, which are kept: raise "
            "max_completion_tokens or max_length, or drop the row"
        )
    values = {name: value and value[:limit] for name, value in vars(row).items() if name.endswith("_logp")}
    inputs = {name: value[:limit] if len(value) == tokens else value for name, value in row.inputs.items()}
    return replace(
        row, completion=tokenizer.decode(kept), completion_ids=kept, truncated=True, inputs=inputs,
        completion_mask=None if mask is None or all(mask[:limit]) else mask[:limit], completion_messages=None, **values,
    )  # fmt: skip


def _fitting(buffer: OfflineBuffer, fits: Fits, bad: BadRows) -> OfflineBuffer:
    """The rows of a saved buffer that the model can take."""
    kept, bad.rows = [], max(bad.rows, len(buffer))
    for index, ids in enumerate(itertools.chain.from_iterable(buffer.ids())):
        with bad.at(f"row {index + 1} of the buffer"):
            fits(*ids)
            kept.append(index)
    bad.require_some(len(kept))
    return buffer if len(kept) == len(buffer) else OfflineBuffer(buffer.rows.select(kept))


class _Encoding(NamedTuple):
    """How the texts of a table are tokenised."""

    tokenizer: Any
    max_length: int | None
    max_completion_tokens: int | None
    special_tokens: Special
    turns: str = LAST
    fits: Fits | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All but the tokenizer, as plain data."""
        return {
            "max_length": self.max_length,
            "max_completion_tokens": self.max_completion_tokens,
            "special_tokens": self.special_tokens,
            "turns": self.turns,
            "fits": repr(self.fits),
        }

    @property
    def is_known(self) -> bool:
        """Whether its settings determine it, so that rows can be cached: an arbitrary ``fits`` may do anything."""
        return self.fits is None or isinstance(self.fits, RowCheck)

    def steps(self, example: Example, row: Row) -> Steps[Encoded]:
        limits = self.max_length, self.max_completion_tokens
        if example.tokens is not None:
            made = encode_tokens(self.tokenizer, *example.tokens, *limits)
        else:
            options = {} if isinstance(example.prompt, str) else options_of(row)
            made = yield from encode_steps(
                self.tokenizer, example.prompt, example.completion, *limits, self.special_tokens, options,
                example.learned,
            )  # fmt: skip
        made = replace(made, notes={**made.notes, **example.notes}) if example.notes else made
        if self.fits is not None:
            self.fits(made.prompt_ids, made.completion_ids)
        return made


Form = tuple[ExampleFormat, bool]
"""The format of a row, and whether it is conversational."""


def _rows(items: Iterator[Item], encoding: _Encoding, columns: Columns, bad: BadRows) -> Iterator[dict[str, Any]]:
    """The buffer's rows. The first good row, which gives the format, is encoded alone, and then many together."""
    first: Form | None = None
    made = 0

    def size() -> int:
        return 1 if first is None else BATCH

    for chunk in chunks(items, size):
        encoded = iter(encode_batch(encoding.tokenizer, (_steps(row, encoding, columns, first) for _, row in chunk)))
        for place, _ in chunk:
            bad.rows += 1
            rows: list[dict[str, Any]] = []
            with bad.at(place):
                read, form = got(next(encoded))
                rows = [to_row(trajectory) for _, trajectory in read]
                for number, (one, _) in enumerate(read, 1):
                    bad.note(place if len(read) == 1 else f"{place}, completion {number}", one.notes)
                first = first or form
            made += len(rows)
            yield from rows
    bad.require_some(made)
    if not made:
        raise UserError("the data set has no rows: it is empty")


Read = list[tuple[Encoded, Trajectory]]


def _steps(
    item: dict[str, Any] | UserError, encoding: _Encoding, columns: Columns, first: Form | None
) -> Steps[tuple[Read, Form]]:
    """What a row gives, and its format, which must be that of the ``first`` one."""
    if isinstance(item, UserError):
        raise item
    with _in_their_words(item, columns):
        chat, last = bool(getattr(encoding.tokenizer, "chat_template", None)), encoding.turns == LAST
        row = as_trl(renamed(item, columns) if columns else item, chat, last)
        form = recognise(row)
        if first is not None:
            require_same(first, form)
        return (yield from _read_row(row, form[0], encoding)), form


@contextmanager
def _in_their_words(row: Row, columns: Columns) -> Iterator[None]:
    """Errors name a column as in the table: ``conversations`` for what is read as ``messages``."""
    called: dict[str, Any] = {name: alias for alias, name in aliases(row).items()}
    called |= {name: old if isinstance(old, str) else ", ".join(old or ()) for name, old in columns.items()}
    try:
        yield
    except UserError as error:
        found = re.sub(r"column '(\w+)'", lambda match: f"column {called.get(match[1]) or match[1]!r}", str(error))
        raise UserError(found) from None


def _read_row(row: Row, form: ExampleFormat, encoding: _Encoding) -> Steps[Read]:
    for name in form.columns:
        find(row, name)  # raises for one that is not plain data
    known = usable(row)
    names = (
        ("prompt_id",) if form is GRADED else ("prompt_id", "id")
    )  # the id of a graded sample may be its own, not the prompt's
    name = next((name for name in names if own_id(known.get(name)) is not None), "prompt_id")
    columns = {key: value for key, value in known.items() if key not in (*form.columns, name)}
    examples = form.read(row, encoding.turns)
    filled = [column for column in COMPLETIONS if column in form.columns]
    for place, example in enumerate(examples if filled else ()):
        require_text(example, filled[place % len(filled)])
    read: Read = []
    for example in examples:
        encoded = yield from encoding.steps(example, known)
        trajectory = Trajectory(
            prompt=encoded.prompt,
            completion=encoded.completion,
            prompt_ids=encoded.prompt_ids,
            completion_ids=encoded.completion_ids,
            truncated=encoded.truncated,
            completion_mask=encoded.mask,
            completion_messages=encoded.messages,
            prompt_id=own_id(known.get(name)) or encoded.key,
            source=example.source,
            reward=example.reward,
            messages=None if isinstance(example.prompt, str) else example.prompt,
            columns=columns,
        )
        read.append((encoded, trajectory))
    return read
