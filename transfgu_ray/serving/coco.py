"""Masks as COCO JSON: `labels.json` with a run-length mask per class, and `panoptic.json` with its PNGs.

A photograph has one segment per class. Category ids are class ids + 1, since 0 is unlabelled in COCO. The background of
Eq. 8 is unlabelled too: it is everything else, not a category.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from transfgu_ray.storage import Folder

LABELS, PANOPTIC = "coco/labels.json", "coco/panoptic.json"


def find_segments(mask: np.ndarray, background_id: int | None) -> list[dict[str, Any]]:
    """Return category_id, area (px), bbox (left, top, width, height in px) and counts (COCO's RLE) of each class."""
    from pycocotools import mask as coco_mask

    segments = []
    for class_id in np.unique(mask).tolist():
        if class_id != background_id:
            encoded = coco_mask.encode(np.asfortranarray(mask == class_id).view(np.uint8))
            segments.append(
                {
                    "category_id": class_id + 1,
                    "area": int(coco_mask.area(encoded)),
                    "bbox": coco_mask.toBbox(encoded).tolist(),
                    "counts": encoded["counts"].decode("ascii"),
                }
            )
    return segments


def panoptic_image(mask: np.ndarray, background_id: int | None) -> Image.Image:
    """Return a mask as in COCO's panoptic PNGs: R + 256 G is the segment's id, here its category id."""
    ids = mask.astype(np.int64) + 1
    if background_id is not None:
        ids[mask == background_id] = 0
    return Image.fromarray(np.stack([ids % 256, ids // 256, np.zeros_like(ids)], axis=-1).astype(np.uint8))


class CocoWriter:
    """Both JSON files, collected on the local disk per photograph, since a million photographs do not fit in memory."""

    def __init__(self, entries: Sequence[dict[str, Any]], background_id: int | None) -> None:
        self._categories = [
            {"id": entry["id"] + 1, "name": entry["name"], "supercategory": entry["kind"], "isthing": 0,
             "color": [int(entry["colour"][i : i + 2], 16) for i in (1, 3, 5)]}
            for entry in entries
            if entry["id"] != background_id
        ]  # fmt: skip
        # Deleted with the writer.
        self._images, self._labels, self._panoptic = (tempfile.TemporaryFile("w+") for _ in range(3))  # noqa: SIM115

    def add(self, number: int, photo: dict[str, Any]) -> None:
        """Add a photograph.

        Args:
            number: its COCO id, from 1.
            photo: its image_id, stem, height and width, and segments from `find_segments`.
        """
        height, width = photo["height"], photo["width"]
        _append(self._images, {"id": number, "file_name": photo["image_id"], "height": height, "width": width})
        infos = []
        for segment in photo["segments"]:
            shared = {name: segment[name] for name in ("category_id", "area", "bbox")} | {"iscrowd": 0}
            label_id = number * (self._categories[-1]["id"] + 1) + segment["category_id"]
            rle = {"size": [height, width], "counts": segment["counts"]}
            _append(self._labels, {"id": label_id, "image_id": number, **shared, "segmentation": rle})
            infos.append({"id": segment["category_id"], **shared})
        file_name = f"{photo['stem']}.png"
        _append(self._panoptic, {"image_id": number, "file_name": file_name, "segments_info": infos})

    def write(self, out: Folder) -> None:
        """Write both files below a folder."""
        for name, annotations in ((LABELS, self._labels), (PANOPTIC, self._panoptic)):
            with tempfile.NamedTemporaryFile("w+") as file:
                file.write('{"images": [\n')
                _copy(self._images, file)
                file.write('],\n"annotations": [\n')
                _copy(annotations, file)
                file.write(f'],\n"categories": {json.dumps(self._categories)}}}\n')
                file.flush()
                with pa.memory_map(file.name) as content:
                    out.write_bytes(name, content.read_buffer())


def _append(file: Any, record: dict[str, Any]) -> None:
    file.write((",\n" if file.tell() else "") + json.dumps(record))


def _copy(source: Any, target: Any) -> None:
    source.seek(0)
    shutil.copyfileobj(source, target)
