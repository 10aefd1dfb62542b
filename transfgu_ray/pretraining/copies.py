"""Working copies: every readable image decoded and squared once, in files whose rows can be read one by one.

No photograph is then decoded again, and the rows of a table can be read in any order.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from transfgu_ray.runs.tables import build_table
from transfgu_ray.storage import Folder

COPIES = "images"
INDEX = f"{COPIES}/index.parquet"
NO_LABEL = -1
# A row of the index says which row of which file holds an image.
INDEX_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Copies:
    """The images of a pretraining, as rows of the index.

    Attributes:
        index: one row per readable image, see `INDEX_SCHEMA`.
        train: rows to train on.
        val: rows held out for validation.
        classes: class of each row of the index, numbered from 0; `NO_LABEL` where there is none.
    """

    index: pa.Table
    train: Int64[np.ndarray, " n"]
    val: Int64[np.ndarray, " m"]
    classes: Int64[np.ndarray, " all"]

    def places(self, rows: Int64[np.ndarray, " n"]) -> pa.Table:
        """Return file and row of the given images."""
        return self.index.select(["file", "row"]).take(pa.array(rows))


def open_copies(folder: Folder, seed: int, num_val: int) -> Copies:
    """Open finished working copies; where no image is of the split val, hold out `num_val` by the seed.

    At most a tenth of the images is held out, and at least one.
    """
    # Taking rows is fast only from a single chunk.
    index = folder.read(INDEX, pq.read_table).combine_chunks()
    is_val = index["split"].to_numpy() == "val"
    if not is_val.any():
        held_out = max(1, min(num_val, len(index) // 10))
        is_val[np.random.default_rng([seed, 1]).permutation(len(index))[:held_out]] = True
    labels = index["label"].to_pylist()
    numbers = {label: number for number, label in enumerate(sorted({label for label in labels if label is not None}))}
    classes = np.array([numbers.get(label, NO_LABEL) for label in labels], dtype=np.int64)
    return Copies(index, np.flatnonzero(~is_val), np.flatnonzero(is_val), classes)


def build_index(rows: list[dict[str, object]]) -> pa.Table:
    """Build a table of `INDEX_SCHEMA` from its rows."""
    return build_table({name: [row[name] for row in rows] for name in INDEX_SCHEMA.names}, INDEX_SCHEMA)


def pack(squares: list[UInt8[np.ndarray, "3 s s"]]) -> pa.Buffer:
    """Return Arrow IPC bytes with one record batch per image, so that each can be read alone."""
    kind = pa.fixed_shape_tensor(pa.uint8(), squares[0].shape)
    schema = pa.schema([pa.field("pixels", kind, nullable=False)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for square in squares:
            flat = pa.FixedSizeListArray.from_arrays(pa.array(square.reshape(-1)), square.size)
            writer.write_batch(pa.record_batch([pa.ExtensionArray.from_storage(kind, flat)], schema=schema))
    return sink.getvalue()


def fetch_copies(uri: str, places: pa.Table) -> UInt8[np.ndarray, "n 3 s s"]:
    """Run `read_copies` in a Ray task; this module does not import torch, which keeps the process small."""
    return read_copies(Folder(uri), places)


def read_copies(folder: Folder, places: pa.Table) -> UInt8[np.ndarray, "n 3 s s"]:
    """Return RGB 0-255 of the images at the given places, in order; each file is opened once."""
    files, rows = places["file"].to_pylist(), places["row"].to_pylist()
    squares: dict[int, np.ndarray] = {}
    wanted: dict[str, list[int]] = {}
    for position, name in enumerate(files):
        wanted.setdefault(name, []).append(position)
    for name, positions in wanted.items():
        found = folder.read(name, partial(_unpack, rows=[rows[position] for position in positions]))
        squares.update(zip(positions, found, strict=True))
    return np.stack([squares[position] for position in range(len(files))])


def _unpack(file: pa.NativeFile, rows: list[int]) -> list[np.ndarray]:
    reader = pa.ipc.open_file(file)
    return [reader.get_batch(row).column(0).to_numpy_ndarray()[0] for row in rows]
