"""model + new photographs -> palette masks and overlays, each at its photograph's own size."""

import io
import json
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from transfgu_ray.config import DataConfig
from transfgu_ray.datasets import Listing, list_images, open_root
from transfgu_ray.errors import ArtifactError, DataError
from transfgu_ray.model import load_model
from transfgu_ray.names import load_names
from transfgu_ray.palette import class_colours, overlay, palette_image
from transfgu_ray.pipeline.parts import PartStats, decode_photos
from transfgu_ray.pipeline.session import Resources
from transfgu_ray.pipeline.stream import Photo, Progress, UnitWorker, split_units, stream_units
from transfgu_ray.storage import Folder

_IMAGES_A_UNIT = 4


class Predictor(UnitWorker):
    """One unit of photographs -> their masks and overlays."""

    def __init__(self, model_uri: str, out_uri: str, stems: dict[str, str], device: str, threads: int) -> None:
        super().__init__(device, threads)
        self._model = load_model(Folder(model_uri), device)
        self._out = Folder(out_uri)
        self._stems = stems
        self._names = load_names(Folder(model_uri), self._model.config.kinds)
        self._colours = class_colours(self._names.num_classes, self._names.background_id)

    def process(self, unit: int, photos: list[Photo]) -> bytes:
        """Writes masks/NAME.png and overlays/NAME.jpg; returns counts and refusals as JSON."""
        stats, limits = PartStats(), DataConfig()
        for photo, image in decode_photos(photos, 1, limits.max_pixels, stats):
            mask = self._names.apply(self._model.segment([image])[0])
            stem = self._stems[photo.image_id]
            self._write(f"masks/{stem}.png", palette_image(mask, self._colours), "PNG")
            self._write(f"overlays/{stem}.jpg", overlay(image, mask, self._colours), "JPEG")
        return json.dumps(vars(stats)).encode()

    def _write(self, name: str, image: Image.Image, kind: str) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
        self._out.write_bytes(name, buffer.getvalue())


def model_folder(uri: str) -> Folder:
    """The model folder of a run folder, or the folder itself.

    Raises:
        ArtifactError: neither is a model.
    """
    folder = Folder(uri)
    if folder.exists("model/config.json"):
        return Folder(folder.uri_of("model"))
    if not folder.exists("config.json"):
        raise ArtifactError(f"{uri} is neither a finished run nor a model folder; train one with `transfgu run`")
    return folder


def output_stems(image_ids: list[str]) -> dict[str, str]:
    """File name of each photograph's mask, without an ending; the photograph's own ending stays where names collide."""
    stems = {image_id: str(PurePosixPath(image_id).with_suffix("")) for image_id in image_ids}
    taken: dict[str, int] = {}
    for stem in stems.values():
        taken[stem] = taken.get(stem, 0) + 1
    return {image_id: image_id if taken[stem] > 1 else stem for image_id, stem in stems.items()}


def list_photos(images_uri: str) -> tuple[Folder, Listing]:
    """The photographs below a folder.

    Raises:
        DataError: there are none.
    """
    config = DataConfig(root=images_uri)
    return open_root(config), list_images(config, "")


def predict(
    model: Folder, root: Folder, photos: Listing, out: Folder, resources: Resources, progress: Progress
) -> PartStats:
    """Writes a mask and an overlay of every readable photograph.

    Raises:
        DataError: none can be read.
    """
    images = photos.images
    stems = output_stems([image.image_id for image in images])
    units = dict(enumerate(split_units(images, _IMAGES_A_UNIT)))
    arguments: dict[str, Any] = {"model_uri": model.uri, "out_uri": out.uri, "stems": stems}
    total = PartStats(refused=list(photos.refused))
    for result in stream_units(root, units, Predictor, arguments, resources):
        total.add(PartStats(**json.loads(result.result)))
        progress(len(units[result.unit]))
    if not total.images:
        first = total.refused[0]
        raise DataError(f"none of {len(images)} photographs can be read; {first['image_id']}: {first['reason']}")
    total.refused.sort(key=lambda refusal: refusal["image_id"])
    return total
