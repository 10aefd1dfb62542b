"""A training by `released` against a plain rewrite of the published loop: the same losses and weights.

The rewrite takes from the run only what the golden cases hold equal to theirs already (encoder, bank) and the numbers
that were drawn; where theirs stays in floats, ours keeps 8 bits of a pixel and 16 of a score, and so does the rewrite.
Dropout is off: its draws cannot be compared.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.nn import functional
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as colours

from tests.builders import make_voc
from tests.fixtures import Silent
from tests.plain_decoder import plain_decode
from transfgu_ray.config.presets import configure
from transfgu_ray.engine.parts import read_table
from transfgu_ray.models.weights import load_run_encoder
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.pipeline.train_data import decode_bank_row
from transfgu_ray.runs.run import Run

pytestmark = pytest.mark.ray
K, SIDE, CROP, PATCH, HEADS, WIDTH, BATCH, RATE, SEED = 5, 64, 32, 8, 3, 24, 8, 1e-3, 3
CLASSES = K + 1
SETTINGS = (
    f"encoder.overrides={{embed_dim: {WIDTH}, depth: 2, num_heads: {HEADS}, patch_size: {PATCH}}}",
    "encoder.name=vit_tiny_patch16_224",
    "encoder.weights=random",
    "data.dataset=voc",
    f"data.image_size=[{2 * SIDE}, {2 * SIDE}]",
    f"concepts.num_concepts={K}",
    "extract.images_per_part=8",
    "train.round_epochs=[2, 2]",
    "train.num_epochs=5",
    "train.epoch_repeats=1",
    f"train.batch_size={BATCH}",
    f"train.learning_rate={RATE}",
    f"train.decoder_heads={HEADS}",
    "train.dropout=0",
    # Nearly every step has each of them.
    "train.augment={jitter_prob: 0.8, grey_prob: 0.4, blur_prob: 0.6}",
    f"seed={SEED}",
    "runtime.num_workers=1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Run:
    folder = tmp_path_factory.mktemp("released")
    make_voc(folder / "voc", num_train=16, num_val=1)
    config = configure("released", None, [f"data.root={folder}/voc", *SETTINGS])
    run = Run.open(str(folder / "run"), config)
    run_stages(run, ("extract", "concepts", "labels", "train"), address=None, reporter=Silent())
    return run


def photograph(uri: str) -> torch.Tensor:
    """`ResizeTensor`: bilinear, no antialias; here rounded to 8 bits."""
    pixels = torch.from_numpy(np.array(Image.open(uri).convert("RGB"))).permute(2, 0, 1).float()
    return functional.interpolate(pixels[None], (SIDE, SIDE), mode="bilinear")[0].round()


def coloured(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """`img_aug` of a whole photograph, 0 to 1: jitter, then grey, then blur."""
    if rng.random() < 0.8:
        factors = {}
        order = rng.permutation(4)
        for i in order:
            factors[i] = rng.uniform(-0.2, 0.2) if i == 3 else rng.uniform(0.2, 1.8)
        turns = (colours.adjust_brightness, colours.adjust_contrast, colours.adjust_saturation, colours.adjust_hue)
        for i in order:
            image = turns[i](image, factors[i])
    if rng.random() < 0.4:
        image = colours.rgb_to_grayscale(image, 3)
    if rng.random() < 0.6:
        image = colours.gaussian_blur(image, [3, 3], [rng.uniform(1, 2)] * 2)
    return image


def data_augment(
    image: torch.Tensor, maps: torch.Tensor, *, sample: np.random.Generator, step: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """`data_augment` of one photograph and its maps."""
    image = coloured(image / 255, step)
    share = torch.tensor(sample.integers(4, 10) / 10, dtype=torch.float32)
    window = int((torch.tensor(SIDE) * share).int())
    top, left = (int((SIDE - window) * sample.random()) for _ in range(2))
    crop = functional.interpolate(
        image[None, :, top : top + window, left : left + window], (CROP, CROP), mode="bilinear"
    )
    scale = maps.shape[-1] / SIDE
    box = torch.tensor([[0, left, top, left + window, top + window]], dtype=torch.float32)
    box[:, 1:] *= scale
    cut = roi_align(maps[None], box, (CROP // PATCH, CROP // PATCH), 1.0, 0, True)
    if sample.random() < 0.5:
        crop, cut = crop.flip(-1), cut.flip(-1)
    return (crop[0] * 255).round().clamp(0, 255), cut[0]


def decode(state: dict[str, torch.Tensor], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`MaskTransformer`: logits (b, classes, patches) and class embeddings."""
    masks, classes = plain_decode(state, tokens, HEADS)
    return masks.transpose(1, 2), classes


def things_loss(
    logits: torch.Tensor,
    classes: torch.Tensor,
    *,
    maps: torch.Tensor,
    teacher: torch.Tensor | None,
    idx_list: np.ndarray,
    epoch_iter: int,
) -> torch.Tensor:
    """`things_bootstrap_loss` and `cls_emb_loss`, weights 1, 0.3 and 1; channel 0 is the background."""
    # 16 bits of a score, as ours are sent to the trainer.
    scores = torch.stack([(one - one.min()) / (one.max() - one.min()) for one in maps]).half().float()
    foreground = (scores > 0.1).any(1)
    scores = torch.cat([(0.1 - scores.amax(1, keepdim=True)).relu(), scores], 1)
    if teacher is not None:
        scores = 0.5 * teacher.softmax(1) + 0.5 * scores
    loss = functional.cross_entropy(logits, scores.argmax(1))
    if teacher is not None:
        alpha = min(0.03 + 0.01 * epoch_iter, 0.1)
        loss = loss - alpha * functional.cross_entropy(logits, scores[:, idx_list].argmax(1))
    top = logits[:, 1:].softmax(1).topk(2, 1).values
    uncertainty = 1 - (top[:, 0] - top[:, 1])[foreground].mean()
    pairs = torch.triu(torch.ones(CLASSES, CLASSES), 1).bool()
    diversity = 1 + (classes @ classes.transpose(1, 2))[:, pairs].mean()
    return loss + 0.3 * uncertainty + diversity


def published_training(run: Run, initial: dict[str, torch.Tensor]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The published loop: mean loss of each epoch, and the last student. Weights have the background first."""
    records = read_table(run.folder, "labels", None).to_pylist()
    encoder = load_run_encoder(run.folder, "float32", "cpu")
    student = {name: value.clone().requires_grad_() for name, value in initial.items()}
    regularised = [value for name, value in student.items() if not name.endswith(".bias") and value.ndim > 1]
    others = [value for name, value in student.items() if name.endswith(".bias") or value.ndim == 1]
    optimiser = torch.optim.Adam(
        [{"params": regularised}, {"params": others, "weight_decay": 0.0}], lr=RATE, weight_decay=5e-4
    )
    teacher, means, epoch_iter = None, [], 0
    for epoch in range(4):
        if epoch == 2:
            teacher, epoch_iter = {name: value.detach().clone() for name, value in student.items()}, 0
            with torch.no_grad():
                for name, value in student.items():
                    value.copy_(initial[name])
        else:
            epoch_iter += 1
        order = np.random.default_rng([SEED, epoch]).permutation(16)
        losses = []
        for step in range(2):
            crops, maps = [], []
            for place in range(step * BATCH, (step + 1) * BATCH):
                record = records[order[place]]
                crop, cut = data_augment(
                    photograph(record["path"]),
                    decode_bank_row(record)[1],
                    sample=np.random.default_rng([SEED, epoch, place]),
                    step=np.random.default_rng([SEED, epoch, step, 1]),
                )
                crops.append(crop)
                maps.append(cut.flatten(1))
            tokens = encoder.patch_tokens(torch.stack(crops).to(torch.uint8))
            guidance = None
            if teacher is not None:
                with torch.no_grad():
                    guidance = decode(teacher, tokens)[0]
            logits, classes = decode(student, tokens)
            # Ours draws where each class of M goes in M'; theirs, which map is put in its place.
            drawn = np.random.default_rng([SEED, epoch, step]).permutation(CLASSES)
            goes = np.array([(drawn[(c - 1) % CLASSES] + 1) % CLASSES for c in range(CLASSES)])
            loss = things_loss(
                logits,
                classes,
                maps=torch.stack(maps),
                teacher=guidance,
                idx_list=np.argsort(goes),
                epoch_iter=epoch_iter,
            )
            assert loss > 0
            optimiser.zero_grad()
            loss.backward()
            for value in student.values():
                value.grad.clamp_(-1, 1)
            optimiser.step()
            losses.append(loss.item())
        means.append(float(np.mean(losses)))
    return means, {name: value.detach() for name, value in student.items()}


def background_first(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rolled = {"cls_emb": 1, "mask_norm.weight": 0, "mask_norm.bias": 0}
    return {name: value.roll(1, rolled[name]) if name in rolled else value for name, value in state.items()}


def initial_weights(run: Run) -> dict[str, torch.Tensor]:
    checkpoint, *_ = Path(run.folder.path).glob("train/rounds-*/*/state.pt")
    state = torch.load(io.BytesIO(checkpoint.read_bytes()), weights_only=True)
    return background_first(state["bootstrap"]["bootstrap"]["initial"])


def test_train__released_is_the_published_loop(run: Run) -> None:
    means, student = published_training(run, initial_weights(run))
    history = json.loads(run.folder.read_bytes("train/history.json"))
    assert [epoch["loss"] for epoch in history] == pytest.approx(means, rel=1e-4)
    ours = background_first(safetensors.torch.load(run.folder.read_bytes("model/decoder.safetensors")))
    assert ours.keys() == student.keys()
    for name, theirs in student.items():
        assert (ours[name] - theirs).norm() < 1e-4 * theirs.norm(), name


def test_train__says_which_epoch_the_model_is_of(run: Run) -> None:
    # Five epochs were allowed, and a third round of two would have been cut.
    manifest = run.require("train")
    assert (manifest["epochs"], manifest["model_epoch"], manifest["model_round"]) == (4, 3, 1)
    assert manifest["images_left_out_of_an_epoch"] == 0
