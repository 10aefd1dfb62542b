"""atlas.html: a self-contained page that shows what each concept of a run is, made from the run's artifacts alone."""

import base64
import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from transfgu_ray import __version__
from transfgu_ray.algorithms.scores.examples import plane
from transfgu_ray.models.model import load_model_config
from transfgu_ray.models.names import Names, load_names
from transfgu_ray.reports.page import hex_colour, render, within_bytes
from transfgu_ray.reports.run_page import matched_colours, names_line
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.tables import atlas_schema, vectors
from transfgu_ray.storage import Folder

# The pictures' part of the page's 8 MB; a thousand concepts without pictures take 1.5 MB.
_PICTURE_BYTES = 5_500_000
_NUM_NEAREST = 3
_WIDTH, _HEIGHT, _MARGIN = 560, 380, 30
_MAX_LABELS = 60
_RADIUS = (5, 15)
# Size of a label in phone-sized type, and its distance from the disc.
_LETTER_WIDTH, _LINE_HEIGHT, _LABEL_GAP = 9.5, 16, 2


def write_atlas(run: Run) -> int:
    """Write atlas.html and return the number of pictures in it.

    Args:
        run: an evaluated run.
    """
    folder = run.folder
    metrics, found = folder.read_json("metrics.json"), folder.read_json("atlas.json")["concepts"]
    model_folder = Folder(folder.uri_of("model"))
    model = load_model_config(model_folder)
    names = load_names(model_folder, model.kinds)
    colours = matched_colours(model, metrics, names)["pred"]
    table = folder.read("concepts.parquet", pq.read_table)
    centroids = vectors(table["centroid"])
    kinds, num_crops = table["kind"].to_pylist(), table["num_crops"].to_pylist()
    matched = {c: row["name"] for row in metrics["per_class"] or [] for c in row["concepts"]}
    pictures, num_found = _pictures(folder)
    places, variance = plane(centroids.astype(np.float64))
    x, y, radius = _on_page(places, np.array(num_crops))
    nearest = _nearest(centroids)
    shorts = [_short(i, names.of_concept.get(i)) for i in range(len(kinds))]
    labels = _place_labels(x, y, radius=radius, texts=shorts) if len(kinds) <= _MAX_LABELS else [None] * len(kinds)
    concepts = [
        _described(i, kind, num_crops=num_crops[i], names=names, matched=matched.get(i))
        | {
            "patch_share": found[i]["patch_share"],
            "followed_by": found[i]["followed_by"][:_NUM_NEAREST],
            "nearest": nearest[i],
            "colour": hex_colour(colours[i]),
            "x": f"{x[i]:.1f}",
            "y": f"{y[i]:.1f}",
            "label": labels[i],
            "radius": f"{radius[i]:.1f}",
            "short": shorts[i],
            "crops": pictures["crop", i],
            "maps": pictures["map", i],
        }
        for i, kind in enumerate(kinds)
    ]
    page = render(
        "atlas.html",
        name=folder.uri.rstrip("/").rpartition("/")[2],
        version=__version__,
        config=run.config,
        names_line=names_line(names),
        concepts=concepts,
        short=shorts,
        kinds=sorted(set(kinds)),
        has_background_kind="background" in kinds,
        has_classes=bool(metrics["per_class"]),
        variance=variance,
        width=_WIDTH,
        height=_HEIGHT,
        num_pictures=sum(map(len, pictures.values())),
        num_found=num_found,
    )
    folder.write_bytes("atlas.html", page)
    return sum(map(len, pictures.values()))


def _described(concept: int, kind: str, *, num_crops: int, names: Names, matched: str | None) -> dict[str, Any]:
    """Return what the page says about a concept."""
    name = names.of_concept.get(concept)
    hidden = concept in names.of_concept and name is None
    same = [c for c in names.members(names.class_of[concept]) if c != concept] if not hidden else []
    title = [f"concept {concept}", name, "hidden" if hidden else None, f"matched to {matched}" if matched else None]
    return {
        "id": concept,
        "name": name,
        "hidden": hidden,
        "title": " · ".join(filter(None, [*title, kind, f"{num_crops:,} crops"])),
        "words": " ".join(filter(None, [str(concept), kind, name, matched])).lower(),
        "kind": kind,
        "matched": matched,
        "with": ", ".join(map(str, same)),
        "num_crops": num_crops,
    }


def _short(concept: int, name: str | None) -> str:
    return str(concept) if name is None else f"{concept} {name}"


def _pictures(run_folder: Folder) -> tuple[defaultdict[tuple[str, int], list[dict[str, Any]]], int]:
    """Return the pictures of each kind and concept that fit in the page, best first, and the number of all pictures."""
    parts = [pq.read_table(pa.BufferReader(run_folder.read_bytes(name))) for name, _ in run_folder.files("atlas")]
    rows = pa.concat_tables([atlas_schema().empty_table(), *(p.replace_schema_metadata() for p in parts)]).to_pylist()
    # Every concept's best picture comes before any second one.
    rows.sort(key=lambda row: (row["rank"], row["what"], row["concept_id"]))
    shown = rows[: within_bytes((row["picture"] for row in rows), _PICTURE_BYTES)]
    pictures = defaultdict(list)
    for row in shown:
        entry = {"data": base64.b64encode(row["picture"]).decode(), "image_id": row["image_id"], "value": row["value"]}
        pictures[row["what"], row["concept_id"]].append(entry)
    return pictures, len(rows)


def _on_page(places: np.ndarray, num_crops: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the centre and radius of each concept's disc; both axes share one scale, which keeps distances true."""
    middle = (places.max(0) + places.min(0)) / 2
    span = np.maximum(places.max(0) - places.min(0), 1e-9)
    room = np.array([_WIDTH, _HEIGHT]) - 2 * _MARGIN
    x, y = ((places - middle) * (room / span).min()).T
    least, most = _RADIUS
    radius = np.clip(most * np.sqrt(num_crops / max(num_crops.max(), 1)), least, most)
    return x + _WIDTH / 2, _HEIGHT / 2 - y, radius if len(places) <= _MAX_LABELS else radius / 2


def _place_labels(
    x: np.ndarray, y: np.ndarray, *, radius: np.ndarray, texts: list[str]
) -> list[tuple[str, str, str] | None]:
    """Return the centre and text of each disc's label: above, below, right or left, clear of every disc and label.

    Where the text does not fit, the number stands alone; None where that does not fit either.
    """
    taken = np.stack([x - radius, y - radius, x + radius, y + radius], axis=1)
    places: list[tuple[str, str, str] | None] = []
    for i, words in enumerate(texts):
        places.append(None)
        for text, towards in itertools.product((words, str(i)), ((0, -1), (0, 1), (1, 0), (-1, 0))):
            half = np.array([_LETTER_WIDTH * len(text), _LINE_HEIGHT]) / 2
            away = half + radius[i] + _LABEL_GAP
            middle = np.array([x[i], y[i]]) + away * towards
            box = np.concatenate([middle - half, middle + half])
            outside = (box[:2] < 0).any() or (box[2:] > (_WIDTH, _HEIGHT)).any()
            if not outside and not ((box[:2] < taken[:, 2:]) & (box[2:] > taken[:, :2])).all(1).any():
                taken = np.vstack([taken, box])
                places[i] = f"{middle[0]:.1f}", f"{middle[1]:.1f}", text
                break
    return places


def _nearest(centroids: np.ndarray) -> list[list[int]]:
    """Return the concepts with the nearest centroids, for each concept."""
    squares = (centroids**2).sum(1)
    distances = squares[:, None] + squares[None] - 2 * centroids @ centroids.T
    np.fill_diagonal(distances, np.inf)
    order = np.argsort(distances, axis=1, kind="stable")[:, : min(_NUM_NEAREST, len(centroids) - 1)]
    return [[int(concept) for concept in row] for row in order]
