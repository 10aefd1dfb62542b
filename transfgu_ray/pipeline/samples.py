"""Training samples: augmented crops and their scores, read from photographs and bank on Ray's CPUs."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64

from transfgu_ray.algorithms.augment import Augmentation, augment
from transfgu_ray.algorithms.pseudo_labels import add_background, decode_scores
from transfgu_ray.config import RunConfig
from transfgu_ray.images import decode_rgb, to_working
from transfgu_ray.pipeline.parts import part_files, read_table
from transfgu_ray.storage import Folder, resolve


def bank_index(run: Folder) -> pa.Table:
    """Where each image of the bank is: part file and row. One row an image, in order."""
    files = part_files(run, "labels")
    parts, rows = [], []
    for number, name in enumerate(files):
        with run.fs.open_input_file(run.join(name)) as file:
            count = pq.ParquetFile(file).metadata.num_rows
        parts += [number] * count
        rows += range(count)
    return pa.table({"part": pa.array([files[p] for p in parts], pa.string()), "row": pa.array(rows, pa.int32())})


def bank_image_ids(run: Folder) -> list[str]:
    """image_id of every image of the bank, in order."""
    return read_table(run, "labels", ["image_id"])["image_id"].to_pylist()


def load_samples(
    places: pa.Table,
    positions: Int64[np.ndarray, " b"],
    run_uri: str,
    config: dict[str, Any],
    epoch: int,
    grid_hw: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Some training samples.

    A sample's augmentation is fixed by seed, epoch and position in the epoch, so it does not depend on which task
    makes it.

    Args:
        places: rows of `bank_index`.
        positions: of each in the epoch.
        run_uri: the run folder.
        config: the run's configuration, as plain values.
        epoch: its index.
        grid_hw: patch grid of a crop.

    Returns:
        image: uint8 (b, 3, y, x); scores: float16 (b, k, h, w).
    """
    torch.set_num_threads(1)
    settings, run = RunConfig.model_validate(config), Folder(run_uri)
    options = settings.train.augment.model_dump()
    how = Augmentation(**options)
    images, scores = [], []
    for place, position in zip(places.to_pylist(), positions, strict=True):
        image, maps = _read_sample(run, place["part"], place["row"], settings)
        rng = np.random.default_rng([settings.seed, epoch, int(position)])
        crop, cropped = augment(image, maps, settings.train_crop_size, grid_hw, how, rng)
        images.append(crop.numpy())
        scores.append(cropped.numpy().astype(np.float16))
    return {"image": np.stack(images), "scores": np.stack(scores)}


def _read_sample(run: Folder, part: str, row: int, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    with run.fs.open_input_file(run.join(part)) as file:
        (record,) = pq.ParquetFile(file).read_row_group(row).to_pylist()
    fs, path = resolve(record["path"])
    with fs.open_input_stream(path) as stream:
        photo = decode_rgb(stream.read(), config.data.min_side_px, config.data.max_pixels)
    maps = _stored_scores(record)
    if config.has_background:
        maps = add_background(maps, config.cam.background_threshold)
    return torch.from_numpy(to_working(photo, config.data.image_size)), maps


def _stored_scores(record: dict[str, Any]) -> torch.Tensor:
    """The scores of a row of the bank, float32 (k, h, w)."""
    grid_hw = record["grid_h"], record["grid_w"]
    codes = torch.from_numpy(np.frombuffer(record["scores"], "u1").reshape(-1, *grid_hw).copy())
    low, high = (torch.from_numpy(np.frombuffer(record[n], "<f2").reshape(grid_hw).copy()) for n in ("low", "high"))
    return decode_scores(codes, low, high)
