"""Everything the package reads from and writes to disk: bounded, checked reading; atomic writing; safe names.

Readers take nothing on trust: kind of file, size, encoding, nesting, types, shapes are checked before anything is
allocated, and whatever is wrong is an `ErasureError`. Writers leave the old or the new behind, never a half.
"""

from erasure.files.folders import differences, digest, held
from erasure.files.names import inside, is_line, shown
from erasure.files.reading import read_bytes, read_json, read_lines, read_text, validated
from erasure.files.tensors import TENSORS_LIMIT, TensorInfo, read_tensors, tensor_infos
from erasure.files.writing import (
    json_bytes,
    new_folder,
    replace_files,
    settled,
    steady,
    write_bytes,
    write_json,
    write_text,
)

__all__ = [
    "TENSORS_LIMIT", "TensorInfo", "differences", "digest", "held", "inside", "is_line", "json_bytes",
    "new_folder", "read_bytes", "read_json", "read_lines", "read_tensors", "read_text", "replace_files", "settled",
    "shown", "steady", "tensor_infos", "validated", "write_bytes", "write_json", "write_text",
]  # fmt: skip
