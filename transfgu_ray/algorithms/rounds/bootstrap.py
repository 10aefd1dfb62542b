"""One training step, and the change from one round to the next (3.3)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from transfgu_ray.algorithms.rounds.losses import LossWeights, bootstrap_targets, foreground_patches, total_loss
from transfgu_ray.algorithms.rounds.schedule import Epoch


@dataclass(frozen=True, kw_only=True)
class BootstrapSettings:
    """Settings of a student's training.

    Attributes:
        learning_rate: Adam's rate.
        weight_decay: Adam's L2 term; see `parameter_groups`.
        gradient_clamp: bound on the magnitude of each gradient entry.
        omega_1: weight of the diversity loss.
        omega_2: weight of the uncertainty loss.
        seed: fixes dropout and the shuffles of the peer loss.
        diversity: pairs of the diversity loss; see `diversity_loss`.
        foreground_above: T_bg for the patches that count in the uncertainty loss, see `foreground_patches`; None = all.
        round_0: loss of round 0: "cross_entropy" (Eq. 9), or "total": diversity and uncertainty too (released code).
    """

    learning_rate: float
    weight_decay: float
    gradient_clamp: float
    omega_1: float
    omega_2: float
    seed: int
    diversity: str = "all_pairs"
    foreground_above: float | None = None
    round_0: str = "cross_entropy"


class Bootstrap:
    """Student, teacher and optimiser; both decoders read the same tokens, which are computed outside.

    Args:
        student: the decoder with its initial weights; maps tokens and a grid to class logits and class embeddings.
        settings: of its training.
        wrap: makes the student data-parallel; the identity on one worker.
    """

    def __init__(
        self,
        student: nn.Module,
        settings: BootstrapSettings,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.student = student
        self.initial = copy.deepcopy(student.state_dict())
        self.trained: dict[str, Tensor] | None = None
        self.teacher: nn.Module | None = None
        self._settings = settings
        self._parallel = wrap(student)
        self._optimiser = torch.optim.Adam(
            parameter_groups(student), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def begin_epoch(self, epoch: Epoch, rank: int, done: int = 0) -> None:
        """Start a new round if the epoch does, and seed the epoch's dropout.

        An epoch of which some steps are `done` has started its round already.

        In a new round the teacher becomes a frozen copy of the student (no average, no momentum), and the student
        starts again from its initial weights. Adam goes on with its moments, as in the released code.
        """
        if epoch.starts_round and not done:
            if epoch.round == 1:
                self.trained = copy.deepcopy(self.student.state_dict())
            self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
            self.student.load_state_dict(self.initial)
        self._parallel.train()
        words = [self._settings.seed, epoch.index, rank, *([done] if done else [])]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))

    def step(
        self, tokens: Float[Tensor, "b hw c"], scores: Float[Tensor, "b k h w"], *, epoch: Epoch, step: int
    ) -> dict[str, float]:
        """Update the student once; return each loss term.

        Later rounds than 0 train by the total loss (Eq. 16) on bootstrapped targets. Round 0 has no peer term: its
        negatives need a teacher in the released code, and Eq. 9 has none.

        Args:
            tokens: the decoder's input for each crop, float32, row by row; see `read_tokens`.
            scores: of the same patches.
            epoch: the epoch of the step.
            step: its number in the epoch.

        Raises:
            FloatingPointError: the loss is NaN or infinite; the student is left as it was.
        """
        grid_hw = (scores.shape[2], scores.shape[3])
        with torch.no_grad():
            guidance = None if self.teacher is None else self.teacher(tokens, grid_hw)[0]
            targets = bootstrap_targets(scores.float(), guidance)
        shuffle = self.draw_shuffle(epoch, step, num_classes=scores.shape[1]).to(targets.device)
        logits, classes = self._parallel(tokens, grid_hw)
        above = self._settings.foreground_above
        foreground = None if above is None else foreground_patches(scores.float(), above)
        settings = self._settings
        terms = total_loss(
            logits,
            classes,
            targets=targets,
            shuffle=shuffle,
            weights=LossWeights(
                alpha=epoch.alpha if epoch.round else 0.0, omega_1=settings.omega_1, omega_2=settings.omega_2
            ),
            pairs=settings.diversity,
            foreground=foreground,
        )
        plain = epoch.round == 0 and settings.round_0 == "cross_entropy"
        loss = terms["cross_entropy"] if plain else terms["total"]
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} in epoch {epoch.index}, step {step}")
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_value_(self.student.parameters(), settings.gradient_clamp)
        self._optimiser.step()
        return {name: term.item() for name, term in terms.items()} | {"loss": loss.item()}

    def draw_shuffle(self, epoch: Epoch, step: int, *, num_classes: int) -> Int64[Tensor, " k"]:
        """Draw the permutation of the K maps that makes a step's negatives; see `peer_loss`."""
        rng = np.random.default_rng([self._settings.seed, epoch.index, step])
        return torch.from_numpy(rng.permutation(num_classes))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next epoch needs, as tensors and plain Python."""
        return {
            "student": self.student.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "trained": self.trained,
            "initial": self.initial,
            "optimiser": self._optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.student.load_state_dict(state["student"])
        if state["teacher"] is not None:
            self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
            self.teacher.load_state_dict(state["teacher"])
        self.trained, self.initial = state["trained"], state["initial"]
        self._optimiser.load_state_dict(state["optimiser"])


def parameter_groups(student: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters for an optimiser; biases and norms do not decay (`get_params_groups`, released code)."""
    named = list(student.named_parameters())
    free = {name for name, value in named if name.endswith(".bias") or value.ndim == 1}
    return [
        {"params": [value for name, value in named if name not in free]},
        {"params": [value for name, value in named if name in free], "weight_decay": 0.0},
    ]


def mean_terms(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each loss term over an epoch's steps."""
    return {name: float(np.mean([terms[name] for terms in steps])) for name in steps[0]}
