"""A run folder with all artifacts of an evaluated run, made without Ray or a network, to test the pages on."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from transfgu_ray.algorithms.scores.intervals import photo_counts
from transfgu_ray.config.run import RunConfig, build_config
from transfgu_ray.models.model import FORMAT
from transfgu_ray.models.names import Names
from transfgu_ray.reports.scores import STAGE_NAMES, metrics_json
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.runs.tables import atlas_schema, build_table, concepts_schema, confusions_schema, to_parquet
from transfgu_ray.storage import Folder

# A file can have this name.
HOSTILE = "a/<img src=x onerror=alert(1)>\"'&{{ 7*7 }}.jpg"
_SIZE = (24, 16)


def make_evaluated(path: Path | str, num_concepts: int = 16, labels: bool = True, num_samples: int = 2) -> Run:
    """Make a run on photographs of noise, of dataset `scenes` (16 classes) or of a folder without labels.

    With labels, most pixels of class i are of concept i on the first photograph, and of concept i + 1 on the second.
    Photograph 0 has a hostile name.
    """
    folder, rng = Folder(str(path)), np.random.default_rng(0)
    dataset = "scenes" if labels else "folder"
    settings = [f"data.dataset={dataset}", "data.region_mode=things_and_stuff", f"concepts.num_concepts={num_concepts}"]
    run = Run.open(str(path), build_config(RunConfig(preset="demo"), None, [*settings, "train.omega_1=0.5"]))
    kinds = ("foreground",) * (num_concepts - 4) + ("background",) * 4
    model = {"format": FORMAT, "image_size": [8, 8], "kinds": kinds, "background_id": None}
    model |= {"decoder_layers": 1, "decoder_heads": 1, "precision": "float32", "weights_sha256": "f" * 64}
    folder.write_bytes("model/config.json", json.dumps(model).encode())
    ids = [HOSTILE, "b.jpg"]
    _write_confusions(folder, ids, num_concepts, labels)
    counts = _counts(num_concepts) if labels else {}
    metrics = metrics_json(
        run.config,
        "val" if labels else None,
        num_images=2,
        counts=counts,
        names=Names(kinds, {}),
        weights_sha256="f" * 64,
    )
    folder.write_bytes("metrics.json", json.dumps(metrics).encode())
    history = [
        {"epoch": e, "round": e // 2, "loss": 3.0 - e / 10} | dict.fromkeys(("cross_entropy", "peer"), 1.0 + e)
        for e in range(4)
    ]
    folder.write_bytes("train/history.json", json.dumps(history).encode())
    names = [f"{i:02}" for i in range(num_samples)]
    for i, name in enumerate([*names, *(["best_0", "worst_0"] if labels and num_samples else [])]):
        _write_sample(folder, name, ids[i % 2], num_concepts, labels, rng)
    _write_atlas(folder, kinds, rng, examples=num_samples > 0)
    for stage in STAGES.lasting[:5]:
        refused = [{"image_id": HOSTILE, "reason": "no <b>picture</b>"}] if stage == "extract" else []
        content = {"rows_in": 2, "rows_out": 2, "refused": refused, "seconds": 1.25, "items_per_second": 1.6}
        content |= {"peak_memory_mb": 100, "input_fingerprint": "photographs"}
        run.write_manifest(stage, run.fingerprint(stage, "photographs"), content)
    return run


def _matrices(num_concepts: int) -> np.ndarray:
    """Return the pixels of two photographs, (2, classes, concepts)."""
    own, other = (np.eye(16, num_concepts, k, dtype=np.int64) for k in (0, 1))
    return np.stack([60 * own + 40 * other, 10 * own + 20 * other])


def _counts(num_concepts: int) -> dict:
    matrices = _matrices(num_concepts)
    where = matrices.nonzero()
    photo, classes, concepts = where
    of_stage = photo_counts(photo, classes, concept_id=concepts, pixels=matrices[where], shape=matrices.shape)
    return dict.fromkeys(STAGE_NAMES, of_stage)


def _write_confusions(folder: Folder, ids: list[str], num_concepts: int, labels: bool) -> None:
    columns = {field.name: [] for field in confusions_schema()}
    matrices = _matrices(num_concepts)
    for photo, class_id, concept_id in np.argwhere(matrices) if labels else []:
        for method in STAGE_NAMES:
            values = ids[photo], method, class_id, concept_id, matrices[photo, class_id, concept_id]
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    folder.write_bytes("confusions/part-000000.parquet", to_parquet(build_table(columns, confusions_schema()), {}))


def _write_sample(
    folder: Folder, name: str, image_id: str, num_concepts: int, labels: bool, rng: np.random.Generator
) -> None:
    def save(file: str, pixels: np.ndarray) -> None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG" if file.endswith("jpg") else "PNG")
        folder.write_bytes(f"samples/{name}/{file}", buffer.getvalue())

    width, height = _SIZE
    save("photo.jpg", rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for mask in (*STAGE_NAMES, *(["truth"] if labels else [])):
        save(f"{mask}.png", rng.integers(0, min(16, num_concepts), (height, width), dtype=np.uint8))
    save("pseudo_label.png", rng.integers(0, min(16, num_concepts), (2, 3), dtype=np.uint8))
    save("prior.png", rng.integers(0, 256, (2, 3), dtype=np.uint8))
    folder.write_bytes(f"samples/{name}/sample.json", json.dumps({"image_id": image_id}).encode())


def _write_atlas(folder: Folder, kinds: tuple[str, ...], rng: np.random.Generator, examples: bool) -> None:
    num_concepts = len(kinds)
    concepts = {
        "concept_id": np.arange(num_concepts, dtype=np.int32),
        "kind": kinds,
        "centroid": rng.normal(size=(num_concepts, 8)).astype(np.float32),
        "num_crops": rng.integers(1, 100, num_concepts),
    }
    folder.write_bytes("concepts.parquet", to_parquet(build_table(concepts, concepts_schema(8)), {}))
    if not examples:
        return
    found = [
        {"patch_share": 1 / num_concepts, "followed_by": [[(i + 1) % num_concepts, 0.25]]} for i in range(num_concepts)
    ]
    folder.write_bytes("atlas.json", json.dumps({"concepts": found}).encode())
    columns = {field.name: [] for field in atlas_schema()}
    for concept in range(num_concepts):
        for what, rank in [*(("crop", i) for i in range(6)), *(("map", i) for i in range(3))]:
            # Noise, so that pictures are at least as large as those of photographs.
            buffer = io.BytesIO()
            side = 80 if what == "crop" else 120
            pixels = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((side, side)).save(buffer, "WEBP", quality=75)
            row = concept, what, rank, HOSTILE, [0, 0, 4, 4], 0.5, buffer.getvalue()
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    columns["box_xyxy"] = np.array(columns["box_xyxy"], dtype=np.int32)
    folder.write_bytes("atlas/part-000000.parquet", to_parquet(build_table(columns, atlas_schema()), {}))
