"""A case per file: what the published code computed, and ours under the preset `released` from the same inputs."""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from transfgu_ray.algorithms.concepts.windows import (
    BACKGROUND,
    FOREGROUND,
    classify_windows,
    enumerate_patch_windows,
    foreground_fracs,
)
from transfgu_ray.algorithms.encoder.checkpoints import load_vit
from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.algorithms.labels.bank import training_scores
from transfgu_ray.algorithms.labels.cam import keep_top_mass, response_maps
from transfgu_ray.algorithms.rounds.augment import crop_maps
from transfgu_ray.algorithms.rounds.bootstrap import Bootstrap
from transfgu_ray.algorithms.rounds.losses import LossWeights, bootstrap_targets, foreground_patches, total_loss
from transfgu_ray.algorithms.rounds.published import background_last, read_released_decoder
from transfgu_ray.algorithms.rounds.schedule import Epoch, schedule
from transfgu_ray.algorithms.rounds.segmenter import MaskTransformer
from transfgu_ray.algorithms.scores.metrics import confusion_matrix, score
from transfgu_ray.config.presets import get_preset
from transfgu_ray.images import resize_label, to_working
from transfgu_ray.models.model import build_decoder
from transfgu_ray.pipeline.train_loop import bootstrap_settings, model_config

_HEADS = 3
_MEAN, _STD = (np.array(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
_DATASETS = {"voc": "voc", "coco": "coco_stuff27", "cityscapes": "cityscapes27", "lip": "lip19"}
_VOID = 255
Arrays = dict[str, np.ndarray]


class Row(NamedTuple):
    """A comparison: the largest difference of ours from theirs, and how large it may be."""

    name: str
    difference: float
    limit: float

    @property
    def same(self) -> bool:
        """Whether ours is theirs; never if something is NaN."""
        return self.difference <= self.limit


def compare_all(folder: Path) -> Iterator[Row]:
    """Yield the rows of every case, in order."""
    for case in CASES.values():
        yield from case(folder)


def _read(folder: Path, name: str) -> Arrays:
    with np.load(folder / f"{name}.npz") as arrays:
        return dict(arrays)


def _largest(ours: Tensor | np.ndarray | list, theirs: np.ndarray | list) -> float:
    if isinstance(ours, Tensor):
        ours = ours.detach().numpy()
    one, other = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(one - other).max()) if one.shape == other.shape else float("inf")


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)


def _file(arrays: Arrays) -> bytes:
    """Return the weights `w:*` as the published code would have saved them."""
    buffer = io.BytesIO()
    torch.save({name[2:]: _tensor(value) for name, value in arrays.items() if name.startswith("w:")}, buffer)
    return buffer.getvalue()


def _encoder(folder: Path) -> tuple[Encoder, Arrays]:
    arrays = _read(folder, "encoder")
    patch = arrays["w:patch_embed.proj.weight"]
    shape = {
        "embed_dim": patch.shape[0],
        "depth": len({name.split(".")[1] for name in arrays if name.startswith("w:blocks.")}),
        "num_heads": arrays["native:class_attention"].shape[1],
        "patch_size": patch.shape[-1],
        "img_size": arrays["native:images"].shape[-1],
    }
    released = get_preset("released").encoder
    vit = load_vit(_file(arrays), "golden", name="vit_tiny_patch16_224", overrides=shape)
    return Encoder(vit, pos_embed_interpolation=released.pos_embed_interpolation), arrays


def encoder(folder: Path) -> Iterator[Row]:
    """Tokens and the class token's attention, at the encoder's own and at two other sizes."""
    of, arrays = _encoder(folder)
    for size in ("native", "square", "wide"):
        images = _tensor(arrays[f"{size}:images"])
        row = of.class_row(of.prefix(images), of.grid_hw(tuple(images.shape[2:])))
        yield Row(f"encoder, {size}: tokens", _largest(of.all_tokens(images), arrays[f"{size}:tokens"]), 2e-5)
        theirs = arrays[f"{size}:class_attention"]
        yield Row(f"encoder, {size}: class attention", _largest(row.attention, theirs), 1e-6)


def labels(folder: Path) -> Iterator[Row]:
    """Response maps of a batch, whose gradient theirs divides by its size, and of single images."""
    of, images = _encoder(folder)
    arrays, cam = _read(folder, "response_maps"), get_preset("released").cam
    for size in ("square", "wide"):
        batch = _tensor(images[f"{size}:images"])
        for name, some in (("maps", batch), ("maps_batch_of_1", batch[:1])):
            grid_hw = of.grid_hw(tuple(some.shape[2:]))
            maps = response_maps(
                of,
                of.class_row(of.prefix(some), grid_hw),
                centroids=_tensor(arrays["centroids"]),
                grid_hw=grid_hw,
                gradient_scale=1 / len(some),
                keep_mass=cam.keep_mass,
                zeroed=cam.zeroed,
            )
            yield Row(f"response maps, {size}: {name}", _largest(maps, arrays[f"{size}:{name}"]), 1e-5)
    arrays = _read(folder, "keep_mass")
    assert cam.keep_mass is not None
    kept = (keep_top_mass(_tensor(arrays["maps"])[None], cam.keep_mass)[0] > 0).numpy()
    yield Row("keep_mass", _largest(kept, arrays["kept"] & (arrays["maps"] > 0)), 0)


def windows(folder: Path) -> Iterator[Row]:
    """Windows of the datasets, in order, and which of them are foreground and background."""
    arrays = _read(folder, "windows")
    for name, dataset in _DATASETS.items():
        config = get_preset("released", dataset)
        height, width = config.data.image_size
        assert config.extract.window_layout == "patches"
        boxes, _ = enumerate_patch_windows((height // 8, width // 8), 8, config.extract.window_fracs)
        yield Row(f"windows, {name}: px", _largest(boxes, arrays[f"{name}:boxes_x0y0x1y1"]), 0)
    extract = get_preset("released", "coco_stuff27").extract
    numbers = {FOREGROUND: 1, BACKGROUND: 2}
    kinds = [
        [
            numbers.get(kind, 0)
            for kind in classify_windows(
                foreground_fracs(arrays["coco:boxes_x0y0x1y1"], mask, 8),
                "things_and_stuff",
                foreground_min_frac=extract.foreground_min_frac,
                background_min_frac=extract.background_min_frac,
            )
        ]
        for mask in np.unpackbits(arrays["masks"], axis=-1).astype(bool)
    ]
    yield Row("windows, coco: kinds", _largest(kinds, arrays["coco:kinds_0drop_1fg_2bg"]), 0)


def _scores(raw: Tensor, background: bool) -> Tensor:
    """Return raw maps as training sees them; see `load_train_data`."""
    return training_scores(raw, get_preset("released").cam.background_threshold if background else None)


def crops(folder: Path) -> Iterator[Row]:
    """Scores of crops of raw maps, background first."""
    arrays = _read(folder, "crops")
    theirs = arrays["scores_background_first"]
    raw = _tensor(arrays["raw"].astype(np.float32))
    cropped = [
        crop_maps(maps, tuple(box), image_hw=(320, 320), grid_hw=theirs.shape[-2:])
        for maps, box in zip(raw, arrays["boxes_px320"].tolist(), strict=True)
    ]
    yield Row("crops: scores", _largest(_scores(torch.stack(cropped), background=True).roll(1, 1), theirs), 1e-6)


def _released_segmenter(num_classes: int, width: int, num_layers: int) -> MaskTransformer:
    """Return the decoder of the preset, without dropout."""
    config = get_preset("released", "voc")
    model = model_config(config, ["foreground"] * (num_classes - 1), "")
    model = replace(model, decoder_layers=num_layers, decoder_heads=_HEADS)
    decoder = build_decoder(model, width, dropout=0.0, class_init=config.train.class_init)
    assert isinstance(decoder, MaskTransformer)
    return decoder


def decoder(folder: Path) -> Iterator[Row]:
    """Logits and class embeddings of their weights, and the lengths of class embeddings at first."""
    arrays = _read(folder, "decoder")
    found = read_released_decoder(_file(arrays), "golden")
    of = _released_segmenter(found.num_classes, found.width, found.num_layers).eval()
    of.load_state_dict(found.state)
    tokens = _tensor(arrays["tokens"])
    logits, embeddings = of(tokens, (1, tokens.shape[1]))
    yield Row("decoder: logits", _largest(logits.flatten(2).transpose(1, 2), arrays["logits_b_hw_k"]), 2e-5)
    yield Row("decoder: class embeddings", _largest(embeddings, arrays["class_embeddings"]), 1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = _released_segmenter(found.num_classes, found.width, found.num_layers).cls_emb
    theirs = arrays["init_lengths_of_class_embeddings"]
    # Another draw of the same distribution; all lengths together are always 1.
    yield Row(
        "decoder: mean length of first embeddings", abs(first.norm(dim=-1).mean().item() - float(theirs.mean())), 0.05
    )
    yield Row("decoder: length of all first embeddings", abs(first.norm().item() - float(np.linalg.norm(theirs))), 1e-5)


def _shuffle(idx_list: np.ndarray, things: bool) -> Tensor:
    """Return the permutation of ours that makes their negatives: their channels begin with the background, ours end."""
    num_classes, place = len(idx_list), np.argsort(idx_list)
    if not things:
        return _tensor(place)
    return _tensor(np.array([(place[(c + 1) % num_classes] - 1) % num_classes for c in range(num_classes)]))


def losses(folder: Path) -> Iterator[Row]:
    """Every loss term, its targets and gradients."""
    arrays = _read(folder, "losses")
    train = get_preset("released").train
    for mode in ("things", "thingstuff"):
        things = mode == "things"
        first_to_last = -1 if things else 0
        scores = _scores(_tensor(arrays[f"{mode}:raw"]), background=things)
        teacher = _tensor(arrays[f"{mode}:teacher"]).roll(first_to_last, 1)
        for case in ("round0:epoch_iter0", "boot:epoch_iter0", "boot:epoch_iter3", "boot:epoch_iter9"):
            name, boot = f"{mode}:{case}", case.startswith("boot")
            logits = _tensor(arrays[f"{mode}:logits"]).roll(first_to_last, 1).requires_grad_()
            embeddings = _tensor(arrays[f"{mode}:class_embeddings"]).roll(first_to_last, 1).requires_grad_()
            targets = bootstrap_targets(scores, teacher if boot else None)
            epoch = schedule((20,), train.alpha, train.alpha_schedule)[int(case[-1])]
            terms = total_loss(
                logits,
                embeddings,
                targets=targets,
                shuffle=_shuffle(arrays[f"{name}:idx_list"], things),
                weights=LossWeights(alpha=epoch.alpha if boot else 0.0, omega_1=train.omega_1, omega_2=train.omega_2),
                pairs=train.diversity,
                foreground=foreground_patches(scores, 0.1) if things else None,
            )
            at_logits, at_embeddings = torch.autograd.grad(terms["total"], (logits, embeddings))
            ours = [terms[term].item() for term in ("peer", "uncertainty", "diversity", "total")]
            theirs = arrays[f"{name}:grad_logits"], arrays[f"{name}:grad_class_embeddings"]
            yield Row(f"losses, {name}: terms", _largest(ours, arrays[f"{name}:cat_unc_div_total"]), 2e-6)
            num_classes = scores.shape[1]
            own = (targets - first_to_last) % num_classes
            yield Row(f"losses, {name}: targets", _largest(own, arrays[f"{name}:target"]), 0)
            gradients = max(
                _largest(ours.roll(-first_to_last, 1), of_theirs)
                for ours, of_theirs in zip((at_logits, at_embeddings), theirs, strict=True)
            )
            yield Row(f"losses, {name}: gradients", gradients, 2e-6)


class _Given(Bootstrap):
    """A bootstrap whose shuffles are given, one a step."""

    shuffles: Iterator[Tensor]

    def draw_shuffle(self, epoch: Epoch, step: int, *, num_classes: int) -> Tensor:
        return next(self.shuffles)


def optimiser(folder: Path) -> Iterator[Row]:
    """Two rounds of three steps: the decoder after each, and the loss of every step."""
    arrays = _read(folder, "optimiser")
    config = get_preset("released", "voc")
    found = read_released_decoder(_file(_read(folder, "decoder")), "golden")
    student = _released_segmenter(found.num_classes, found.width, found.num_layers)
    student.load_state_dict(background_last(found.state))
    of = _Given(student, replace(bootstrap_settings(config), learning_rate=1e-3))
    of.shuffles = iter([_shuffle(idx_list, things=True) for idx_list in arrays["idx_lists"]])
    epochs = schedule((3, 3), config.train.alpha, config.train.alpha_schedule)
    student_at_first = {name: value.clone() for name, value in student.state_dict().items()}
    differences, after = [], {}
    for step, epoch in enumerate(epochs):
        if step in (0, 3):
            of.begin_epoch(epoch, 0)
        scores = _scores(_tensor(arrays["raw"][step]), background=True)
        terms = of.step(_tensor(arrays["tokens"][step]), scores, epoch=epoch, step=step)
        differences.append(abs(terms["loss"] - float(arrays[f"loss{step}"])))
        after[f"round{epoch.round}"] = {name: value.clone() for name, value in student.state_dict().items()}
    yield Row("optimiser: loss of each step", max(differences), 1e-5)
    for name, state in after.items():
        theirs = {key.removeprefix(f"{name}:"): value for key, value in arrays.items() if key.startswith(f"{name}:")}
        ours = background_last({key: _tensor(value) for key, value in theirs.items()})
        assert state.keys() == ours.keys()
        # Of a whole tensor: Adam enlarges the rounding of a single gradient near 0 to any share of its step.
        shares = [
            ((state[key] - value).norm() / (value - student_at_first[key]).norm()).item() for key, value in ours.items()
        ]
        yield Row(f"optimiser: decoder after {name}, share of each tensor's travel", max(shares), 1e-3)


def metrics(folder: Path) -> Iterator[Row]:
    """The match of concepts to classes, IoUs, mIoU and accuracy, also with a class that is predicted but absent."""
    arrays = _read(folder, "metrics")
    protocol = get_preset("released").evaluate.protocol
    for case in ("all_present", "class_2_absent_but_predicted"):
        label = arrays[f"{case}:label"].astype(np.int64)
        theirs = arrays[f"{case}:iou"]
        sizes = {"num_classes": len(theirs), "num_concepts": len(theirs)}
        confusion = confusion_matrix(
            np.where(label < 0, _VOID, label), arrays[f"{case}:pred"].astype(np.int64), **sizes
        )
        found = score(confusion, protocol=protocol)
        both = [100 * found.miou, 100 * found.pixel_accuracy]
        yield Row(f"metrics, {case}: histogram", _largest(confusion.T, arrays[f"{case}:histogram"].T), 0)
        yield Row(f"metrics, {case}: match", _largest(found.class_of_concept, arrays[f"{case}:class_of_concept"]), 0)
        yield Row(f"metrics, {case}: mIoU and accuracy, %", _largest(both, arrays[f"{case}:miou_acc_percent"]), 1e-9)


def preprocess(folder: Path) -> Iterator[Row]:
    """A photograph, resized and normalised, and a label, resized. Ours stay in 8 bits between the steps."""
    arrays = _read(folder, "preprocess")
    theirs = arrays["normalised_64"]
    resample = get_preset("released").data.resample
    pixels = to_working(Image.fromarray(arrays["photo_hwc"]), theirs.shape[1:], resample)
    yield Row("preprocess: photograph, deviations", _largest((pixels / 255 - _MEAN) / _STD, theirs), 0.05)
    label = resize_label(arrays["label"].view(np.uint8), arrays["label_320"].shape)
    yield Row("preprocess: label, share of pixels", float((label.view(np.int8) != arrays["label_320"]).mean()), 0)


CASES: dict[str, Callable[[Path], Iterator[Row]]] = {
    "encoder": encoder,
    "labels": labels,
    "windows": windows,
    "crops": crops,
    "decoder": decoder,
    "losses": losses,
    "optimiser": optimiser,
    "metrics": metrics,
    "preprocess": preprocess,
}
