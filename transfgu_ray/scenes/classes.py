"""The classes of scenes; importing them needs nothing heavy."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SceneClass:
    """One kind of object or ground.

    Attributes:
        name: unique.
        super_name: the coarser class to which it belongs.
        kind: an object with its own shape ('thing') or a surface without one ('stuff').
    """

    name: str
    super_name: str
    kind: Literal["thing", "stuff"]


# A class's id is its index here; things come first.
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
# The id of each class's super-category.
SUPER_IDS = tuple(SUPER_NAMES.index(each.super_name) for each in CLASSES)
THING_IDS = tuple(i for i, each in enumerate(CLASSES) if each.kind == "thing")
STUFF_IDS = tuple(i for i, each in enumerate(CLASSES) if each.kind == "stuff")
