"""What an index says of parts, against the parts themselves."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transfgu_ray.errors import ArtifactError
from transfgu_ray.runs import index as index_module
from transfgu_ray.runs.index import (
    IndexWriter,
    PartRecord,
    describe_part,
    indexed_checksums,
    part_metadata,
    part_name,
    read_index,
)
from transfgu_ray.runs.tables import build_table, read_parquet, row_slices, to_parquet, tokens_schema
from transfgu_ray.storage import Folder

METADATA = part_metadata("f", '{"images": 3}', [2, 0, 1])


def tokens(*image_ids: str) -> pa.Table:
    rng = np.random.default_rng(len(image_ids))
    content = [rng.bytes(100 + 7000 * i) for i in range(len(image_ids))]
    grid = [2] * len(image_ids)
    return build_table({"image_id": image_ids, "grid_h": grid, "grid_w": grid, "tokens": content}, tokens_schema())


def test_rows_apart__each_row_is_a_file_of_its_own_inside_one_that_any_reader_opens(tmp_path: Path) -> None:
    table = tokens("a", "b", "c")
    data = to_parquet(table, METADATA, rows_apart=True)
    (tmp_path / "part.parquet").write_bytes(data)
    assert pq.read_table(tmp_path / "part.parquet").replace_schema_metadata().equals(table)
    footer = pq.read_metadata(pa.BufferReader(data))
    assert (footer.num_row_groups, footer.metadata[b"unit_rows"]) == (3, b"[2, 0, 1]")
    offsets, lengths = row_slices(footer, len(data))
    for row, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        one = pq.read_table(pa.BufferReader(data.slice(offset, length)))
        assert one.replace_schema_metadata().equals(table.slice(row, 1))
    assert to_parquet(table, METADATA, rows_apart=True).equals(data)
    assert row_slices(pq.read_metadata(pa.BufferReader(to_parquet(tokens(), {}, rows_apart=True))), 0) == ([], [])


def test_read_parquet__a_flipped_bit_in_a_page_is_told() -> None:
    data = bytearray(to_parquet(tokens("a", "b"), {}, rows_apart=True))
    data[len(data) // 2] ^= 1
    with pytest.raises(OSError, match="CRC checksum verification failed"):
        read_parquet(pa.BufferReader(bytes(data)))


@pytest.mark.parametrize("rows_apart", [True, False])
def test_describe_part__says_what_the_bytes_hold(rows_apart: bool) -> None:
    data = to_parquet(tokens("a", "b", "c"), METADATA, rows_apart=rows_apart)
    record = describe_part(7, data, fingerprint="f", rows_apart=rows_apart)
    assert record is not None
    assert (record.part, record.num_rows, record.num_bytes) == (7, 3, len(data))
    assert record.sha256 == hashlib.sha256(bytes(data)).hexdigest()
    assert (json.loads(record.stats), record.unit_rows.to_pylist()) == ({"images": 3}, [2, 0, 1])
    assert record.image_ids.to_pylist() == (["a", "b", "c"] if rows_apart else [])
    assert PartRecord.of(json.loads(json.dumps(record.as_values()))) == record
    assert len(record.offsets) == len(record.lengths) == len(record.image_ids)
    assert describe_part(7, data, fingerprint="other", rows_apart=rows_apart) is None
    assert describe_part(7, data.slice(0, len(data) - 40), fingerprint="f", rows_apart=rows_apart) is None
    assert describe_part(7, to_parquet(tokens("a"), {}), fingerprint="f", rows_apart=rows_apart) is None


def write_parts(folder: Folder, fingerprint: str = "f") -> dict[int, PartRecord]:
    """Write parts whose numbers have gaps, and lie on both sides of a million."""
    records = {}
    for part, image_ids in {3: ("a",), 100_001: ("b", "c"), 999_999: (), 1_000_000: ("d",)}.items():
        data = to_parquet(tokens(*image_ids), part_metadata(fingerprint, "{}", [1] * len(image_ids)), rows_apart=True)
        folder.write_bytes(part_name("tokens", part), data)
        record = describe_part(part, data, fingerprint=fingerprint, rows_apart=True)
        assert record is not None
        records[part] = record
    return records


def test_index__finds_every_row_in_the_order_of_parts(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    records = write_parts(folder)
    IndexWriter(folder, "tokens", "f").finish(dict(reversed(records.items())))
    index = read_index(folder, "tokens")
    assert index.image_ids.to_pylist() == list("abcd")
    assert index.sizes == {3: 1, 100_001: 2, 999_999: 0, 1_000_000: 1}
    assert [index.image_ids_of(unit) for unit in range(4)] == [["a"], ["b"], ["c"], ["d"]]
    for place, image_id in zip(index.rows.to_pylist(), "abcd", strict=True):
        name = part_name("tokens", place["part"])
        found = folder.read_range(name, place["offset"], place["length"], num_bytes=place["num_bytes"])
        assert read_parquet(pa.BufferReader(found))["image_id"].to_pylist() == [image_id]
    assert indexed_checksums(folder, "tokens") == {
        part_name("tokens", part): record.sha256 for part, record in records.items()
    }
    assert pq.read_table(tmp_path / "tokens").num_rows == 4, "readers of the folder pass over the index"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"PAR1")], ids=["gone", "damaged"])
def test_read_index__a_missing_or_damaged_one_is_told(tmp_path: Path, damage) -> None:
    folder = Folder(str(tmp_path))
    IndexWriter(folder, "tokens", "f").finish(write_parts(folder))
    damage(tmp_path / "tokens/_index/index.parquet")
    with pytest.raises(ArtifactError, match=r"tokens/_index/index\.parquet, which says where .* and --overwrite$"):
        read_index(folder, "tokens")
    assert indexed_checksums(folder, "tokens") == {}


def test_index_writer__pieces_outlive_a_kill_and_go_when_the_whole_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_RECORDS_PER_PIECE", 2)
    folder, at = Folder(str(tmp_path)), tmp_path / "tokens/_index"
    records = write_parts(folder)
    first, second, third, last = records.values()
    IndexWriter(folder, "tokens", "other").finish({last.part: last})
    foreign = (at / "index.parquet").read_bytes()
    writer = IndexWriter(folder, "tokens", "f")
    assert writer.read() == {}
    assert list(at.iterdir()) == []
    for record in (first, second, third):
        writer.add(record)
    assert [path.name for path in at.iterdir()] == ["piece-000000.parquet"], "the third waits"
    # Killed here, with half a piece; an index of another input is there too.
    (at / "index.parquet").write_bytes(foreign)
    (at / "piece-000007.parquet").write_bytes(b"PAR1")
    again = IndexWriter(folder, "tokens", "f")
    assert again.read() == {record.part: record for record in (first, second)}
    for record in (third, last):
        again.add(record)
    assert sorted(path.name for path in at.iterdir()) == ["piece-000000.parquet", "piece-000001.parquet"]
    again.finish(records)
    assert [path.name for path in at.iterdir()] == ["index.parquet"]
    assert IndexWriter(folder, "tokens", "f").read() == records
