"""Self-distillation without labels: DINO (Caron et al. 2021).

Options: iBOT's masked patches (Zhou et al. 2022); DINOv2's Sinkhorn-Knopp assignments and KoLeo term (Oquab et al.
2023), without which short trainings of narrow networks stay where they began, with all images alike.

Letters: b images, v student views, p prototypes, (h, w) patch grid, d embedding.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from transfgu_ray.algorithms.blocks import embed_patches, run_blocks
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
    assignment: str
    center_momentum: float
    teacher_momentum: tuple[float, float]
    learning_rate: tuple[float, float]
    warmup_frac: float
    weight_decay: tuple[float, float]
    clip_norm: float
    freeze_last_layer_frac: float
    koleo_weight: float
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
        scale_linear_weights(self.mlp)
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, bottleneck_dim) / math.sqrt(bottleneck_dim))

    def forward(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n p"]:
        """Cosine of each projected token with each prototype, in [-1, 1]."""
        return self.compare(self.project(tokens))

    def project(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n e"]:
        """Tokens in the space of the prototypes, of length 1."""
        return F.normalize(self.mlp(tokens), dim=-1)

    def compare(self, projected: Float[Tensor, "*n e"]) -> Float[Tensor, "*n p"]:
        """Cosine of each projected token with each prototype."""
        return F.linear(projected, F.normalize(self.prototypes, dim=-1))


def scale_linear_weights(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases in every linear layer.

    timm draws weights of deviation 0.02, which suits a width of some hundreds; in a narrow network they pass so
    little of the image on that all class tokens start alike.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Outputs(NamedTuple):
    """What the network says of some batches of views.

    Attributes:
        classes: logits of each batch's class tokens.
        patches: logits of the selected patches of the first batch; None if none were asked for.
        projected: class tokens of the first batch in the space of the prototypes, of length 1.
    """

    classes: list[Float[Tensor, "_ p"]]
    patches: Float[Tensor, "m p"] | None
    projected: Float[Tensor, "_ e"]


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
    ) -> Outputs:
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
        projected = self.head.project(torch.cat(classes))
        logits = self.head.compare(projected).split([len(c) for c in classes])
        return Outputs(list(logits), patches, projected[: len(views[0])])

    def tokens(
        self, view: Float[Tensor, "b 3 y x"], mask: Bool[Tensor, "b h w"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Final normalised tokens, prefix first, of RGB images in [0, 1]."""
        vit = self.vit
        embedded = vit.patch_embed((view - self.mean) / self.std)
        if mask is not None:
            embedded = torch.where(mask[..., None], self.mask_token.to(embedded.dtype), embedded)
        return vit.norm(run_blocks(vit, embed_patches(vit, embedded), (embedded.shape[1], embedded.shape[2])))


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
            loss: the weighted sum that is minimised; class_loss, patch_loss, koleo_loss: its parts, nats;
            teacher_entropy: mean entropy of the teacher's class assignments, nats; usage_entropy: entropy of their
            mean, nats (0: all images in one prototype; equal to teacher_entropy: all images alike).

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
                teacher = self.teacher([wide], None, masks)
            batches = [wide, torch.cat(narrow)] if narrow else [wide]
            student = self._parallel(batches, masks, masks)
        temperature = teacher_temperature(recipe, step, self.total_steps)
        targets = self._assign(teacher.classes[0].float(), "class", temperature)
        logits = torch.cat(student.classes).float() / recipe.student_temperature
        class_loss = class_cross_entropy(targets.unflatten(0, (2, -1)), logits.unflatten(0, (len(views), -1)))
        koleo_loss = torch.stack([koleo(half) for half in student.projected.float().chunk(2)]).mean()
        loss = class_loss + recipe.koleo_weight * koleo_loss
        patch_loss = torch.zeros_like(class_loss)
        if masks is not None:
            patch_targets = self._assign(teacher.patches.float(), "patch", temperature)
            patch_logits = student.patches.float() / recipe.student_temperature
            patch_loss = masked_cross_entropy(patch_targets, patch_logits, masks)
            loss = loss + recipe.masked_weight * patch_loss
        self._update(loss, step)
        if recipe.assignment == "centring":
            self._move_center("class", teacher.classes[0].float())
            if masks is not None:
                self._move_center("patch", teacher.patches.float())
        return {
            "loss": loss.item(),
            "class_loss": class_loss.item(),
            "patch_loss": patch_loss.item(),
            "koleo_loss": koleo_loss.item(),
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
        # A fixed number, and never none, since all data-parallel workers must take the same steps.
        for row in rng.permutation(len(wide))[: max(1, round(recipe.mask_prob * len(wide)))]:
            wanted = rng.uniform(*recipe.mask_ratio) * grid * grid
            while masks[row].sum() < wanted:
                area, ratio = rng.uniform(1, max(2.0, wanted)), np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
                height, width = (min(grid, max(1, round(math.sqrt(area * r)))) for r in (ratio, 1 / ratio))
                top, left = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
                masks[row, top : top + height, left : left + width] = True
        return torch.from_numpy(masks).to(wide.device)

    def _assign(self, logits: Float[Tensor, "n p"], kind: str, temperature: float) -> Float[Tensor, "n p"]:
        """The teacher's probabilities over prototypes."""
        if self._recipe.assignment == "sinkhorn":
            return sinkhorn(logits / temperature)
        return ((logits - self._centers[kind]) / temperature).softmax(-1)

    def _move_center(self, kind: str, logits: Float[Tensor, "n p"]) -> None:
        mean = logits.mean(0)
        if _is_distributed():
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
        device = self.student.mean.device
        self._centers = {name: center.to(device) for name, center in state["centers"].items()}
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


@torch.no_grad()
def sinkhorn(logits: Float[Tensor, "n p"], num_iterations: int = 3) -> Float[Tensor, "n p"]:
    """Assignments that use all prototypes alike over the batches of all workers; rows sum to 1.

    Rows and columns are scaled in turn (Sinkhorn-Knopp, as in SwAV, Caron et al. 2020, and DINOv2), which takes the
    place of centring.

    Args:
        logits: over the teacher's temperature.
        num_iterations: turns (SwAV: 3).
    """
    highest = logits.max()
    if _is_distributed():
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    shares = (logits - highest).exp()
    for _ in range(num_iterations):
        use = shares.sum(0)
        _sum_over_workers(use)
        # A prototype that is too far from every image to be seen in float32 stays unused.
        shares = shares / use.clamp(min=1e-30)
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-30)
    return shares


def koleo(projected: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """Minus the mean log distance to the nearest other row: small where a batch is spread evenly.

    Reference: Sablayrolles et al. (2019), as in DINOv2. Departure: in the space of the prototypes, where a collapse
    to uniform assignments happens, not on the class tokens.

    Args:
        projected: rows of length 1, at least two.
    """
    with torch.no_grad():
        nearest = (projected @ projected.T).fill_diagonal_(-2).argmax(1)
    # Equal rows: the slope of the distance is not defined, its epsilon gives them a finite one.
    return -F.pairwise_distance(projected, projected[nearest], eps=1e-6).log().mean()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sum_over_workers(tensor: Tensor) -> None:
    if _is_distributed():
        torch.distributed.all_reduce(tensor)


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
