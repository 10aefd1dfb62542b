"""Any labelled photographs: a folder of images, a folder of masks, and a file that names the ids in the masks.

Datasets in shards share the file of names.
"""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import replace

from transfgu_ray.datasets.dataset import VOID, DatasetSpec
from transfgu_ray.datasets.listing import Listing, photos_of
from transfgu_ray.errors import ArtifactError, ConfigError, StorageError
from transfgu_ray.storage import Folder


def _list_split(root: Folder, split: str, granularity: str) -> tuple[Listing, str]:
    folder = f"images/{split}" if root.exists("images/train") and root.exists("images/val") else "images"

    def mask_of(path: str) -> str:
        return f"masks/{posixpath.splitext(path.removeprefix('images/'))[0]}.png"

    return photos_of(root, folder, mask_of=mask_of, recursive=True), "masks"


NAMES_FILE = "names.txt"
_EVALUATE_SPLIT = "val"
PAIRED = DatasetSpec(
    name="paired",
    expects=f"images/**, masks/** (PNG of the same path and stem), {NAMES_FILE} with a line `id: name | thing` or "
    "`id: name | stuff` per id; ids with the same name are merged, the name void leaves an id out. Where images/ "
    "holds train/ and val/, those are the splits, else both splits hold all photographs",
    list_split=_list_split,
    region_mode="no_prior",
    train_split="train",
    evaluate_split=_EVALUATE_SPLIT,
    has_own_names=True,
)
_LINE = re.compile(r"(\d+)\s*:\s*([^|]+?)\s*(?:\|\s*(thing|stuff))?$")
_VOID = "void"


def named_dataset(lines: Sequence[str], spec: DatasetSpec = PAIRED) -> DatasetSpec:
    """Return a dataset with the classes of its names file; without lines it has no labels.

    Args:
        lines: each `id: name`, `id: name | thing` or `id: name | stuff`; a class without a kind is a thing, except the
            one called background.
        spec: of a dataset that has its own names.

    Raises:
        ValueError: a line has another form, an id is above 255, repeated or void, or a name has two kinds.
    """
    kinds: dict[str, str] = {}
    name_of_id: dict[int, str] = {}
    for line in lines:
        found = _LINE.match(line.strip())
        if not found:
            raise ValueError(f"{NAMES_FILE}: {line!r} must be `id: name`, `id: name | thing` or `id: name | stuff`")
        label_id, name = int(found[1]), found[2]
        if label_id > VOID or label_id in name_of_id or (label_id == VOID and name != _VOID):
            raise ValueError(f"{NAMES_FILE}: id {label_id} must occur once and be below {VOID}, which is void")
        name_of_id[label_id] = name
        if name == _VOID:
            continue
        kind = found[3] or ("stuff" if name == "background" else "thing")
        if kinds.setdefault(name, kind) != kind:
            raise ValueError(f"{NAMES_FILE}: {name} is called both thing and stuff; give all its ids the same kind")
    names = tuple(kinds)
    return replace(
        spec,
        evaluate_split=_EVALUATE_SPLIT if names else spec.evaluate_split,
        class_names=names,
        class_kinds=tuple(kinds.values()),
        class_of_id={i: VOID if name == _VOID else names.index(name) for i, name in name_of_id.items()},
    )


def read_names(uri: str, spec: DatasetSpec = PAIRED) -> list[str]:
    """Return the lines of the names file of a copy of a dataset, comments and empty lines left out.

    Args:
        uri: root of the dataset.
        spec: the dataset; nothing is returned where its file is missing and may be.

    Raises:
        ConfigError: the file cannot be read.
        StorageError: the storage does not answer.
    """
    may_be_missing = spec.evaluate_split is None
    if may_be_missing and not uri:
        return []
    try:
        # Editors on Windows begin a file with a mark that is no part of it.
        lines = Folder(uri).read_bytes(NAMES_FILE).decode("utf-8-sig").splitlines()
    except StorageError:
        raise
    except UnicodeDecodeError:
        raise ConfigError(f"{NAMES_FILE} in data.root={uri} is not UTF-8; save it as UTF-8") from None
    except (OSError, ArtifactError) as error:
        if may_be_missing and isinstance(error, FileNotFoundError):
            return []
        raise ConfigError(
            f"dataset {spec.name} needs a readable {NAMES_FILE} in data.root={uri or '(not given)'}; it expects "
            f"{spec.expects}"
        ) from None
    stripped = map(str.strip, lines)
    return [line for line in stripped if line and not line.startswith("#")]
