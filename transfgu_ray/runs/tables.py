"""The tables of a run folder. Any Parquet reader opens them without this package."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 3
_ENCODING: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}


def features_schema(embed_dim: int) -> pa.Schema:
    """Return the schema of the features: one row per kept crop, about 2 * embed_dim + 60 bytes.

    image_id: path relative to the dataset root. crop_id: index in `enumerate_windows`. box_xyxy: px of the original
    image, half-open. window_frac: beta. kind: foreground, background or any. foreground_frac: 0-1.
    cls_token: final normalised class token.
    """
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("crop_id", pa.int32(), nullable=False),
            pa.field("box_xyxy", pa.list_(pa.int32(), 4), nullable=False),
            pa.field("window_frac", pa.float32(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("foreground_frac", pa.float32(), nullable=False),
            pa.field("cls_token", pa.list_(pa.float16(), embed_dim), nullable=False),
        ]
    )


def concepts_schema(embed_dim: int) -> pa.Schema:
    """Return the schema of the concepts: one row per concept.

    kind: foreground, background or any. num_crops: crops nearest to the centroid.
    """
    return pa.schema(
        [
            pa.field("concept_id", pa.int32(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("centroid", pa.list_(pa.float32(), embed_dim), nullable=False),
            pa.field("num_crops", pa.int64(), nullable=False),
        ]
    )


def labels_schema() -> pa.Schema:
    """Return the schema of the pseudo-label bank: one row per image, about 110 kB at K = 171 on 40 x 40 patches.

    scores: a code 0-63 per concept and patch, uint8, K x grid_h x grid_w in C order, so that
    numpy.frombuffer(scores, "u1").reshape(-1, grid_h, grid_w).argmax(0) is the exact winner of each patch. Code 0 is a
    score of 0, code c a score of low + sqrt((c - 1) / 62) * (high - low). low, high: little-endian float16 in [0, 1],
    grid_h x grid_w.
    foreground: uint8 0/1, grid_h x grid_w. path: where the photograph was read from.
    """
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("path", pa.string(), nullable=False),
            pa.field("height_px", pa.int32(), nullable=False),
            pa.field("width_px", pa.int32(), nullable=False),
            pa.field("grid_h", pa.int32(), nullable=False),
            pa.field("grid_w", pa.int32(), nullable=False),
            pa.field("scores", pa.binary(), nullable=False),
            pa.field("low", pa.binary(), nullable=False),
            pa.field("high", pa.binary(), nullable=False),
            pa.field("foreground", pa.binary(), nullable=False),
        ]
    )


def tokens_schema() -> pa.Schema:
    """Return the schema of the decoder's input tokens: one row per image of the bank, 1.2 MB for ViT-S/8 at 320 px.

    tokens: little-endian float16, grid_h x grid_w x c in C order, so that
    numpy.frombuffer(tokens, "<f2").reshape(grid_h, grid_w, -1) reads it.
    """
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("grid_h", pa.int32(), nullable=False),
            pa.field("grid_w", pa.int32(), nullable=False),
            pa.field("tokens", pa.binary(), nullable=False),
        ]
    )


def baseline_schema(widths: dict[str, int]) -> pa.Schema:
    """Return the schema of the patches that the bottom-up baselines cluster: one row per drawn training patch.

    patch: index on the grid, row by row. Then one column per kind of features of the patch. view_1, view_2: the tokens
    of one place in two views; its index on the grid of the first view is that of the patch.

    Args:
        widths: width of each kind of features.
    """
    features = [pa.field(name, pa.list_(pa.float16(), width), nullable=False) for name, width in widths.items()]
    identity = [pa.field("image_id", pa.string(), nullable=False), pa.field("patch", pa.int32(), nullable=False)]
    return pa.schema([*identity, *features])


def confusions_schema() -> pa.Schema:
    """Return the schema of the confusions, sparse matrices: one row per photograph, method, class and concept.

    method: a stage (initial, trained, bootstrapped), `refined`, or a baseline. class_id: the true class; void pixels
    are left out. concept_id: the predicted concept, or cluster of a baseline. pixels: at the scored size, at least 1.
    """
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("method", pa.string(), nullable=False),
            pa.field("class_id", pa.int32(), nullable=False),
            pa.field("concept_id", pa.int32(), nullable=False),
            pa.field("pixels", pa.int64(), nullable=False),
        ]
    )


def atlas_schema() -> pa.Schema:
    """Return the schema of the atlas: one row per picture of a concept.

    what: `crop`, a crop of the concept, or `map`, a photograph lit where the concept responds. rank: 0 is the best.
    box_xyxy: px of the photograph, half-open. value: distance of the crop to the centroid, or the mean response.
    picture: WebP.
    """
    return pa.schema(
        [
            pa.field("concept_id", pa.int32(), nullable=False),
            pa.field("what", pa.string(), nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("box_xyxy", pa.list_(pa.int32(), 4), nullable=False),
            pa.field("value", pa.float32(), nullable=False),
            pa.field("picture", pa.binary(), nullable=False),
        ]
    )


def build_table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Build a table with exactly the schema's columns; 2-D arrays become fixed-size lists.

    Raises:
        pyarrow.ArrowInvalid: a value does not fit its type.
        KeyError: a column is missing.
    """
    arrays = []
    for field in schema:
        value = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.array(value.reshape(-1), type=field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            arrays.append(pa.array(value, type=field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def to_parquet(table: pa.Table, metadata: dict[str, str], *, rows_apart: bool = False) -> pa.Buffer:
    """Return a table as Parquet bytes (zstd) with string metadata in its footer. Equal input gives equal bytes.

    Pages have checksums, so that a reader meets damage.

    Args:
        table: at most some hundred MB.
        metadata: for the footer.
        rows_apart: let each row be one row group, and what `row_slices` finds of it a Parquet file of its own. Any
            reader opens the whole as usual: between row groups a footer of the row before is passed over.
    """
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({"schema_version": str(SCHEMA_VERSION), **metadata})
    if not rows_apart:
        pq.write_table(table, sink, **_ENCODING)
        return sink.getvalue()
    # The least and greatest value of a map are as large as the map, and a dictionary of one value is no shorter.
    how: dict[str, Any] = {**_ENCODING, "write_statistics": False, "use_dictionary": False}
    with pq.ParquetWriter(sink, table.schema, **how) as writer:
        for row in range(table.num_rows):
            one = table.slice(row, 1)
            writer.write_table(one)
            alone = pa.BufferOutputStream()
            pq.write_table(one.replace_schema_metadata(), alone, store_schema=False, **how)
            whole = alone.getvalue()
            footer = int.from_bytes(whole[-8:-4], "little") + 8
            # The writer asks the sink where it stands before each column.
            sink.write(whole.slice(len(whole) - footer))
    return sink.getvalue()


def row_slices(footer: pq.FileMetaData, num_bytes: int) -> tuple[list[int], list[int]]:
    """Return the first byte, and the number of bytes, of what `to_parquet` wrote of each row apart.

    Args:
        footer: of the whole file.
        num_bytes: of the whole file.
    """
    starts = [footer.row_group(i).column(0).data_page_offset for i in range(footer.num_row_groups)]
    ends = [*starts, num_bytes - footer.serialized_size - 8][1:]
    # A file begins with four bytes of its own, which nobody reads: here those before the row.
    offsets = [start - 4 for start in starts]
    return offsets, [end - offset for offset, end in zip(offsets, ends, strict=True)]


def read_parquet(file: pa.NativeFile, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table, or some of its columns, in one go; its pages must have the checksums that they were written with.

    Raises:
        OSError, pa.ArrowInvalid: the content is damaged.
    """
    whole = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=True)
    return whole.read(None if columns is None else list(columns), use_threads=False).replace_schema_metadata()


def vectors(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of fixed-size lists as an array (rows, width), without a copy where Arrow's memory allows."""
    values = column.combine_chunks()
    flat: np.ndarray = values.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, values.type.list_size)
