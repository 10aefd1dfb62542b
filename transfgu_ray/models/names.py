"""Names that people give to concepts: concepts with the same name form one class, and null hides a concept.

They are in `names.yaml` beside the model, so that every reader of the model can apply them. Training does not use them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import yaml

from transfgu_ray.errors import ConfigError, foreign_words
from transfgu_ray.storage import Folder

FILE = "names.yaml"
_MAX_CHARS = 60


@dataclass(frozen=True)
class Names:
    """Names of some or all concepts of a model.

    Attributes:
        kinds: kind of each class of the model; the last is `none` where Eq. 8 makes a background class.
        of_concept: id -> name; None hides the concept. Other concepts keep their number.
    """

    kinds: tuple[str, ...]
    of_concept: Mapping[int, str | None]

    @property
    def background_id(self) -> int | None:
        """Class of hidden concepts: the background of Eq. 8, else one more after the concepts if any are hidden."""
        if self.kinds[-1] == "none":
            return len(self.kinds) - 1
        return len(self.kinds) if self.hidden else None

    @property
    def num_classes(self) -> int:
        """Number of class ids, including unused ones of concepts that were merged into others."""
        return max(len(self.kinds), -1 if self.background_id is None else self.background_id + 1)

    @property
    def hidden(self) -> list[int]:
        """The hidden concepts."""
        return [concept for concept, name in sorted(self.of_concept.items()) if name is None]

    @cached_property
    def class_of(self) -> np.ndarray:
        """Class id of each class of the model, int64 (classes,).

        Classes with the same name become the first of them, or the background if it is among them.
        """
        table = np.arange(len(self.kinds))
        groups: dict[str, list[int]] = {}
        for concept, name in sorted(self.of_concept.items()):
            if name is not None:
                groups.setdefault(name, []).append(concept)
        for group in groups.values():
            table[group] = group[-1] if self.kinds[group[-1]] == "none" else group[0]
        if self.background_id is not None:
            table[self.hidden] = self.background_id
        return table

    @property
    def used(self) -> list[int]:
        """Class ids that a mask may hold, in order."""
        return [int(class_id) for class_id in np.unique(self.class_of)]

    def members(self, class_id: int) -> list[int]:
        """Return the concepts that make up a class."""
        return [int(concept) for concept in np.flatnonzero(self.class_of == class_id)]

    def label(self, class_id: int) -> str:
        """Return the name to show for a class."""
        name = self.of_concept.get(class_id)
        if name is not None:
            return name
        return "background" if class_id == self.background_id else f"concept {class_id}"

    def apply(self, mask: np.ndarray) -> np.ndarray:
        """Return the named classes of a mask from the model, uint8, or uint16 beyond 256 classes."""
        dtype = np.uint8 if self.num_classes <= 256 else np.uint16
        classes: np.ndarray = self.class_of.astype(dtype)[mask]
        return classes

    def dump(self) -> bytes:
        """Return the content of a names.yaml."""
        return yaml.safe_dump(dict(self.of_concept), allow_unicode=True).encode()


def parse_names(data: bytes, where: str, kinds: tuple[str, ...]) -> Names:
    """Return the names in a YAML file.

    Args:
        data: content of the file: a mapping of concept ids to names.
        where: the file, for messages.
        kinds: kind of each class of the model.

    Raises:
        ConfigError: the content is not such a mapping, an id is not in the model, or a name cannot be shown.
    """
    try:
        root = yaml.compose(data, Loader=yaml.SafeLoader)
        values = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where} is not YAML ({foreign_words(error)}); write one line per concept, e.g. `3: sky`"
        ) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must map concept ids to names, one line per concept, e.g. `3: sky`")
    if root is not None and len(root.value) > len(values):
        raise ConfigError(f"{where} has an id twice; give each concept one name")
    for concept, name in values.items():
        _check(concept, name, where=where, kinds=kinds)
    names = Names(kinds, dict(sorted(values.items())))
    if len(names.hidden) >= len(kinds) - kinds.count("none"):
        raise ConfigError(f"{where} hides every concept; leave at least one visible")
    return names


def _check(concept: Any, name: Any, *, where: str, kinds: tuple[str, ...]) -> None:
    if type(concept) is not int or not 0 <= concept < len(kinds):
        raise ConfigError(f"{where}: {concept!r:.60} is not a concept of this model; its ids are 0 to {len(kinds) - 1}")
    if name is None and kinds[concept] == "none":
        raise ConfigError(f"{where}: {concept} is already the background; only concepts can be hidden")
    if name is not None and (
        not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > _MAX_CHARS
    ):
        raise ConfigError(
            f"{where}: the name of {concept}, {name!r:.60}, must be printable text of 1 to {_MAX_CHARS} characters (in "
            "quotes where YAML would read it as something else), or null to hide the concept"
        )


def load_names(model: Folder, kinds: tuple[str, ...]) -> Names:
    """Return the names beside a model; empty where there is no file of names.

    Raises:
        ConfigError: the file is damaged.
    """
    if not model.exists(FILE):
        return Names(kinds, {})
    return parse_names(model.read_bytes(FILE), model.uri_of(FILE), kinds)
