"""Buffers: one row schema, two kinds of buffer, views over them, and importers of other formats and logs."""

from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.buffer import Buffer, OfflineBuffer, RolloutBuffer
from rlzoo.buffers.exports import to_trl
from rlzoo.buffers.formats import from_trl, read_buffer, require_table
from rlzoo.buffers.importer import Importer, LoggedSample, get_importer, list_importers, register_importer
from rlzoo.buffers.importing import import_log
from rlzoo.buffers.overview import overview
from rlzoo.buffers.schema import SCHEMA
from rlzoo.buffers.tables import load_table
from rlzoo.buffers.views import View
from rlzoo.policy.encoding import Encoded, encode, encode_completion, encode_prompt, prompt_key

__all__ = [
    "SCHEMA",
    "BadRows",
    "Buffer",
    "Encoded",
    "Importer",
    "LoggedSample",
    "OfflineBuffer",
    "RolloutBuffer",
    "View",
    "encode",
    "encode_completion",
    "encode_prompt",
    "from_trl",
    "get_importer",
    "import_log",
    "list_importers",
    "load_table",
    "overview",
    "prompt_key",
    "read_buffer",
    "register_importer",
    "require_table",
    "to_trl",
]
