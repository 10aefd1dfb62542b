"""Training samples: augmented crops, or their tokens, and scores, read by Ray tasks."""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64, UInt8

from transfgu_ray.algorithms.labels.bank import decode_scores, training_scores
from transfgu_ray.algorithms.rounds.augment import Augmentation, augment
from transfgu_ray.algorithms.rounds.token_crops import augment_tokens, decode_tokens
from transfgu_ray.config.run import RunConfig
from transfgu_ray.datasets.places import read_uri
from transfgu_ray.engine.parts import read_row
from transfgu_ray.engine.prefetch import made_ahead
from transfgu_ray.errors import DataError
from transfgu_ray.images import ImageRefused, decode_photo, to_working
from transfgu_ray.runs.index import read_index
from transfgu_ray.runs.references import table_folder
from transfgu_ray.storage import Folder

# The table of cached tokens, with the same rows as the bank.
TOKENS = "tokens"
# An object store answers after some 25 ms, however many are asked for at once.
_READS_AT_ONCE = 8
# Tells the draws of a step's colours from those of its samples.
_COLOUR = 1


def sample_index(run_folder: Folder, config: RunConfig) -> pa.Table:
    """Return where to read each image of the bank, in order, one row per image.

    Columns: labels, and tokens where they are cached; each a row of `Index.rows` of that table.

    Raises:
        ArtifactError: an index is missing or damaged.
    """
    tables = ["labels", *([TOKENS] if config.train.features == "cached" else [])]
    rows = {table: read_index(table_folder(run_folder, table), table).rows for table in tables}
    return pa.table({table: of_table.to_struct_array() for table, of_table in rows.items()})


def bank_image_ids(run_folder: Folder) -> list[str]:
    """Return the image_id of every image of the bank, in order."""
    image_ids: list[str] = read_index(table_folder(run_folder, "labels"), "labels").image_ids.to_pylist()
    return image_ids


def load_train_data(
    places: pa.Table,
    positions: Int64[np.ndarray, " b"],
    *,
    bank_uri: str,
    tokens_uri: str,
    config: RunConfig,
    epoch: int,
    step: int,
    grid_hw: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Load some training samples of one step.

    A sample's augmentation is fixed by seed, epoch, step and position in the epoch, so it does not depend on the task
    that makes it.

    Args:
        places: rows of `sample_index`.
        positions: position of each sample in the epoch.
        bank_uri: the run folder that holds the bank.
        tokens_uri: the one that holds the cached tokens.
        config: the run's configuration.
        epoch: index of the epoch.
        step: number of the step in the epoch.
        grid_hw: patch grid of a crop.

    Returns:
        scores: float16 (b, k, h, w), in [0, 1] over each crop, with the background of Eq. 8; image: uint8 (b, 3, y, x),
            or with cached tokens, tokens: float16 (b, hw, c).

    Raises:
        DataError: a photograph is gone, or cannot be decoded any more.
    """
    torch.set_num_threads(1)
    bank, cache = Folder(bank_uri), Folder(tokens_uri)
    how = Augmentation(**config.train.augment.model_dump())
    threshold = config.cam.background_threshold if config.has_background else None
    seen: dict[str, list[np.ndarray]] = {}
    read = made_ahead(partial(_read_sample, bank, cache, config), places.to_pylist(), _READS_AT_ONCE)
    for (record, source), position in zip(read, positions, strict=True):
        _, maps = decode_bank_row(record)
        rng = np.random.default_rng([config.seed, epoch, int(position)])
        if config.train.features == "cached":
            crop, cropped = augment_tokens(
                torch.from_numpy(source),
                maps,
                image_hw=config.train_image_size,
                grid_hw=grid_hw,
                how=how,
                rng=rng,
            )
            sample = {"tokens": crop.half().numpy()}
        else:
            crop, cropped = augment(
                torch.from_numpy(source),
                maps,
                crop_hw=config.train_crop_size,
                grid_hw=grid_hw,
                how=how,
                rng=rng,
                colour_rng=np.random.default_rng([config.seed, epoch, step, _COLOUR]),
            )
            sample = {"image": crop.numpy()}
        (scores,) = training_scores(cropped.unsqueeze(0), threshold)
        for name, values in (sample | {"scores": scores.half().numpy()}).items():
            seen.setdefault(name, []).append(values)
    return {name: np.stack(values) for name, values in seen.items()}


def _read_sample(
    bank: Folder, cache: Folder, config: RunConfig, place: dict[str, dict[str, int]]
) -> tuple[dict[str, Any], np.ndarray]:
    """Return a row of the bank, and the cached tokens or the photograph that go with it."""
    record = read_row(bank, "labels", place["labels"])
    if config.train.features != "cached":
        return record, _read_photo(record["path"], config, config.train_image_size)
    cached = read_row(cache, TOKENS, place[TOKENS])
    assert cached["image_id"] == record["image_id"], "the tokens belong to another bank"
    return record, decode_tokens(cached["tokens"], (cached["grid_h"], cached["grid_w"]))


def read_photos(
    places: pa.Table, run_folder: Folder, *, config: RunConfig, size: tuple[int, int]
) -> UInt8[np.ndarray, "b 3 y x"]:
    """Read the whole photographs of some rows of `sample_index`, squashed to (height, width) px."""
    bank = table_folder(run_folder, "labels")
    rows = [read_row(bank, "labels", place["labels"]) for place in places.to_pylist()]
    return np.stack([_read_photo(row["path"], config, size) for row in rows])


def _read_photo(uri: str, config: RunConfig, size: tuple[int, int]) -> UInt8[np.ndarray, "3 y x"]:
    try:
        photo = decode_photo(read_uri(uri), config.data)
    except (OSError, ImageRefused) as error:
        raise changed_since_labelled(uri, str(error)) from None
    return to_working(photo, size, config.data.resample)


def changed_since_labelled(name: str, now: str) -> DataError:
    """Return the error for a photograph of the bank that cannot be used any more.

    Args:
        name: of the photograph.
        now: what is wrong with it.
    """
    return DataError(
        f"{name} has changed since the bank was labelled (now: {now}); restore it or use another run folder"
    )


def decode_bank_row(record: dict[str, Any]) -> tuple[UInt8[np.ndarray, "k h w"], torch.Tensor]:
    """Return the codes of a row of the bank, whose argmax is exact, and its scores, float32 (k, h, w)."""
    grid_hw = record["grid_h"], record["grid_w"]
    codes = np.frombuffer(record["scores"], "u1").reshape(-1, *grid_hw)
    low, high = (torch.from_numpy(np.frombuffer(record[n], "<f2").reshape(grid_hw).copy()) for n in ("low", "high"))
    return codes, decode_scores(torch.from_numpy(codes.copy()), low, high)
