"""The one row schema, and the conversion between a `Trajectory` and its row.

Log-probs are stored as float32, in which they are computed; everything else is stored exactly. A row's ``columns`` are
one JSON string, because problems of different tasks have different columns; so is what a message has besides a role and
a text, because Arrow would give every message the keys of all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa
from datasets import List, Value
from datasets.fingerprint import generate_random_fingerprint

from rlzoo.errors import UserError
from rlzoo.types import Trajectory

_MESSAGES = List({"role": Value("string"), "content": Value("string"), "extra": Value("string")})
"""A conversation. ``extra`` is a JSON object of a message's other keys, and of a content that is not text."""
SCHEMA = datasets.Features(
    {
        "prompt": Value("string"),
        "completion": Value("string"),
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(Value("int32")),
        "prompt_id": Value("string"),
        "source": Value("string"),
        "reward": Value("float64"),
        "reward_components": List({"name": Value("string"), "value": Value("float64")}),
        "behaviour_logp": List(Value("float32")),
        "sampler_logp": List(Value("float32")),
        "reference_logp": List(Value("float32")),
        "tempered_reference_logp": List(Value("float32")),
        "policy_version": Value("int32"),
        "truncated": Value("bool"),
        "temperature": Value("float64"),
        "top_p": Value("float64"),
        "messages": _MESSAGES,
        "columns": Value("string"),
        "inputs": List({"name": Value("string"), "values": List(Value("float32"))}),
        "completion_mask": List(Value("bool")),
        "completion_messages": _MESSAGES,
    }
)
LOG_PROBS = ("behaviour_logp", "sampler_logp", "reference_logp", "tempered_reference_logp")
CONVERSATIONS = ("messages", "completion_messages")
NULLABLE = frozenset({"reward", "completion_mask", *CONVERSATIONS, *LOG_PROBS})
ADDED = frozenset({"completion_mask", "completion_messages"})
"""Columns that a buffer of an earlier version lacks: they are null."""
ADDED_FIELDS = frozenset({"extra"})
"""Fields of structs that a buffer of an earlier version lacks."""
SOURCES = ("demonstration", "policy", "preference")
"""The values that a row's ``source`` may have."""
SAMPLING = {"temperature": (sys.float_info.max, "above 0"), "top_p": (1.0, "above 0 and at most 1")}
"""Sampling settings of a row → the largest value, and the bounds in words."""
CHUNK = 10_000
"""How many rows are Python objects at a time when many are written or read."""

_NAMES = [f.name for f in fields(Trajectory)]


def to_row(trajectory: Trajectory) -> dict[str, Any]:
    """The row of a trajectory. Raises ValueError for log-probs of another length than the completion."""
    for name in LOG_PROBS:
        values = getattr(trajectory, name)
        if values is not None and len(values) != len(trajectory.completion_ids):
            raise ValueError(
                f"{name} of prompt {trajectory.prompt_id!r} has {len(values)} values for "
                f"{len(trajectory.completion_ids)} completion tokens"
            )
    return unchecked_row(trajectory)


def unchecked_row(trajectory: Trajectory) -> dict[str, Any]:
    """`to_row` without its checks."""
    row = {name: getattr(trajectory, name) for name in _NAMES}
    row["reward_components"] = encode_components(trajectory.reward_components)
    row["columns"] = _to_json(trajectory.columns, "column")
    row["inputs"] = encode_inputs(trajectory.inputs)
    for name in CONVERSATIONS:
        row[name] = encode_messages(row[name])
    return row


def from_row(row: dict[str, Any]) -> Trajectory:
    """The trajectory of a row: the inverse of `to_row`."""
    decoded = {name: decode(name, row[name]) for name in ("reward_components", "columns", "inputs", *CONVERSATIONS)}
    return Trajectory(**{**row, **decoded})


def encode_components(components: dict[str, float | None]) -> list[dict[str, Any]]:
    """Components of a reward as the list of structs that Arrow stores."""
    return [{"name": name, "value": value} for name, value in components.items()]


def encode_inputs(inputs: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Stored inputs as the list of structs that Arrow stores."""
    return [{"name": name, "values": list(values)} for name, values in inputs.items()]


def encode_messages(messages: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """A conversation as the list of structs that Arrow stores. Raises UserError for a value that JSON cannot hold."""
    return None if messages is None else [_message_struct(message) for message in messages]


def _message_struct(message: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: message[name] for name in ("role", "content") if isinstance(message.get(name), str)}
    extra = {name: value for name, value in message.items() if name not in texts}
    says = "content" in texts or any(value is not None for value in extra.values())
    others = _to_json(extra, "key of a message") if extra and says else None
    return {"role": texts.get("role"), "content": texts.get("content"), "extra": others}


def _message(struct: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: struct[name] for name in ("role", "content") if struct[name] is not None}
    return texts if struct["extra"] is None else {**texts, **json.loads(struct["extra"])}


def decode(name: str, value: Any) -> Any:
    """The value of a field of a `Trajectory`, from what its column stores."""
    if name in CONVERSATIONS:
        return None if value is None else [_message(one) for one in value]
    if name == "reward_components":
        return {one["name"]: one["value"] for one in value}
    if name == "inputs":
        return {one["name"]: one["values"] for one in value}
    return json.loads(value) if name == "columns" else value


def to_table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """An Arrow table of rows, built from `CHUNK` of them at a time."""
    tables = list(to_tables(rows, CHUNK))
    return pa.concat_tables(tables) if tables else SCHEMA.arrow_schema.empty_table()


def to_tables(rows: Iterable[dict[str, Any]], size: int) -> Iterator[pa.Table]:
    """Arrow tables of ``size`` rows each."""
    left, schema = iter(rows), SCHEMA.arrow_schema
    for chunk in iter(lambda: list(islice(left, size)), []):
        yield pa.Table.from_pylist(chunk, schema=schema)


def to_dataset(table: pa.Table) -> datasets.Dataset:
    """The table as a data set, with a random fingerprint, because hashing the rows would read all of them."""
    return datasets.Dataset(table, fingerprint=generate_random_fingerprint())


def arrow(rows: datasets.Dataset) -> pa.Table:
    """The Arrow table of a data set, without a copy unless its rows were shuffled or selected."""
    return rows.with_format("arrow")[:]


def _to_json(values: dict[str, object], what: str) -> str:
    """The values of a ``what`` each as JSON. Raises UserError naming one that JSON cannot hold."""
    try:
        return json.dumps(values, ensure_ascii=False)
    except (TypeError, ValueError):
        bad = next(name for name, value in values.items() if not _is_json(value))
        kind = type(values[bad]).__name__
        raise UserError(f"{what} {bad!r} holds a {kind}, which JSON cannot hold: drop or convert it") from None


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
