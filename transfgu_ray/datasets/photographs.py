"""The photographs of a dataset: one, and many of them in as little memory as their names take."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import pyarrow as pa

_ROWS_AT_ONCE = 2**16
_SCHEMA = pa.schema(
    {"image_id": pa.string(), "label_id": pa.string(), "num_bytes": pa.int64(), "place": pa.string()}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A photograph of a dataset.

    Attributes:
        image_id: path relative to the dataset root, or the photograph's name in a shard; stable on every machine.
        label_id: place of its label, see `places`; None without one, or where labels were not requested.
        num_bytes: size of the file; -1 where the listing does not say.
        place: where its bytes are, see `places`; "" stands for the file `image_id`.
    """

    image_id: str
    label_id: str | None
    num_bytes: int
    place: str = ""

    def __post_init__(self) -> None:
        """Make `place` complete."""
        object.__setattr__(self, "place", self.place or self.image_id)


class Images(Sequence[ImageRef]):
    """Photographs as columns of Arrow: some 60 bytes each, where an object for each would take 500.

    Args:
        images: their names are UTF-8.
    """

    def __init__(self, images: Iterable[ImageRef]) -> None:
        self._table = pa.Table.from_batches([*_batches(images)], _SCHEMA)

    @classmethod
    def _of(cls, table: pa.Table) -> "Images":
        found = cls(())
        found._table = table
        return found

    def without_labels(self) -> "Images":
        """Return the same photographs, whose labels are not wanted."""
        if self._table["label_id"].null_count == len(self):
            return self
        at = _SCHEMA.get_field_index("label_id")
        return self._of(self._table.set_column(at, _SCHEMA.field(at), pa.nulls(len(self), pa.string())))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[ImageRef]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            columns = self._table.slice(start, _ROWS_AT_ONCE).to_pydict().values()
            for image_id, label_id, num_bytes, place in zip(*columns, strict=True):
                yield ImageRef(image_id, label_id, num_bytes, place or "")

    @overload
    def __getitem__(self, at: int) -> ImageRef: ...
    @overload
    def __getitem__(self, at: slice) -> "Images": ...
    def __getitem__(self, at: int | slice) -> "ImageRef | Images":
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step != 1:
                return self._of(self._table.take(pa.array(range(start, stop, step), pa.int64())))
            return self._of(self._table.slice(start, max(0, stop - start)))
        (found,) = self[range(len(self))[at] : range(len(self))[at] + 1]
        return found

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Images):
            return bool(self._table.equals(other._table))
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(ImageRef.__eq__, self, other))

    def __hash__(self) -> int:
        return hash(len(self))


def _batches(images: Iterable[ImageRef]) -> Iterator[pa.RecordBatch]:
    rows: list[tuple[str, str | None, int, str | None]] = []
    for image in images:
        own = None if image.place == image.image_id else image.place
        rows.append((image.image_id, image.label_id, image.num_bytes, own))
        if len(rows) == _ROWS_AT_ONCE:
            yield _batch(rows)
            rows = []
    yield _batch(rows)


def _batch(rows: list[tuple[str, str | None, int, str | None]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else ([] for _ in _SCHEMA)
    return pa.record_batch(
        [pa.array(list(column), of.type) for column, of in zip(columns, _SCHEMA, strict=True)], _SCHEMA
    )
