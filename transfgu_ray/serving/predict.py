"""Model + new photographs -> masks, overlays and other requested outputs, each at the photograph's own size."""

import hashlib
import json
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from transfgu_ray.algorithms.scores.upsampling import upsample_probabilities
from transfgu_ray.config.sections import DataConfig
from transfgu_ray.datasets.listing import Listing
from transfgu_ray.datasets.photographs import ImageRef
from transfgu_ray.engine.parts import PartStats, decode_photos, require_some
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.engine.stream import Photo, UnitResult, UnitWorker, split_units, stream_units
from transfgu_ray.errors import ArtifactError
from transfgu_ray.images import encode
from transfgu_ray.models.model import load_model, load_model_config
from transfgu_ray.models.names import load_names
from transfgu_ray.reports.legend import legend, legend_image
from transfgu_ray.reports.palette import class_colours, overlay, palette_image
from transfgu_ray.runs.checksums import checksum_files
from transfgu_ray.runs.provenance import library_versions
from transfgu_ray.serving.coco import CocoWriter, find_segments, panoptic_image
from transfgu_ray.serving.outputs import claim
from transfgu_ray.storage import Folder

MANIFEST = "predict.json"
# Files and folders of pictures.
PICTURES = ("masks", "overlays", "probabilities", "coco", "legend.png")
_IMAGES_PER_UNIT = 4
_JPEG_MOST_PX = 65500
# Of a file's name, on the file systems of Linux, macOS and Windows.
_NAME_MOST_BYTES = 255
# One record per finished unit, in a folder named by all that the outputs depend on, until the manifest is written.
_RECORDS = ".units"


@dataclass(frozen=True)
class Wanted:
    """Outputs wanted for each photograph.

    Attributes:
        sliding: see `SegmentationModel.photo_maps`.
        probabilities: one greyscale PNG per class, 255 = certain.
        coco: COCO JSON, as detections and as panoptic segments.
    """

    sliding: bool = False
    probabilities: bool = False
    coco: bool = False


class Predictor(UnitWorker):
    """Worker from a unit of photographs to their masks and overlays."""

    def __init__(
        self,
        model_uri: str,
        out_uri: str,
        *,
        records: str,
        stems: dict[str, str],
        wanted: Wanted,
        device: str,
        threads: int,
    ) -> None:
        super().__init__(device, threads)
        self._records = records
        self._model = load_model(Folder(model_uri), device)
        self._out = Folder(out_uri)
        self._stems = stems
        self._wanted = wanted
        self._names = load_names(Folder(model_uri), self._model.config.kinds)
        self._colours = class_colours(self._names.num_classes, self._names.background_id)

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Write the wanted outputs of each photograph.

        Return counts, refusals and COCO's segments as JSON, after writing them as the record of the unit.
        """
        stats, segmented = PartStats(), []
        limits = DataConfig(min_side_px=1, bands=self._model.config.bands)
        for photo, image in decode_photos(self.signed(photos), stats, limits=limits):
            stem, background_id = self._stems[photo.image_id], self._names.background_id
            maps = self._model.photo_maps(image, self._wanted.sliding)
            mask = self._names.apply(self._model.to_mask(maps, image))
            self._write(f"masks/{stem}.png", palette_image(mask, self._colours))
            ending = "jpg" if max(image.size) <= _JPEG_MOST_PX else "png"
            self._write(f"overlays/{stem}.{ending}", overlay(image, mask, colours=self._colours))
            if self._wanted.probabilities:
                digits = len(str(self._names.num_classes - 1))
                members = {i: self._names.members(i) for i in self._names.used}
                shares = upsample_probabilities(maps, (image.height, image.width), members.values())
                for class_id, each in zip(members, shares, strict=True):
                    name = f"probabilities/{stem}/{class_id:0{digits}}.png"
                    self._write(name, Image.fromarray(each.cpu().numpy()))
            if self._wanted.coco:
                self._write(f"coco/panoptic/{stem}.png", panoptic_image(mask, background_id))
                segments = find_segments(mask, background_id)
                size = {"height": image.height, "width": image.width}
                segmented.append({"image_id": photo.image_id, "stem": stem, **size, "segments": segments})
        record = json.dumps({"stats": vars(stats), "segmented": segmented}).encode()
        # Last: a unit with a record is complete.
        self._out.write_bytes(_record_name(self._records, unit), record)
        return record

    def _write(self, name: str, image: Image.Image) -> None:
        is_jpeg = name.endswith(".jpg")
        self._out.write_bytes(name, encode(image, "JPEG", quality=90) if is_jpeg else encode(image, "PNG"))


def model_folder(uri: str) -> Folder:
    """Return the model folder of a run folder, or the folder itself.

    Raises:
        ArtifactError: neither holds a model.
    """
    folder = Folder(uri)
    if folder.exists("model/config.json"):
        return Folder(folder.uri_of("model"))
    if not folder.exists("config.json"):
        raise ArtifactError(f"{uri} is neither a finished run nor a model folder; train one with `transfgu run`")
    return folder


def output_stems(image_ids: list[str]) -> dict[str, str]:
    """Return the file name of each mask without its extension; the photograph's extension stays where names collide."""
    ids = set(image_ids)
    stems = {image_id: str(PurePosixPath(image_id).with_suffix("")) for image_id in image_ids}
    taken: dict[str, int] = {}
    for stem in stems.values():
        taken[stem] = taken.get(stem, 0) + 1
    return {image_id: image_id if taken[stem] > 1 or stem in ids else stem for image_id, stem in stems.items()}


def predict(
    model: Folder,
    out: Folder,
    *,
    root: Folder,
    photos: Listing,
    wanted: Wanted,
    resources: Resources,
    progress: Progress,
) -> dict[str, Any]:
    """Write the wanted outputs of every readable photograph, the legend, and last the manifest, which is returned.

    Units that a killed call with the same model, photographs and wishes has finished are not segmented again.

    Raises:
        DataError: no photograph can be read.
    """
    started = time.monotonic()
    out.delete(MANIFEST)
    config = load_model_config(model)
    names = load_names(model, config.kinds)
    entries = legend(names)
    stems = output_stems([image.image_id for image in photos.images])
    photos, num_long = _without_long_names(photos, stems)
    progress(num_long, refused=num_long)
    images, coco = photos.images, CocoWriter(entries, names.background_id) if wanted.coco else None
    numbers = {image.image_id: number for number, image in enumerate(images, start=1)}
    units = split_units(images, _IMAGES_PER_UNIT)
    files = checksum_files(model, dict(model.files()))
    records = f"{_RECORDS}/{_hash([files, root.uri, photos.fingerprint, asdict(wanted), _IMAGES_PER_UNIT])[:16]}"
    finished = _finished_units(out, records)
    missing = {unit: refs for unit, refs in enumerate(units) if unit not in finished}
    arguments = {"model_uri": model.uri, "out_uri": out.uri, "records": records, "wanted": wanted, "stems": stems}
    # After the records of other calls are gone, which say that their masks are there.
    num_removed = claim(out, _hash(files), [stems[image_id] for image_id in numbers])

    results = stream_units(root, missing, worker=Predictor, arguments=arguments, resources=resources, progress=progress)
    total, num_new, peak_mb = PartStats(refused=list(photos.refused)), 0, 0
    for unit, result in _in_order(_counted(results, units, progress), len(units), missing):
        found = json.loads(out.read_bytes(_record_name(records, unit)) if result is None else result.result)
        stats = PartStats(**found["stats"])
        total.add(stats)
        if result is not None:
            num_new, peak_mb = num_new + stats.images, max(peak_mb, result.peak_mb)
        if coco:
            for photo in found["segmented"]:
                coco.add(numbers[photo["image_id"]], photo)
        progress(len(units[unit]) if result is None else 0, refused=len(stats.refused))
    if not total.images:
        # Or photographs that are repaired without a change of size would stay refused.
        out.delete(_RECORDS)
        require_some(total, len(images))
    _write_shared(out, entries, coco)
    seconds = time.monotonic() - started
    manifest = {
        "stage": "predict",
        "model": model.uri,
        "weights_sha256": config.weights_sha256,
        "images": root.uri,
        **asdict(wanted),
        "rows_in": len(images) + len(photos.refused),
        "rows_out": total.images,
        "masks_of_another_model_removed": num_removed,
        "refused": sorted(total.refused, key=lambda refusal: refusal["image_id"]),
        "passed_over": dict(photos.passed_over),
        "units": len(units),
        "units_resumed": len(units) - len(missing),
        "seconds": seconds,
        "images_per_second": num_new / seconds,
        "peak_memory_mb": peak_mb,
        "versions": library_versions(),
    }
    out.write_json(MANIFEST, manifest)
    out.delete(_RECORDS)
    return manifest


def _without_long_names(photos: Listing, stems: dict[str, str]) -> tuple[Listing, int]:
    """Refuse photographs whose outputs would have names that no file system allows; also return their number."""
    fits = {
        image_id: len(f"{PurePosixPath(stem).name}.png".encode()) <= _NAME_MOST_BYTES
        for image_id, stem in stems.items()
    }
    refused = [
        {"image_id": image_id, "reason": "another has the same name but for its ending, and both are too long to keep"}
        for image_id, does in fits.items()
        if not does
    ]
    images = tuple(image for image in photos.images if fits[image.image_id])
    return replace(photos, images=images, refused=(*photos.refused, *refused)), len(refused)


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _record_name(records: str, unit: int) -> str:
    return f"{records}/{unit:06d}.json"


def _finished_units(out: Folder, records: str) -> set[int]:
    """Return the units that have a record, and delete the records of other calls."""
    found = [name for name, size in out.files(_RECORDS, recursive=True) if size]
    for folder in {name.rpartition("/")[0] for name in found} - {records}:
        out.delete(folder)
    ours = [name.rpartition("/")[2] for name in found if name.startswith(f"{records}/")]
    return {int(name.removesuffix(".json")) for name in ours if not name.startswith(".")}


def _write_shared(out: Folder, entries: list[dict[str, Any]], coco: CocoWriter | None) -> None:
    """Write the files that belong to all photographs: the legend, and COCO's where wanted."""
    out.write_json("legend.json", entries)
    out.write_bytes("legend.png", encode(legend_image(entries), "PNG"))
    if coco:
        coco.write(out)


def _counted(
    results: Iterator[UnitResult], units: Sequence[Sequence[ImageRef]], progress: Progress
) -> Iterator[UnitResult]:
    """Yield results as they come, counting their photographs."""
    for result in results:
        progress(len(units[result.unit]))
        yield result


def _in_order(
    results: Iterator[UnitResult], num_units: int, missing: Container[int]
) -> Iterator[tuple[int, UnitResult | None]]:
    """Yield units in order, with None for those that are not missing: the output must not depend on who is faster."""
    early: dict[int, UnitResult] = {}
    for unit in range(num_units):
        while unit in missing and unit not in early:
            result = next(results)
            early[result.unit] = result
        yield unit, early.pop(unit, None)
