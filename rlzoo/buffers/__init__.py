"""Buffers: one row schema, two kinds of buffer, views over them, and importers of TRL's formats."""

from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.buffer import Buffer, OfflineBuffer, RolloutBuffer
from rlzoo.buffers.exports import to_trl
from rlzoo.buffers.formats import from_trl, read_buffer
from rlzoo.buffers.schema import SCHEMA
from rlzoo.buffers.tables import load_table
from rlzoo.buffers.views import View
from rlzoo.policy.encoding import Encoded, encode, encode_completion, encode_prompt, prompt_key

__all__ = [
    "SCHEMA",
    "BadRows",
    "Buffer",
    "Encoded",
    "OfflineBuffer",
    "RolloutBuffer",
    "View",
    "encode",
    "encode_completion",
    "encode_prompt",
    "from_trl",
    "load_table",
    "prompt_key",
    "read_buffer",
    "to_trl",
]
