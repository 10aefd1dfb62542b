"""Writing of rendered pictures; a call with the same arguments finishes an interrupted one."""

import io
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from transfgu_ray.cores import usable_cores
from transfgu_ray.errors import DataError
from transfgu_ray.scenes.classes import CLASSES, SUPER_IDS, SUPER_NAMES, THING_IDS
from transfgu_ray.scenes.compose import SCENE_UNITS, render_object, render_scene
from transfgu_ray.storage import Folder

_IMAGES_PER_SHARD = 4000
# Pictures per task of a process.
_CHUNK = 50
# Raised whenever the same arguments give different pixels.
_RENDERER_VERSION = 6
# Each draws from its own random stream.
_STREAMS = {("objects", "train"): 0, ("objects", "val"): 1, ("scenes", "train"): 2, ("scenes", "val"): 3}
OBJECT_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("bytes", pa.binary()),
        ("label", pa.int32()),
        ("name", pa.string()),
        ("mask", pa.binary()),
    ]
)


def write_objects(
    folder: str, count: int, *, seed: int, split: str, size_px: int = 96, num_processes: int | None = None
) -> None:
    """Write object images as Parquet shards `{split}-00000-of-0000N.parquet` of about 4,000 images each.

    The classes take turns. Columns: path (`zebra/000123.png`), bytes (PNG), label (class id 0-11), name, and mask (PNG,
    255 where the object is visible).

    Args:
        folder: path or URI.
        count: number of images.
        seed: pictures differ between seeds.
        split: 'train' or 'val'; each has its own random stream.
        size_px: side of the pictures.
        num_processes: 1 renders in this process, None uses one per core; the files are the same.

    Raises:
        DataError: an argument is out of range, or the folder holds images rendered with other arguments.
    """
    if count < 1 or ("objects", split) not in _STREAMS:
        raise DataError(f"count={count} must be >= 1 and split={split!r} must be 'train' or 'val'")
    target = Folder(folder)
    arguments = {"count": count, "seed": seed, "size_px": size_px}
    shards = -(-count // _IMAGES_PER_SHARD)
    ranges = [(i, count * i // shards, count * (i + 1) // shards) for i in range(shards)]
    names = {i: f"{split}-{i:05d}-of-{shards:05d}.parquet" for i in range(shards)}
    if _begin(target, f"render-{split}.json", arguments):
        return
    rows = partial(_object_rows, seed=seed, stream=_STREAMS["objects", split], size_px=size_px)
    for i, start, stop in ranges:
        if target.exists(names[i]):
            continue
        numbers = [range(n, min(n + _CHUNK, stop)) for n in range(start, stop, _CHUNK)]
        table = pa.Table.from_pylist(
            [row for chunk in _spread(rows, numbers, num_processes) for row in chunk], OBJECT_SCHEMA
        )
        buffer = io.BytesIO()
        # PNG is compressed already.
        pq.write_table(table, buffer, compression="none", row_group_size=500)
        target.write_bytes(names[i], buffer.getvalue())
    _finish(target, f"render-{split}.json", arguments)


def write_scenes(
    folder: str,
    num_train: int,
    *,
    num_val: int,
    seed: int,
    size_px: int = SCENE_UNITS,
    num_processes: int | None = None,
) -> None:
    """Write scenes with their labels.

    The files are `images/{train,val}/scene_00000.png`, `masks/fine/{train,val}/scene_00000.png` (class ids),
    `masks/super/{train,val}/scene_00000.png` (super-category ids) and `classes.json` for human readers.

    Args:
        folder: path or URI.
        num_train: scenes in the train split.
        num_val: scenes in the val split, none of which is in the train split.
        seed: scenes differ between seeds.
        size_px: side of the pictures.
        num_processes: 1 renders in this process, None uses one per core; the files are the same.

    Raises:
        DataError: the folder holds scenes rendered with other arguments.
    """
    target = Folder(folder)
    arguments = {"num_train": num_train, "num_val": num_val, "seed": seed, "size_px": size_px}
    if _begin(target, "render.json", arguments):
        return
    there = {name for name, _ in target.files(recursive=True)}
    wanted = [(split, number) for split, count in (("train", num_train), ("val", num_val)) for number in range(count)]
    missing = [each for each in wanted if not there.issuperset(_scene_files(*each))]
    chunks = [missing[n : n + _CHUNK] for n in range(0, len(missing), _CHUNK)]
    for _ in _spread(partial(_write_some_scenes, folder=folder, seed=seed, size_px=size_px), chunks, num_processes):
        pass
    classes = {
        "classes": [{"id": i, "super_id": SUPER_IDS[i], **asdict(each)} for i, each in enumerate(CLASSES)],
        "supers": [{"id": i, "name": name} for i, name in enumerate(SUPER_NAMES)],
    }
    target.write_json("classes.json", classes)
    _finish(target, "render.json", arguments)


def _begin(target: Folder, record: str, arguments: dict[str, int]) -> bool:
    """Record what is being rendered, and return whether it is complete already.

    The arguments are written first, so that an interrupted call is not continued with others.
    """
    if not target.exists(record):
        target.write_bytes(record, _record(arguments, complete=False))
        return False
    there = json.loads(target.read_bytes(record))
    wanted = {"renderer": _RENDERER_VERSION, **arguments}
    different = [
        f"{name}={there.get(name)!r}, not {value!r}" for name, value in wanted.items() if there.get(name) != value
    ]
    if different:
        raise DataError(
            f"{target.uri_of(record)}: rendered with {'; '.join(different)}; choose another folder or delete this one"
        )
    return bool(there["complete"])


def _finish(target: Folder, record: str, arguments: dict[str, int]) -> None:
    target.write_bytes(record, _record(arguments, complete=True))


def _record(arguments: dict[str, int], complete: bool) -> bytes:
    return json.dumps({"renderer": _RENDERER_VERSION, **arguments, "complete": complete}, indent=1).encode()


def _spread(work: Callable[[Any], Any], items: list[Any], num_processes: int | None) -> Iterator[Any]:
    """Yield the result of the work for each item, in order, from this process or several."""
    processes = min(num_processes or usable_cores(), len(items))
    if processes <= 1:
        yield from map(work, items)
        return
    # Spawned, since threads of a parent that has loaded torch or Ray do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, items)


def _object_rows(numbers: range, *, seed: int, stream: int, size_px: int) -> list[dict[str, Any]]:
    rows = []
    for number in numbers:
        label = THING_IDS[number % len(THING_IDS)]
        image, mask = render_object(np.random.default_rng([seed, stream, number]), label, size_px)
        name = CLASSES[label].name
        path = f"{name}/{number:06d}.png"
        mask_png = _png(mask * np.uint8(255))
        rows.append({"path": path, "bytes": _png(image), "label": label, "name": name, "mask": mask_png})
    return rows


def _scene_files(split: str, number: int) -> tuple[str, str, str]:
    base = f"{split}/scene_{number:05d}.png"
    return f"images/{base}", f"masks/fine/{base}", f"masks/super/{base}"


def _write_some_scenes(scenes: list[tuple[str, int]], *, folder: str, seed: int, size_px: int) -> None:
    target = Folder(folder)
    for split, number in scenes:
        image, fine = render_scene(np.random.default_rng([seed, _STREAMS["scenes", split], number]), size_px)
        pictures = (image, fine, np.array(SUPER_IDS, dtype=np.uint8)[fine])
        for name, picture in zip(_scene_files(split, number), pictures, strict=True):
            target.write_bytes(name, _png(picture))


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Noise compresses no better at a higher level.
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
