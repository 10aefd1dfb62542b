"""Self-distillation without labels: DINO (Caron et al. 2021), optionally with iBOT's masked patches (Zhou et al. 2022).

Letters: b images, v student views, p prototypes, (h, w) patch grid, d embedding.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from transfgu_ray.algorithms.multicrop import MultiCrop, multi_crop


@dataclass(frozen=True)
class DinoRecipe:
    """Loss, schedules and optimiser; see `pretrain_config.DinoConfig`. Pairs are (first, last) of a schedule."""

    num_prototypes: int
    head_hidden_dim: int
    head_bottleneck_dim: int
    student_temperature: float
    teacher_temperature: tuple[float, float]
    teacher_temperature_warmup_frac: float
    center_momentum: float
    teacher_momentum: tuple[float, float]
    learning_rate: tuple[float, float]
    warmup_frac: float
    weight_decay: tuple[float, float]
    clip_norm: float
    freeze_last_layer_frac: float
    masked_weight: float
    mask_prob: float
    mask_ratio: tuple[float, float]
    precision: str


class DinoHead(nn.Module):
    """Three layers, L2 norm, and unit-length prototypes (DINO's weight-normalised last layer with its norm fixed)."""

    def __init__(self, embed_dim: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, bottleneck_dim) / math.sqrt(bottleneck_dim))

    def forward(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n p"]:
        """Cosine of each projected token with each prototype, in [-1, 1]."""
        return F.linear(F.normalize(self.mlp(tokens), dim=-1), F.normalize(self.prototypes, dim=-1))


class DinoNetwork(nn.Module):
    """Backbone and head; one call a step, so that data-parallel gradients are averaged once.

    Args:
        vit: timm vision transformer without a head, made with `dynamic_img_size=True`.
        head: projection, shared by class and patch tokens as in iBOT.
        masked: whether the network can be given masks.
        mean: RGB mean of the normalisation, in [0, 1].
        std: RGB deviation of the normalisation.
    """

    def __init__(
        self, vit: nn.Module, head: DinoHead, masked: bool, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.vit, self.head = vit, head
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim)) if masked else None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(
        self,
        views: list[Float[Tensor, "_ 3 _ _"]],
        masks: Bool[Tensor, "_ h w"] | None = None,
        select: Bool[Tensor, "_ h w"] | None = None,
    ) -> tuple[list[Float[Tensor, "_ p"]], Float[Tensor, "m p"] | None]:
        """Class-token logits of every batch of views, and patch logits of the first at the selected places.

        Args:
            views: batches of equal-sized views, RGB in [0, 1].
            masks: patches of the first batch that the mask token replaces.
            select: patches of the first batch whose logits are wanted.
        """
        classes, patches = [], None
        for number, view in enumerate(views):
            tokens = self.tokens(view, masks if number == 0 else None)
            classes.append(tokens[:, 0])
            if number == 0 and select is not None:
                patches = self.head(tokens[:, self.vit.num_prefix_tokens :][select.flatten(1)])
        logits = self.head(torch.cat(classes))
        return list(logits.split([len(c) for c in classes])), patches

    def tokens(
        self, view: Float[Tensor, "b 3 y x"], mask: Bool[Tensor, "b h w"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Final normalised tokens, prefix first, of RGB images in [0, 1]."""
        vit = self.vit
        embedded = vit.patch_embed((view - self.mean) / self.std)
        if mask is not None:
            embedded = torch.where(mask[..., None], self.mask_token.to(embedded.dtype), embedded)
        return vit.norm(vit.blocks(vit.norm_pre(vit.patch_drop(vit._pos_embed(embedded)))))


class Dino:
    """Student, teacher, centres and optimiser.

    All randomness is drawn from (seed, step, rank), so nothing but tensors has to be kept to continue exactly.

    Args:
        network: the student with its initial weights; the teacher starts as its copy.
        recipe: loss, schedules, optimiser.
        crops: multi-crop augmentation.
        total_steps: length of all schedules.
        seed: fixes augmentation and masks.
        rank: this worker's, which augments other images.
        wrap: makes the student data-parallel; the identity on one worker.
    """

    def __init__(
        self,
        network: DinoNetwork,
        recipe: DinoRecipe,
        crops: MultiCrop,
        total_steps: int,
        seed: int,
        rank: int = 0,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.student = network
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.total_steps = total_steps
        self._recipe, self._crops, self._seed, self._rank = recipe, crops, seed, rank
        self._parallel = wrap(network)
        device = network.mean.device
        self._centers = {name: torch.zeros(recipe.num_prototypes, device=device) for name in ("class", "patch")}
        # Biases and norms are not decayed (DINO).
        decayed = [p for p in network.parameters() if p.ndim > 1]
        kept = [p for p in network.parameters() if p.ndim <= 1]
        self._optimiser = torch.optim.AdamW([{"params": decayed}, {"params": kept, "weight_decay": 0.0}])

    def step(self, images: UInt8[Tensor, "b 3 y x"], step: int) -> dict[str, float]:
        """One update of student, teacher and centres.

        Args:
            images: this worker's share of the batch, RGB 0-255.
            step: its number, from 0.

        Returns:
            loss: the sum that is minimised; class_loss, patch_loss: its parts, nats; teacher_entropy: mean entropy
            of the teacher's class assignments, nats; usage_entropy: entropy of their mean, nats (0: all images
            in one prototype; equal to teacher_entropy: all images alike).

        Raises:
            FloatingPointError: the gradient is NaN or infinite; student, teacher and centres are left as they were.
        """
        recipe = self._recipe
        rng = np.random.default_rng([self._seed, step, self._rank])
        views = multi_crop(images, self._crops, rng)
        wide, narrow = torch.cat(views[:2]), views[2:]
        with self._autocast():
            masks = self._draw_masks(wide, rng) if recipe.masked_weight else None
            with torch.no_grad():
                (teacher_class,), teacher_patch = self.teacher([wide], None, masks)
            batches = [wide, torch.cat(narrow)] if narrow else [wide]
            student_class, student_patch = self._parallel(batches, masks, masks)
        temperature = teacher_temperature(recipe, step, self.total_steps)
        targets = self._sharpen(teacher_class.float(), "class", temperature)
        logits = torch.cat(student_class).float() / recipe.student_temperature
        class_loss = class_cross_entropy(targets.unflatten(0, (2, -1)), logits.unflatten(0, (len(views), -1)))
        loss = class_loss
        patch_loss = torch.zeros_like(class_loss)
        if masks is not None and masks.any():
            patch_targets = self._sharpen(teacher_patch.float(), "patch", temperature)
            patch_logits = student_patch.float() / recipe.student_temperature
            patch_loss = masked_cross_entropy(patch_targets, patch_logits, masks)
            loss = loss + recipe.masked_weight * patch_loss
        elif masks is not None:
            # Without a masked patch the mask token would have no gradient, for which data-parallel workers wait.
            loss = loss + 0.0 * self.student.mask_token.sum()
        self._update(loss, step)
        self._move_center("class", teacher_class.float())
        if masks is not None and masks.any():
            self._move_center("patch", teacher_patch.float())
        return {
            "loss": loss.item(),
            "class_loss": class_loss.item(),
            "patch_loss": patch_loss.item(),
            "teacher_entropy": _entropy(targets).mean().item(),
            "usage_entropy": _entropy(targets.mean(0)).item(),
        }

    @torch.no_grad()
    def class_tokens(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b d"]:
        """The teacher's class tokens of whole images, float32, at the size of a global view."""
        size = (self._crops.global_size, self._crops.global_size)
        with self._autocast():
            whole = F.interpolate(images.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
            return self.teacher.tokens(whole)[:, 0].float()

    def _autocast(self) -> torch.autocast:
        device = self.student.mean.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self._recipe.precision == "bfloat16")

    def _draw_masks(self, wide: Float[Tensor, "b 3 y x"], rng: np.random.Generator) -> Bool[Tensor, "b h w"]:
        """A rectangle-shaped mask for some of the global views: iBOT's prediction ratio, its block shape."""
        recipe, grid = self._recipe, wide.shape[-1] // self.student.vit.patch_embed.patch_size[0]
        masks = np.zeros((len(wide), grid, grid), bool)
        for row in np.flatnonzero(rng.random(len(wide)) < recipe.mask_prob):
            wanted = rng.uniform(*recipe.mask_ratio) * grid * grid
            while masks[row].sum() < wanted:
                area, ratio = rng.uniform(1, max(2.0, wanted)), np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
                height, width = (min(grid, max(1, round(math.sqrt(area * r)))) for r in (ratio, 1 / ratio))
                top, left = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
                masks[row, top : top + height, left : left + width] = True
        return torch.from_numpy(masks).to(wide.device)

    def _sharpen(self, logits: Float[Tensor, "n p"], kind: str, temperature: float) -> Float[Tensor, "n p"]:
        return ((logits - self._centers[kind]) / temperature).softmax(-1)

    def _move_center(self, kind: str, logits: Float[Tensor, "n p"]) -> None:
        mean = logits.mean(0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean = mean / torch.distributed.get_world_size()
        self._centers[kind].lerp_(mean, 1 - self._recipe.center_momentum)

    def _update(self, loss: Tensor, step: int) -> None:
        recipe, done = self._recipe, step / self.total_steps
        self._optimiser.param_groups[0]["weight_decay"] = cosine(recipe.weight_decay, done)
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step, self.total_steps)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), recipe.clip_norm)
        # Asked of the gradient, which all workers share, and not of the loss, so that they all stop at the same step.
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the loss is {loss.item()} and its gradient {norm.item()} in step {step}")
        if done < recipe.freeze_last_layer_frac:
            self.student.head.prototypes.grad = None
        self._optimiser.step()
        momentum = cosine(recipe.teacher_momentum, done)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step needs, as tensors and plain Python."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "centers": self._centers,
            "optimiser": self._optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self._centers = state["centers"]
        self._optimiser.load_state_dict(state["optimiser"])


def class_cross_entropy(targets: Float[Tensor, "2 b p"], logits: Float[Tensor, "v b p"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of every student view against every teacher view but itself, nats.

    Args:
        targets: the teacher's probabilities for the two global views.
        logits: the student's, over its temperature; views 0 and 1 are the same global views.
    """
    pairs = -torch.einsum("tbp,vbp->tv", targets, logits.log_softmax(-1)) / targets.shape[1]
    others = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs[others].mean()


def masked_cross_entropy(
    targets: Float[Tensor, "m p"], logits: Float[Tensor, "m p"], masks: Bool[Tensor, "b h w"]
) -> Float[Tensor, ""]:
    """Loss of iBOT: cross-entropy of masked patches, each image that has some counting the same, nats."""
    counts = masks.flatten(1).sum(1)
    weights = (1 / counts.clamp(min=1).float())[:, None].expand(-1, masks[0].numel())[masks.flatten(1)]
    losses = -(targets * logits.log_softmax(-1)).sum(-1)
    return (losses * weights).sum() / (counts > 0).sum()


def cosine(pair: tuple[float, float], done: float) -> float:
    """From the first value to the last along half a cosine; `done` in [0, 1]."""
    first, last = pair
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * done))


def learning_rate(recipe: DinoRecipe, step: int, total_steps: int) -> float:
    """Linear warm-up to the first rate, then a cosine to the last."""
    warmup = round(recipe.warmup_frac * total_steps)
    if step < warmup:
        return recipe.learning_rate[0] * (step + 1) / warmup
    return cosine(recipe.learning_rate, (step - warmup) / max(1, total_steps - warmup))


def teacher_temperature(recipe: DinoRecipe, step: int, total_steps: int) -> float:
    """Linear from the first to the last value, then constant."""
    first, last = recipe.teacher_temperature
    warmup = recipe.teacher_temperature_warmup_frac * total_steps
    return last if step >= warmup else first + (last - first) * step / warmup


def _entropy(probabilities: Float[Tensor, "*n p"]) -> Float[Tensor, "*n"]:
    return torch.special.entr(probabilities).sum(-1)
