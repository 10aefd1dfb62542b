"""Rendered photographs with exact labels: 12 kinds of things and 4 of stuff, no third-party art.

Shape and surface identify the class: every hue is drawn at random, and only the lightness of a part depends on what it
is. One scale holds throughout: a scene is 256 units per side and an object image shows a window of half that side.
Names are loaded on first use, so that the table of classes can be read without NumPy and Pillow.
"""

from importlib import import_module
from typing import Any

from transfgu_ray.scenes.classes import CLASSES, STUFF_IDS, SUPER_IDS, SUPER_NAMES, THING_IDS, SceneClass

_LAZY = {
    "render_object": "transfgu_ray.scenes.compose",
    "render_scene": "transfgu_ray.scenes.compose",
    "write_objects": "transfgu_ray.scenes.write",
    "write_scenes": "transfgu_ray.scenes.write",
}
__all__ = ["CLASSES", "STUFF_IDS", "SUPER_IDS", "SUPER_NAMES", "THING_IDS", "SceneClass", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
