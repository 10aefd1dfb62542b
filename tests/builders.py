"""Small things that tests need: photographs, labelled datasets, damaged files, a tiny encoder. No network."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from scipy.optimize import linear_sum_assignment
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, load_encoder, random_vit
from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.config.sections import DataConfig
from transfgu_ray.datasets.listing import Listing, list_images
from transfgu_ray.scenes.classes import CLASSES, SUPER_IDS

TINY_VIT = "vit_tiny_patch16_224"
TINY_OVERRIDES = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
VOID = 255
# VOC label id -> colour of its rectangles: cat, dog, horse.
_CLASS_COLOURS = {8: (210, 60, 50), 12: (60, 180, 75), 13: (50, 80, 200)}


def tiny_encoder(seed: int = 0, **overrides: int) -> Encoder:
    """A frozen two-block ViT with weights from `seed`, through the same bytes that a run stores."""
    overrides = TINY_OVERRIDES | overrides
    vit = shake(random_vit(TINY_VIT, overrides, seed), seed)
    return load_encoder(dump_encoder(vit, TINY_VIT, overrides=overrides), "tiny")


def small_resnet(block: type[BasicBlock] | type[Bottleneck] = BasicBlock) -> ResNet:
    """A ResNet-50 with one block a stage, of the same layout; with `Bottleneck` also of the same channels."""
    resnet = ResNet(block, [1, 1, 1, 1])
    resnet.fc = torch.nn.Identity()
    return resnet


def shake(vit: torch.nn.Module, seed: int = 0, scale: float = 0.05) -> torch.nn.Module:
    """The model with noise on every weight: as initialised, biases and layer scales are too plain to show a slip."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in vit.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=rng))
    return vit


def random_images(num: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """RGB noise, uint8, (num, 3, height, width)."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, height, width), generator=rng, dtype=torch.uint8)


def damaged_copies(whole: bytes, count: int) -> Iterator[bytes]:
    """Copies of a file with three bytes changed near one of its ends, where headers and metadata lie."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        broken = bytearray(whole)
        near = rng.integers(0, min(300, len(whole)), 3)
        for place in near if rng.random() < 0.7 else len(whole) - 1 - near:
            broken[place] = rng.integers(256)
        yield bytes(broken)


def scene(size: tuple[int, int], rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A photograph of two coloured rectangles on a graded ground, and its VOC palette mask with void borders."""
    width, height = size
    ramp = np.linspace(90, 160, width)[None, :, None] + rng.normal(0, 6, (height, width, 3))
    photo = Image.fromarray(ramp.clip(0, 255).astype(np.uint8))
    mask = Image.new("P", size, 0)
    mask.putpalette(_voc_palette())
    for label in rng.choice(list(_CLASS_COLOURS), 2, replace=False):
        w, h = (int(side * rng.uniform(0.3, 0.5)) for side in size)
        left, top = int(rng.integers(width - w)), int(rng.integers(height - h))
        box = (left, top, left + w, top + h)
        ImageDraw.Draw(photo).rectangle(box, fill=_CLASS_COLOURS[int(label)])
        ImageDraw.Draw(mask).rectangle(box, fill=int(label), outline=VOID, width=2)
    return photo, mask


def make_folder(path: Path | str, num_images: int = 6, size: tuple[int, int] = (96, 72), seed: int = 0) -> Path:
    """A folder of photographs `photo_000.jpg` ... of (width, height) px."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(num_images):
        scene(size, rng)[0].save(path / f"photo_{i:03}.jpg", quality=92)
    return path


def make_voc(
    path: Path | str, num_train: int = 6, num_val: int = 3, size: tuple[int, int] = (96, 72), seed: int = 0
) -> Path:
    """A VOC devkit of photographs of (width, height) px with masks of labels 0, 8, 12, 13 and 255."""
    path = Path(path)
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (path / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    stems = [f"2007_{i:06}" for i in range(num_train + num_val)]
    for stem in stems:
        photo, mask = scene(size, rng)
        photo.save(path / "JPEGImages" / f"{stem}.jpg", quality=92)
        mask.save(path / "SegmentationClass" / f"{stem}.png")
    lists = path / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("".join(f"{stem}\n" for stem in stems[:num_train]))
    (lists / "val.txt").write_text("".join(f"{stem}\n" for stem in stems[num_train:]))
    return path


def _labelled(photo: Path, label: Path, ids: dict[int, int], size: tuple[int, int], rng: np.random.Generator) -> None:
    """A photograph of two rectangles and its greyscale label, whose VOC ids are changed into others."""
    image, mask = scene(size, rng)
    table = np.full(256, VOID, dtype=np.uint8)
    table[list(ids)] = list(ids.values())
    for path, picture in ((photo, image), (label, Image.fromarray(table[np.asarray(mask)]))):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def make_coco(path: Path | str, num_train: int = 3, num_val: int = 3, size: tuple[int, int] = (96, 72)) -> Path:
    """COCO with stuffthingmaps: grass, cats, dogs and horses, void borders; every photograph is annotated."""
    path, rng, number = Path(path), np.random.default_rng(0), 0
    for split, count in (("train", num_train), ("val", num_val)):
        found = []
        for _ in range(count):
            name = f"{split}2017/{number:012}"
            ids = {0: 123, 8: 16, 12: 17, 13: 18}
            _labelled(path / f"images/{name}.jpg", path / f"annotations/{name}.png", ids, size, rng)
            found.append({"image_id": number, "category_id": 17})
            number += 1
        (path / f"annotations/instances_{split}2017.json").write_text(json.dumps({"annotations": found}))
    return path


def make_cityscapes(path: Path | str, num_train: int = 3, num_val: int = 2, size: tuple[int, int] = (96, 48)) -> Path:
    """Cityscapes: a road with a person, a car and a bicycle, of which two are seen."""
    path, rng = Path(path), np.random.default_rng(0)
    for split, count in (("train", num_train), ("val", num_val)):
        for i in range(count):
            stem = f"{split}/aachen/aachen_{i:06}_000019"
            photo, label = path / f"leftImg8bit/{stem}_leftImg8bit.png", path / f"gtFine/{stem}_gtFine_labelIds.png"
            _labelled(photo, label, {0: 7, 8: 24, 12: 26, 13: 33, VOID: 4}, size, rng)
    return path


def make_lip(path: Path | str, num_train: int = 3, num_val: int = 2, size: tuple[int, int] = (48, 96)) -> Path:
    """LIP: hair, pants and a left shoe on the background, of which two are seen."""
    path, rng = Path(path), np.random.default_rng(0)
    for split, count in (("train", num_train), ("val", num_val)):
        for i in range(count):
            photo, label = path / f"{split}_images/{i:04}.jpg", path / f"{split}_segmentations/{i:04}.png"
            _labelled(photo, label, {0: 0, 8: 2, 12: 9, 13: 18}, size, rng)
        (path / f"{split}_id.txt").write_text("".join(f"{i:04}\n" for i in range(count)))
    return path


def make_paired(path: Path | str, num_images: int = 4, size: tuple[int, int] = (96, 72)) -> list[str]:
    """Photographs, masks and a names file; returns its lines. Cat and dog are one class, `pet`."""
    path, rng = Path(path), np.random.default_rng(0)
    for i in range(num_images):
        photo, label = path / f"images/deep/{i}.jpg", path / f"masks/deep/{i}.png"
        _labelled(photo, label, {0: 0, 8: 1, 12: 2, 13: 3}, size, rng)
    lines = ["0: background", "1: pet | thing", "2: pet | thing", "3: horse"]
    (path / "names.txt").write_text("# what the ids are\n" + "".join(f"{line}\n" for line in lines))
    return lines


def make_scenes(
    path: Path | str, num_train: int = 6, num_val: int = 3, size: tuple[int, int] = (96, 72), seed: int = 0
) -> Path:
    """The layout of dataset `scenes`: a coloured rectangle of a thing on a ground of stuff, void borders between."""
    path = Path(path)
    rng = np.random.default_rng(seed)
    colours = rng.integers(40, 216, (len(CLASSES), 3))
    super_ids = np.array([*SUPER_IDS, *[VOID] * (256 - len(CLASSES))])
    for split, count in (("train", num_train), ("val", num_val)):
        folders = [path / name / split for name in ("images", "masks/fine", "masks/super")]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            thing, stuff = int(rng.integers(12)), int(rng.integers(12, 16))
            mask = Image.new("L", size, stuff)
            width, height = size
            box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
            ImageDraw.Draw(mask).rectangle(box, fill=thing, outline=VOID)
            fine = np.asarray(mask)
            pixels = colours[np.where(fine == VOID, stuff, fine)] + rng.normal(0, 6, (height, width, 3))
            for folder, picture in zip(folders, (pixels.clip(0, 255), fine, super_ids[fine]), strict=True):
                Image.fromarray(picture.astype(np.uint8)).save(folder / f"scene_{i:03}.png")
    return path


def make_table(
    file: Path | str, num_images: int, size: tuple[int, int] = (40, 40), seed: int = 0, row_group_size: int = 1000
) -> Path:
    """Parquet of encoded pictures of two classes, `path` (`class/000.png`), `bytes`, `label` and `mask` (255 = object).

    A class is a colour of the object, a rectangle on grey noise.
    """
    file, rng, rows = Path(file), np.random.default_rng(seed), []
    for i in range(num_images):
        label = i % 2
        noise = rng.normal(120, 20, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
        photo, mask = Image.fromarray(noise), Image.new("L", size, 0)
        left, top = (int(rng.integers(side // 2)) for side in size)
        box = (left, top, left + size[0] // 2, top + size[1] // 2)
        ImageDraw.Draw(photo).rectangle(box, fill=[(210, 60, 50), (50, 80, 200)][label])
        ImageDraw.Draw(mask).rectangle(box, fill=255)
        name = f"{'ab'[label]}/{i:03}.png"
        rows.append({"path": name, "bytes": encode_png(photo), "label": label, "mask": encode_png(mask)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=row_group_size)
    return file


def contents(folder: Path | str) -> dict[str, bytes]:
    """Every file below a folder by its relative path, sorted."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def make_tar(file: Path | str, members: Mapping[str, bytes], kind: int = tarfile.PAX_FORMAT, mode: str = "w") -> Path:
    """A tar of these members, in order; `mode` is that of `tarfile`, e.g. `w:gz`."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode, format=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def make_hub_table(
    file: Path | str,
    images: Mapping[str | None, bytes | None],
    masks: Sequence[bytes] = (),
    row_group_size: int = 100,
) -> Path:
    """Parquet as the Hugging Face hub has it: `image`, and on request `annotation`, are structs of bytes and path."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [{"bytes": data, "path": name} for name, data in images.items()], "text": ["x"] * len(images)}
    if masks:
        columns["annotation"] = [{"bytes": data, "path": None} for data in masks]
    pq.write_table(pa.table(columns), file, row_group_size=row_group_size)
    return file


def encode_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def make_hostile_folder(path: Path | str) -> tuple[set[str], set[str]]:
    """A folder with what real folders hold; returns the image_ids that are good and those that must be refused."""
    path = make_folder(path, num_images=3)
    photo = scene((96, 72), np.random.default_rng(7))[0]
    photo.convert("CMYK").save(path / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo.save(path / "rotated.jpg", exif=exif)
    grey = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(path / "sixteen_bit.png")
    (path / "sub folder").mkdir(exist_ok=True)
    photo.save(path / "sub folder" / "été à la plage.jpg")
    good = {f"photo_{i:03}.jpg" for i in range(3)}
    good |= {"cmyk.jpg", "rotated.jpg", "sixteen_bit.png", "sub folder/été à la plage.jpg"}

    whole = (path / "photo_000.jpg").read_bytes()
    (path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (path / "text.jpg").write_text("this is not a photograph\n")
    (path / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(path / "dot.png")
    Image.new("RGB", (20000, 20)).save(path / "strip.png")
    return good, {"truncated.jpg", "text.jpg", "empty.jpg", "dot.png", "strip.png"}


def _voc_palette() -> list[int]:
    # The devkit's colour map: bits of the label spread over the high bits of R, G and B.
    palette = np.zeros((256, 3), dtype=np.uint8)
    for label in range(256):
        for bit in range(8):
            for channel in range(3):
                palette[label, channel] |= ((label >> (3 * bit + channel)) & 1) << (7 - bit)
    return palette.reshape(-1).tolist()


def make_two_views(
    num_groups: int, num_each: int, width: int = 8, seed: int = 0
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Tokens, two views of them and their group: groups lie around the unit vectors of their own.

    The last dimension is of each token and view apart, either high or low, and varies more than the groups do.
    """
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(num_groups), num_each)

    def look() -> np.ndarray:
        tokens = np.eye(width)[truth] + rng.normal(0, 0.1, (len(truth), width))
        tokens[:, -1] = rng.choice([-1.5, 1.5], len(truth)) + rng.normal(0, 0.1, len(truth))
        return tokens.astype(np.float32)

    tokens, *views = look(), look(), look()
    return tokens, views, truth


def matched_share(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the points whose cluster is matched to their group, one to one."""
    counts = np.zeros((truth.max() + 1, found.max() + 1))
    np.add.at(counts, (truth, found), 1)
    return counts[linear_sum_assignment(counts, maximize=True)].sum() / len(truth)


def make_trial(number: int, point: dict[str, object], score: float | None, miou: float | None, **more: object) -> dict:
    """A trial as sweep.json has it; finished, with K = 16, unless told otherwise."""
    return {
        "id": f"{number:02}" * 8,
        "run": f"/nowhere/{number:02}",
        "point": point,
        "status": "finished",
        "epochs": 14,
        "num_concepts": 16,
        "score": score,
        "components": {},
        "miou": miou,
        "pixel_accuracy": miou,
        "seconds": 60.0,
        "model_version": None,
        "mlflow_run_id": None,
        "error": None,
    } | more


def make_sweep(space: dict[str, object], trials: list[dict], **more: object) -> dict:
    """What readers need of a sweep.json; without evidence unless told otherwise."""
    return {
        "name": "sweep",
        "preset": "demo",
        "dataset": "scenes",
        "split": "val",
        "objective": "score",
        "sampler": "grid",
        "scheduler": "none",
        "seed": 0,
        "num_photos_probed": 32,
        "space": space,
        "base": {"seed": 0, "train.alpha": [0.03, 0.1]},
        "shared": [{"stage": "extract", "fingerprint": "f" * 64, "seconds": 12.5, "used_by": len(trials)}],
        "trials": trials,
        "evidence": None,
    } | more


def listed(data: DataConfig, split: str, granularity: str | None = None) -> Listing:
    """The photographs of a split of what a configuration names."""
    return list_images(data.root, data.spec, split=split, granularity=granularity)
