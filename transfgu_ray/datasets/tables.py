"""Parquet tables with encoded images: which columns hold what, and how rows are read."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from transfgu_ray.errors import DataError
from transfgu_ray.storage import Folder

ENDINGS = (".parquet",)
# Names that columns go by, the first one there counts. Of a Hugging Face table a column of images is a struct of
# `bytes` and `path`.
_IMAGES = ("bytes", "image", "img", "jpg", "png", "pixel_values")
_MASKS = ("mask", "label", "annotation", "segmentation")
_LABELS = ("label",)
_NAMES = ("path", "file_name", "image_id", "id", "__key__")
_BYTES, _PATH = "bytes", "path"
_ROWS_AT_ONCE = 64
# Of a row group that is kept for the next reader of this process.
_KEPT_BYTES = 64 * 2**20
_BUFFER_BYTES = 2**20
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class TableLayout:
    """The columns of a table of images, as Parquet calls them (`image.bytes`); None where there is none.

    Attributes:
        image: encoded images.
        mask: encoded masks.
        label: classes of whole images.
        name: what the images are called.
        group_rows: rows of each row group.
    """

    image: str
    mask: str | None
    label: str | None
    name: str | None
    group_rows: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One row of a table of images; None where the table or the row has no such value.

    Attributes:
        name: what it is called.
        label: its class.
        data: encoded bytes.
        mask: encoded mask.
    """

    name: str | None
    label: str | None
    data: bytes | None
    mask: bytes | None


def read_layout(root: Folder, name: str) -> TableLayout:
    """Return which columns of a table hold what.

    Raises:
        DataError: the table is damaged, or no column holds encoded images.
        OSError: there is no such file, or it is not to be read.
        StorageError: the storage does not answer.
    """
    metadata = _read(root, name, lambda file: file.metadata)
    schema = metadata.schema.to_arrow_schema()
    encoded = {field.name: path for field in schema if (path := _encoded(field)) is not None}
    # Under any name, where there is no doubt.
    others = [column for column in encoded if column not in _MASKS]
    images = [column for column in (*_IMAGES, *(others if len(others) == 1 else ())) if column in encoded]
    if not images:
        raise DataError(
            f"{root.uri_of(name)} has no binary column `bytes` or `image` of encoded images; its columns are "
            f"{', '.join(schema.names)}"
        )
    image = schema.field(images[0])
    names = [column for column in _NAMES if column in schema.names and _is_name(schema.field(column).type)]
    if pa.types.is_struct(image.type) and image.type.get_field_index(_PATH) >= 0:
        names.append(f"{image.name}.{_PATH}")
    return TableLayout(
        image=encoded[image.name],
        mask=next((encoded[column] for column in _MASKS if column in encoded), None),
        label=next((column for column in _LABELS if column in schema.names and column not in encoded), None),
        name=names[0] if names else None,
        group_rows=tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)),
    )


def _encoded(field: pa.Field) -> str | None:
    """Return the path of the encoded bytes that a column holds; None if it holds none."""
    if pa.types.is_struct(field.type) and (index := field.type.get_field_index(_BYTES)) >= 0:
        return f"{field.name}.{_BYTES}" if _is_binary(field.type.field(index).type) else None
    return field.name if _is_binary(field.type) else None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_name(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))


def read_names(root: Folder, name: str, layout: TableLayout) -> list[str | None]:
    """Return what the images of a table are called, row by row; see `read_layout`."""
    if layout.name is None:
        return [None] * sum(layout.group_rows)
    column = layout.name
    return [
        _text(value)
        for value in _read(root, name, lambda file: _leaf(file.read([column], use_threads=False), column)).to_pylist()
    ]


def read_rows(root: Folder, name: str, layout: TableLayout, groups: Sequence[int]) -> Iterator[Row]:
    """Yield the rows of some row groups, which are in memory together; see `read_layout`."""
    paths = [layout.name, layout.label, layout.image, layout.mask]
    wanted = [path for path in paths if path is not None]
    for batch in _read(
        root, name, lambda file: file.read_row_groups(list(groups), wanted, use_threads=False)
    ).to_batches(_ROWS_AT_ONCE):
        columns = [[None] * len(batch) if path is None else _leaf(batch, path).to_pylist() for path in paths]
        for called, label, data, mask in zip(*columns, strict=True):
            yield Row(_text(called), None if label is None else str(label), data, mask)


def read_cells(root: Folder, name: str, column: str, cells: Sequence[tuple[int, int]]) -> list[bytes | None]:
    """Return some values of one column; None where there is none. See `read_layout`.

    Args:
        root: any folder.
        name: of the table in it.
        column: its path, as in a layout.
        cells: row group, and row in it, of each.
    """
    info: pafs.FileInfo = root.patiently(name, lambda: root.fs.get_file_info(root.join(name)))
    groups: dict[int, set[int]] = {}
    for group, row in cells:
        groups.setdefault(group, set()).add(row)
    found: dict[tuple[int, int], bytes | None] = {}
    for group, rows in groups.items():
        # Neighbours are likely to be asked for next; a single row comes from a draw among all.
        values = _kept_group(root.uri, name, info.size, info.mtime_ns, column, group) if len(rows) > 1 else None
        if values is None:
            found |= _read(root, name, functools.partial(_scan, column=column, group=group, rows=rows))
        else:
            found |= {(group, row): values[row].as_py() for row in rows}
    return [found[cell] for cell in cells]


@functools.lru_cache(maxsize=2)
def _kept_group(
    uri: str, name: str, num_bytes: int, mtime_ns: int | None, column: str, group: int
) -> pa.ChunkedArray | None:
    """Return a column of a row group, the same one in calls that follow each other; None if it is too large to keep."""

    def read(file: pq.ParquetFile) -> pa.ChunkedArray | None:
        chunks = file.metadata.row_group(group)
        large = max(
            chunks.column(i).total_uncompressed_size
            for i in range(chunks.num_columns)
            if chunks.column(i).path_in_schema == column
        )
        return None if large > _KEPT_BYTES else _leaf(file.read_row_group(group, [column], use_threads=False), column)

    return _read(Folder(uri), name, read)


def _scan(file: pq.ParquetFile, column: str, group: int, rows: set[int]) -> dict[tuple[int, int], bytes | None]:
    """Return some values of a row group, which is read up to the last of them and never in memory as a whole."""
    found: dict[tuple[int, int], bytes | None] = {}
    start, last = 0, max(rows)
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False):
        values = _leaf(batch, column)
        found |= {(group, row): values[row - start].as_py() for row in rows if start <= row < start + len(batch)}
        start += len(batch)
        if start > last:
            break
    return found


def _leaf(table: pa.Table | pa.RecordBatch, path: str) -> Any:
    """Return a column by its path."""
    if path in table.schema.names:
        return table.column(path)
    column, _, field = path.rpartition(".")
    return pc.struct_field(table.column(column), field)


def _text(value: Any) -> str | None:
    # An empty name names nothing.
    return None if value is None or value == "" else str(value)


class _Watched:
    """A file for Parquet that remembers what the storage raised: Parquet calls damaged content an OSError too."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file
        self.error: BaseException | None = None
        self.seek, self.tell, self.size = file.seek, file.tell, file.size

    def read(self, num_bytes: int) -> bytes:
        try:
            data: bytes = self._file.read(num_bytes)
            return data
        except BaseException as error:
            self.error = error
            raise

    def close(self) -> None:
        """Leave the closing to the owner of the file."""

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return bool(self._file.closed)


def _read(root: Folder, name: str, action: Callable[[pq.ParquetFile], _Result]) -> _Result:
    """Do something with an open table; see `read_layout` for what it raises.

    Unlike `Folder.read` it never takes the whole file into memory to tell a damaged table from a failing storage. The
    action must not let Arrow use threads: they would call this file's Python, at the exit of the process too.
    """

    def attempt() -> _Result:
        with root.fs.open_input_file(root.join(name)) as file:
            watched = _Watched(file)
            try:
                source = pa.PythonFile(watched, mode="r")
                return action(pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False))
            except (OSError, pa.ArrowException, ValueError, LookupError) as error:
                if watched.error is not None:
                    raise watched.error from None
                reason = " ".join(str(error).split())[:120]
                raise DataError(
                    f"{root.uri_of(name)} is not a readable Parquet file: {reason}; write it again"
                ) from None

    return root.patiently(name, attempt)
