"""Self-distillation without labels: DINO (Caron et al. 2021).

Options: iBOT's masked patches (Zhou et al. 2022); DINOv2's Sinkhorn-Knopp assignments and KoLeo term (Oquab et al.
2023), without which narrow networks never get away from embedding all images alike in a short training.

Letters: b images, v student views, p prototypes, (h, w) patch grid, d embedding.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from transfgu_ray.algorithms.dino.losses import (
    class_cross_entropy,
    entropy,
    is_distributed,
    koleo,
    masked_cross_entropy,
    sinkhorn,
)
from transfgu_ray.algorithms.dino.multicrop import MultiCrop, multi_crop
from transfgu_ray.algorithms.dino.network import DinoNetwork
from transfgu_ray.algorithms.dino.schedules import DinoRecipe, cosine, learning_rate, teacher_temperature


class Dino:
    """Student, teacher, centres and optimiser.

    All randomness is drawn from (seed, step, rank), so tensors alone are enough to continue exactly.

    Args:
        network: the student with its initial weights; the teacher starts as its copy.
        recipe: loss, schedules, optimiser.
        crops: multi-crop augmentation.
        total_steps: length of all schedules.
        seed: fixes augmentation and masks.
        rank: of this worker; each augments its own images.
        wrap: makes the student data-parallel; the identity on one worker.
    """

    def __init__(
        self,
        network: DinoNetwork,
        recipe: DinoRecipe,
        *,
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
        # DINO does not decay biases and norms.
        decayed = [p for p in network.parameters() if p.ndim > 1]
        kept = [p for p in network.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        self._optimiser = torch.optim.AdamW(groups)

    def step(self, images: UInt8[Tensor, "b 3 y x"], step: int) -> dict[str, float]:
        """Update student, teacher and centres once.

        Args:
            images: this worker's share of the batch, RGB 0-255.
            step: number of the step, from 0.

        Returns:
            loss: the weighted sum to be minimised; class_loss, patch_loss, koleo_loss: its parts, nats;
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
        class_loss = class_cross_entropy(
            torch.unflatten(targets, 0, (2, -1)), torch.unflatten(logits, 0, (len(views), -1))
        )
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
            "teacher_entropy": entropy(targets).mean().item(),
            "usage_entropy": entropy(targets.mean(0)).item(),
        }

    @torch.no_grad()
    def class_tokens(self, images: UInt8[Tensor, "b 3 y x"]) -> Float[Tensor, "b d"]:
        """Return the teacher's class tokens of whole images, float32, at the size of a global view."""
        size = (self._crops.global_size, self._crops.global_size)
        with self._autocast():
            whole = F.interpolate(images.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
            return self.teacher.tokens(whole)[:, 0].float()

    def _autocast(self) -> torch.autocast:
        device = self.student.mean.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self._recipe.precision == "bfloat16")

    def _draw_masks(self, wide: Float[Tensor, "b 3 y x"], rng: np.random.Generator) -> Bool[Tensor, "b h w"]:
        """Draw masks of rectangles for some of the global views, with iBOT's ratios and block shapes."""
        recipe, grid = self._recipe, wide.shape[-1] // self.student.vit.patch_embed.patch_size[0]
        masks = np.zeros((len(wide), grid, grid), bool)
        # A fixed number of masks, at least one, since all data-parallel workers must take the same steps.
        for row in rng.permutation(len(wide))[: max(1, round(recipe.mask_prob * len(wide)))]:
            wanted = rng.uniform(*recipe.mask_ratio) * grid * grid
            while masks[row].sum() < wanted:
                area, ratio = rng.uniform(1, max(2.0, wanted)), np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
                height, width = (min(grid, max(1, round(math.sqrt(area * r)))) for r in (ratio, 1 / ratio))
                top, left = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
                masks[row, top : top + height, left : left + width] = True
        return torch.from_numpy(masks).to(wide.device)

    def _assign(self, logits: Float[Tensor, "n p"], kind: str, temperature: float) -> Float[Tensor, "n p"]:
        """Return the teacher's probabilities over prototypes."""
        if self._recipe.assignment == "sinkhorn":
            return sinkhorn(logits / temperature)
        return ((logits - self._centers[kind]) / temperature).softmax(-1)

    def _move_center(self, kind: str, logits: Float[Tensor, "n p"]) -> None:
        mean = logits.mean(0)
        if is_distributed():
            torch.distributed.all_reduce(mean)
            mean = mean / torch.distributed.get_world_size()
        self._centers[kind].lerp_(mean, 1 - self._recipe.center_momentum)

    def _update(self, loss: Tensor, step: int) -> None:
        recipe, done = self._recipe, step / self.total_steps
        self._optimiser.param_groups[0]["weight_decay"] = cosine(recipe.weight_decay, done)
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step, self.total_steps)
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), recipe.clip_norm)
        # Checked on the gradient, which all workers share, rather than on the loss, so that all stop at the same step.
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the loss is {loss.item()} and its gradient {norm.item()} in step {step}")
        if done < recipe.freeze_last_layer_frac:
            self.student.head.prototypes.grad = None
        self._optimiser.step()
        momentum = cosine(recipe.teacher_momentum, done)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step needs, as tensors and plain Python."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "centers": self._centers,
            "optimiser": self._optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        device = self.student.mean.device
        self._centers = {name: center.to(device) for name, center in state["centers"].items()}
        self._optimiser.load_state_dict(state["optimiser"])
