"""Making of working copies: each image is read, decoded and squared once; unusable ones are recorded as refused."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from transfgu_ray.engine.parts import PartStats, read_footer
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.signs import Sign, signs_of_life
from transfgu_ray.engine.stream import even_ranges, set_up_ray_data, unwrapped_errors
from transfgu_ray.images import ImageRefused, decode_photo, to_square
from transfgu_ray.pretraining.config import PretrainDataConfig
from transfgu_ray.pretraining.copies import COPIES, INDEX, build_index, pack
from transfgu_ray.pretraining.sources import Source, Unit, read_unit
from transfgu_ray.runs.tables import to_parquet
from transfgu_ray.storage import Folder

_MAX_BLOCKS = 1000
# Size of a file of working copies, all of which a task holds in memory.
_FILE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Copying:
    """Target and settings of the working copies of a pretraining.

    Attributes:
        uri: folder of the pretraining.
        config: how images are decoded.
        fingerprint: of images and settings; copies with another fingerprint are made again.
    """

    uri: str
    config: PretrainDataConfig
    fingerprint: str

    def stats(self, name: str) -> PartStats | None:
        """Return the counts and refusals stored with an index; None where it is missing or out of date."""
        footer = read_footer(Folder(self.uri), name, self.fingerprint)
        return None if footer is None else footer[0]

    def write_index(self, name: str, index: pa.Table, stats: PartStats) -> None:
        """Write an index, which marks the copies it lists as complete."""
        metadata = {"fingerprint": self.fingerprint, "stats": json.dumps(vars(stats))}
        Folder(self.uri).write_bytes(name, to_parquet(index, metadata))


def copy_images(copying: Copying, sources: Sequence[Source], *, resources: Resources, progress: Progress) -> PartStats:
    """Make the missing working copies and their index; return the number of images and the refused ones.

    Args:
        copying: target and settings.
        sources: of the images.
        resources: workers.
        progress: takes the number of images done.
    """
    units = [(source.root.uri, unit) for source in sources for unit in source.units]
    if (known := copying.stats(INDEX)) is not None:
        progress(sum(unit.num_images for _, unit in units))
        return known
    missing = [i for i in range(len(units)) if copying.stats(_unit_file(i)) is None]
    progress(sum(unit.num_images for _, unit in units) - sum(units[i][1].num_images for i in missing))
    for number in _stream(copying, {i: units[i] for i in missing}, resources.num_cores, progress):
        progress(units[number][1].num_images)
    out, tables = Folder(copying.uri), []
    total = PartStats(refused=[refusal for source in sources for refusal in source.refused])
    for name in map(_unit_file, range(len(units))):
        if (stats := copying.stats(name)) is None:
            raise RuntimeError(f"{out.uri_of(name)} was not written")
        total.add(stats)
        tables.append(out.read(name, pq.read_table).replace_schema_metadata())
    copying.write_index(INDEX, pa.concat_tables(tables), total)
    return total


def _unit_file(number: int) -> str:
    return f"{COPIES}/unit-{number:06d}.parquet"


def _stream(copying: Copying, units: dict[int, tuple[str, Unit]], num_cores: int, progress: Progress) -> Iterator[int]:
    """Copy the units in Ray tasks and yield the number of each when it is done."""
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
    with signs_of_life(lambda _: progress()) as sign, unwrapped_errors():
        dataset = ray.data.from_arrow(shares).map_batches(
            _copy_unit,  # type: ignore[arg-type]  # Ray's annotation has no room for fn_kwargs
            fn_kwargs={"copying": copying, "sign": sign},
            batch_format="pyarrow",
            batch_size=1,
            compute=ray.data.TaskPoolStrategy(size=num_cores),
            num_cpus=1,
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(batch, pa.Table)
            yield from batch["unit"].to_pylist()


def _copy_unit(table: pa.Table, copying: Copying, sign: Sign) -> pa.Table:
    """Write the working copies of one unit, then its part of the index."""
    (number,), (what,) = table["unit"].to_pylist(), table["what"].to_pylist()
    root_uri, fields = json.loads(what)
    unit, out, config, stats = Unit(**fields), Folder(copying.uri), copying.config, PartStats()
    rows: list[dict[str, object]] = []
    squares: list[np.ndarray] = []
    most = max(1, _FILE_BYTES // (3 * config.source_size**2))
    files = 0

    def flush() -> None:
        nonlocal files, squares
        if squares:
            out.write_bytes(f"{COPIES}/unit-{number:06d}-{files:04d}.arrow", pack(squares))
            files, squares = files + 1, []

    for image in read_unit(Folder(root_uri), unit):
        sign()
        try:
            if image.data is None:
                raise ImageRefused(image.error)
            square = _square(decode_photo(image.data, config), config.source_size)
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
    copying.write_index(_unit_file(number), build_index(rows), stats)
    return pa.table({"unit": pa.array([number], pa.int64())})


def _square(image: Image.Image, size_px: int) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(to_square(image, size_px)).transpose(2, 0, 1))
