"""The names of what scenes are made of; nothing heavy is imported here."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SceneClass:
    """One kind of object or ground.

    Attributes:
        name: unique.
        super_name: the coarser class it belongs to.
        kind: an object with a shape of its own ('thing') or a surface without ('stuff').
    """

    name: str
    super_name: str
    kind: Literal["thing", "stuff"]


# A class's id is its place here; things come first.
CLASSES = (
    SceneClass("zebra", "animal", "thing"),
    SceneClass("turtle", "animal", "thing"),
    SceneClass("fish", "animal", "thing"),
    SceneClass("car", "vehicle", "thing"),
    SceneClass("bus", "vehicle", "thing"),
    SceneClass("boat", "vehicle", "thing"),
    SceneClass("sofa", "furniture", "thing"),
    SceneClass("wardrobe", "furniture", "thing"),
    SceneClass("teapot", "furniture", "thing"),
    SceneClass("cactus", "plant", "thing"),
    SceneClass("flower", "plant", "thing"),
    SceneClass("mushroom", "plant", "thing"),
    SceneClass("grass", "ground", "stuff"),
    SceneClass("water", "ground", "stuff"),
    SceneClass("brick", "wall", "stuff"),
    SceneClass("planks", "wall", "stuff"),
)
SUPER_NAMES = ("animal", "vehicle", "furniture", "plant", "ground", "wall")
# The super-category's id of each class id.
SUPER_IDS = tuple(SUPER_NAMES.index(each.super_name) for each in CLASSES)
THING_IDS = tuple(i for i, each in enumerate(CLASSES) if each.kind == "thing")
STUFF_IDS = tuple(i for i, each in enumerate(CLASSES) if each.kind == "stuff")
