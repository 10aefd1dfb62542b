"""features + bank + photographs -> the atlas: each concept's crops, maps and size, and its runners-up."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from transfgu_ray.algorithms.scores.examples import Best, nearest_crops, stand_ins, strongest_responses
from transfgu_ray.config.run import RunConfig
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.build import build_table_of_parts
from transfgu_ray.engine.job import Job
from transfgu_ray.engine.parts import (
    PartStats,
    PartWorker,
    decode_photos,
    read_part,
    read_row,
    read_rows,
)
from transfgu_ray.engine.progress import Heartbeat
from transfgu_ray.engine.session import WORKER_CPUS
from transfgu_ray.engine.signs import Sign, signs_of_life
from transfgu_ray.engine.stream import Photo, even_ranges, peak_memory_mb, unwrapped_errors
from transfgu_ray.images import encode
from transfgu_ray.pipeline.concepts import read_concepts
from transfgu_ray.pipeline.train_data import decode_bank_row
from transfgu_ray.reports.palette import spotlight
from transfgu_ray.runs.index import part_name, read_index
from transfgu_ray.runs.references import RunFiles, table_folder
from transfgu_ray.runs.tables import atlas_schema, build_table, vectors
from transfgu_ray.storage import Folder

ATLAS = "atlas.json"
_TABLE = "atlas"
CROPS_PER_CONCEPT = 6
MAPS_PER_CONCEPT = 3
_RUNNERS_UP_PER_CONCEPT = 5
# Longest side of a crop and of a photograph with a map, px.
_CROP_PX = 80
_MAP_PX = 120
_PHOTOS_PER_UNIT = 16


@dataclass(frozen=True)
class _Scan:
    """What some consecutive parts contribute to the atlas."""

    crops: Best
    maps: Best
    patches: np.ndarray
    followed: np.ndarray
    peak_mb: int = 0

    @classmethod
    def none(cls, num_concepts: int) -> "_Scan":
        return cls(
            Best.none(CROPS_PER_CONCEPT, num_concepts),
            Best.none(MAPS_PER_CONCEPT, num_concepts),
            np.zeros(num_concepts, np.int64),
            np.zeros((num_concepts, num_concepts), np.int64),
        )

    def merge(self, later: "_Scan") -> "_Scan":
        return _Scan(
            self.crops.merge(later.crops),
            self.maps.merge(later.maps),
            self.patches + later.patches,
            self.followed + later.followed,
            max(self.peak_mb, later.peak_mb),
        )


def build_atlas(job: Job, images: Sequence[ImageRef]) -> tuple[dict[str, int], int]:
    """Bring atlas.json and the table of example pictures up to date.

    Args:
        job: job of a run with features, concepts and bank; its progress only gets signs of life.
        images: photographs of the training split.

    Returns:
        The atlas's entry in the manifest, and the highest peak memory of any worker, MB.
    """
    run_folder = job.folder
    kinds, centroids = read_concepts(run_folder)
    found = _scan_parts(job, kinds, centroids)
    pictures = _pictures(run_folder, found)
    result = build_table_of_parts(
        replace(job, progress=Heartbeat(job.progress)),
        _TABLE,
        images=[image for image in images if image.image_id in pictures],
        images_per_unit=_PHOTOS_PER_UNIT,
        worker=ExamplePainter,
        arguments={"pictures": pictures},
    )
    total = int(found.patches.sum())
    followers = np.argsort(-found.followed, axis=1, kind="stable")[:, :_RUNNERS_UP_PER_CONCEPT]
    concepts = [
        {
            "patch_share": int(won) / total,
            # The concepts that come second where this one wins, each with its share of those patches.
            "followed_by": [[int(i), int(row[i]) / int(won)] for i in order if row[i]],
        }
        for won, row, order in zip(found.patches, found.followed, followers, strict=True)
    ]
    run_folder.write_json(ATLAS, {"concepts": concepts})
    content = {"photographs": result.stats.images, "pictures": result.num_rows}
    return content, max(found.peak_mb, result.peak_mb)


def _scan_parts(job: Job, kinds: list[str], centroids: np.ndarray) -> _Scan:
    import ray

    files, resources = RunFiles(job.folder), job.resources
    given = ray.put((kinds, centroids))
    with signs_of_life(lambda _: job.progress()) as sign, unwrapped_errors():
        tasks = []
        for table, function in (("features", _scan_features), ("labels", _scan_bank)):
            holder = files.folder_of(table)
            # As Any: Ray's types for remote functions do not cover keyword arguments.
            of_table: Any = function
            task = ray.remote(of_table).options(num_cpus=WORKER_CPUS, scheduling_strategy="DEFAULT")
            count = len(read_index(holder, table).sizes)
            runs = [parts for parts in even_ranges(count, resources.num_workers) if parts]
            tasks += [
                task.remote(given, uri=holder.uri, parts=parts, threads=resources.threads, sign=sign) for parts in runs
            ]
        scans: list[_Scan] = ray.get(tasks)
    return functools.reduce(_Scan.merge, scans)


def _scan_features(given: tuple[list[str], np.ndarray], *, uri: str, parts: range, threads: int, sign: Sign) -> _Scan:
    torch.set_num_threads(threads)
    kinds, centroids = given
    found, features = _Scan.none(len(kinds)), Folder(uri)
    for part in parts:
        sign()
        found = found.merge(
            replace(
                _Scan.none(len(kinds)),
                crops=_nearest(features, part, kinds=np.array(kinds), centroids=centroids),
                peak_mb=peak_memory_mb(),
            )
        )
    return found


def _scan_bank(given: tuple[list[str], np.ndarray], *, uri: str, parts: range, threads: int, sign: Sign) -> _Scan:
    torch.set_num_threads(threads)
    kinds, _ = given
    found, bank, columns = _Scan.none(len(kinds)), Folder(uri), ["grid_h", "grid_w", "scores", "low", "high"]
    for part in parts:
        means = []
        patches, followed = np.zeros_like(found.patches), np.zeros_like(found.followed)
        for rows in read_rows(bank, part_name("labels", part), columns, most=_PHOTOS_PER_UNIT):
            sign()
            for record in rows.to_pylist():
                codes, scores = decode_bank_row(record)
                means.append(scores.mean((1, 2)).numpy())
                won, pairs = stand_ins(codes)
                patches, followed = patches + won, followed + pairs
        maps = strongest_responses(np.array(means, np.float32).reshape(-1, len(kinds)), part, MAPS_PER_CONCEPT)
        found = found.merge(
            replace(_Scan.none(len(kinds)), maps=maps, patches=patches, followed=followed, peak_mb=peak_memory_mb())
        )
    return found


def _nearest(features: Folder, part: int, *, kinds: np.ndarray, centroids: np.ndarray) -> Best:
    table = read_part(features, part_name("features", part), ["image_id", "kind", "cls_token"])
    if not table.num_rows:
        return Best.none(CROPS_PER_CONCEPT, len(kinds))
    of_image = table["image_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    tokens = vectors(table["cls_token"]).astype(np.float32)
    may_be = table["kind"].to_numpy()[:, None] == kinds
    return nearest_crops(tokens, of_image, may_be=may_be, centroids=centroids, part=part, num_kept=CROPS_PER_CONCEPT)


def _pictures(run_folder: Folder, found: _Scan) -> dict[str, list[dict[str, Any]]]:
    """Return the pictures to make from each photograph."""
    pictures: dict[str, list[dict[str, Any]]] = {}
    files = RunFiles(run_folder)
    for what, table, best in (("crop", "features", found.crops), ("map", "labels", found.maps)):
        columns = ["image_id", "box_xyxy"] if what == "crop" else ["image_id", "height_px", "width_px"]
        first, starts = 0, {}
        for part, num_rows in read_index(files.folder_of(table), table).sizes.items():
            first, starts[part] = first + num_rows, first
        for part in np.unique(best.parts[np.isfinite(best.values)]).tolist():
            rows = read_part(files.folder_of(table), part_name(table, part), columns)
            for rank, concept in np.argwhere(np.isfinite(best.values) & (best.parts == part)).tolist():
                row = int(best.rows[rank, concept])
                record = rows.slice(row, 1).to_pylist()[0]
                box = record["box_xyxy"] if what == "crop" else [0, 0, record["width_px"], record["height_px"]]
                value = abs(float(best.values[rank, concept]))
                picture = {"concept_id": concept, "what": what, "rank": rank, "box_xyxy": box, "value": value}
                pictures.setdefault(record["image_id"], []).append(picture | {"row": starts[part] + row})
    return pictures


class ExamplePainter(PartWorker):
    """A worker: one unit of photographs -> the pictures of concepts made from them."""

    def __init__(
        self, config: RunConfig, run_uri: str, *, pictures: dict[str, list[dict[str, Any]]], **part: Any
    ) -> None:
        super().__init__(config, run_uri, **part)
        self._limits = config.data
        self._pictures = pictures
        self._bank = table_folder(self.run_folder, "labels")
        self._rows = read_index(self._bank, "labels").rows

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Write the unit."""
        stats = PartStats()
        columns: dict[str, list[Any]] = {field.name: [] for field in atlas_schema()}
        for photo, image in decode_photos(self.signed(photos), stats, limits=self._limits):
            for wanted in self._pictures[photo.image_id]:
                row = {name: wanted[name] for name in ("concept_id", "what", "rank", "box_xyxy", "value")}
                row |= {"image_id": photo.image_id, "picture": self._picture(image, wanted)}
                for name, value in row.items():
                    columns[name].append(value)
        boxes = np.array(columns["box_xyxy"], dtype=np.int32).reshape(-1, 4)
        return self.write(unit, build_table(columns | {"box_xyxy": boxes}, atlas_schema()), stats=stats)

    def _picture(self, image: Image.Image, wanted: dict[str, Any]) -> bytes:
        if wanted["what"] == "crop":
            picture = image.crop(tuple(wanted["box_xyxy"]))
            picture.thumbnail((_CROP_PX, _CROP_PX))
        else:
            picture = image.copy()
            picture.thumbnail((_MAP_PX, _MAP_PX))
            (place,) = self._rows.slice(wanted["row"], 1).to_pylist()
            scores = decode_bank_row(read_row(self._bank, "labels", place))[1][wanted["concept_id"]]
            picture = spotlight(picture, scores.numpy())
        return encode(picture, "WEBP", quality=75)
