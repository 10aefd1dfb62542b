"""Encoded images -> working copies: each is read, decoded and squared once, and those that cannot be are counted."""

import dataclasses
import json
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from transfgu_ray.engine.parts import PartStats, read_footer
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.stream import even_ranges, set_up_ray_data, unwrapped_errors
from transfgu_ray.images import ImageRefused, decode_rgb, to_square
from transfgu_ray.pretraining.config import PretrainDataConfig
from transfgu_ray.pretraining.copies import COPIES, INDEX, build_index, pack
from transfgu_ray.pretraining.sources import Source, Unit, read_unit
from transfgu_ray.runs.tables import to_parquet
from transfgu_ray.storage import Folder

_MAX_BLOCKS = 1000
# Bytes of one file of working copies, and so of a task's memory.
_FILE_BYTES = 16 * 2**20


def copy_images(
    out: Folder,
    sources: Sequence[Source],
    *,
    config: PretrainDataConfig,
    fingerprint: str,
    resources: Resources,
    progress: Progress,
) -> PartStats:
    """Makes the working copies that are missing and their index, and says what was refused.

    Args:
        out: folder of the pretraining.
        sources: where the images are.
        config: how they are decoded.
        fingerprint: of images and settings; copies made with another are made again.
        resources: workers.
        progress: takes images done.
    """
    units = [(source.root.uri, unit) for source in sources for unit in source.units]
    if (footer := read_footer(out, INDEX, fingerprint)) is not None:
        progress(sum(unit.num_images for _, unit in units))
        return footer[0]
    missing = [i for i in range(len(units)) if read_footer(out, _unit_file(i), fingerprint) is None]
    progress(sum(unit.num_images for _, unit in units) - sum(units[i][1].num_images for i in missing))
    for number in _stream(
        {i: units[i] for i in missing}, out, config=config, fingerprint=fingerprint, resources=resources
    ):
        progress(units[number][1].num_images)
    total, tables = PartStats(refused=[refusal for source in sources for refusal in source.refused]), []
    for number in range(len(units)):
        footer = read_footer(out, _unit_file(number), fingerprint)
        if footer is None:
            raise RuntimeError(f"{out.uri_of(_unit_file(number))} was not written")
        total.add(footer[0])
        with out.fs.open_input_file(out.join(_unit_file(number))) as file:
            tables.append(pq.read_table(file).replace_schema_metadata())
    _write_index(out, INDEX, index=pa.concat_tables(tables), fingerprint=fingerprint, stats=total)
    return total


def _unit_file(number: int) -> str:
    return f"{COPIES}/unit-{number:06d}.parquet"


def _stream(
    units: dict[int, tuple[str, Unit]],
    out: Folder,
    *,
    config: PretrainDataConfig,
    fingerprint: str,
    resources: Resources,
) -> Iterator[int]:
    """Copies the units in Ray tasks and yields each one's number as it is done."""
    if not units:
        return
    import ray.data

    set_up_ray_data()
    table = pa.table(
        {
            "unit": pa.array(list(units), pa.int64()),
            "what": [json.dumps([root, dataclasses.asdict(unit)]) for root, unit in units.values()],
        }
    )
    blocks = min(_MAX_BLOCKS, len(table))
    shares = [table.slice(rows.start, len(rows)).combine_chunks() for rows in even_ranges(len(table), blocks)]
    dataset = ray.data.from_arrow(shares)
    dataset = dataset.map_batches(
        _copy_unit,
        fn_kwargs={"out_uri": out.uri, "config": config, "fingerprint": fingerprint},
        batch_format="pyarrow",
        batch_size=1,
        compute=ray.data.TaskPoolStrategy(size=resources.num_cores),
        num_cpus=1,
    )
    with unwrapped_errors():
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch["unit"].to_pylist()


def _copy_unit(table: pa.Table, out_uri: str, *, config: PretrainDataConfig, fingerprint: str) -> pa.Table:
    """Writes the working copies of one unit, then its part of the index, which marks it as complete."""
    (number,), (what,) = table["unit"].to_pylist(), table["what"].to_pylist()
    root_uri, unit = json.loads(what)
    out, stats = Folder(out_uri), PartStats()
    unit, rows, squares = Unit(**unit), [], []
    most = max(1, _FILE_BYTES // (3 * config.source_size**2))
    files = 0

    def flush() -> None:
        nonlocal files, squares
        if squares:
            out.write_bytes(f"{COPIES}/unit-{number:06d}-{files:04d}.arrow", pack(squares))
            files, squares = files + 1, []

    for image in read_unit(Folder(root_uri), unit):
        try:
            if image.data is None:
                raise ImageRefused(image.error)
            square = _square(decode_rgb(image.data, config.min_side_px, config.max_pixels), config.source_size)
        except ImageRefused as refusal:
            stats.refused.append({"image_id": image.image_id, "reason": str(refusal)})
            continue
        stats.images += 1
        rows.append(
            {
                "image_id": image.image_id,
                "split": unit.split,
                "label": image.label,
                "file": f"{COPIES}/unit-{number:06d}-{files:04d}.arrow",
                "row": len(squares),
            }
        )
        squares.append(square)
        if len(squares) == most:
            flush()
    flush()
    _write_index(out, _unit_file(number), index=build_index(rows), fingerprint=fingerprint, stats=stats)
    return pa.table({"unit": pa.array([number], pa.int64())})


def _square(image: Image.Image, size_px: int) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(to_square(image, size_px)).transpose(2, 0, 1))


def _write_index(out: Folder, name: str, *, index: pa.Table, fingerprint: str, stats: PartStats) -> None:
    metadata = {"fingerprint": fingerprint, "stats": json.dumps(vars(stats))}
    out.write_bytes(name, to_parquet(index, metadata))
