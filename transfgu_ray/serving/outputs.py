"""Whose masks lie in an output folder: those of one model, since one legend stands for all of them."""

import re
from collections.abc import Collection, Iterator
from typing import Any

from transfgu_ray.storage import Folder

OUTPUTS = "predict.files.json"
_SHARED = ("legend.json", "legend.png", "coco/labels.json", "coco/panoptic.json")
_PROBABILITY = re.compile(r"probabilities/(.+)/\d+\.png")


def claim(out: Folder, model_sha256: str, stems: Collection[str]) -> int:
    """Note that outputs of a model come to lie in a folder, after removing those of another; return how many masks.

    Nothing is removed but what an earlier call has noted here. Photographs of earlier calls with the same model stay.

    Args:
        out: output folder.
        model_sha256: hash of everything that masks and legend depend on.
        stems: file names of the masks to come, without extension.
    """
    held, removed = _held(out), 0
    if held["model_sha256"] != model_sha256:
        for name in list(_written(out, set(held["stems"]))):
            out.delete(name)
            removed += name.startswith("masks/")
        for name in _SHARED if held["stems"] else ():
            out.delete(name)
        held["stems"] = []
    out.write_json(OUTPUTS, {"model_sha256": model_sha256, "stems": sorted({*held["stems"], *stems})})
    return removed


def _held(out: Folder) -> dict[str, Any]:
    """Return what the last call noted; no model and no masks where there is no note, or none that can be read."""
    try:
        held = out.read_json(OUTPUTS)
        return {"model_sha256": held["model_sha256"], "stems": [str(stem) for stem in held["stems"]]}
    except (ValueError, TypeError, KeyError):
        return {"model_sha256": None, "stems": []}


def _written(out: Folder, stems: Collection[str]) -> Iterator[str]:
    """Yield the files there that a prediction writes for some photographs."""
    endings = {"masks": ("png",), "overlays": ("jpg", "png"), "coco/panoptic": ("png",)}
    for folder, allowed in endings.items():
        possible = {f"{folder}/{stem}.{ending}" for stem in stems for ending in allowed}
        yield from (name for name, _ in out.files(folder, recursive=True) if name in possible)
    for name, _ in out.files("probabilities", recursive=True):
        found = _PROBABILITY.fullmatch(name)
        if found and found[1] in stems:
            yield name
