"""The recipe of DINO: its settings and how they change from step to step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class DinoRecipe:
    """Loss, schedules and optimiser; see `DinoConfig`. Pairs are the first and the last value of a schedule."""

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


def cosine(pair: tuple[float, float], done: float) -> float:
    """Interpolate from the first value to the last along half a cosine; `done` in [0, 1]."""
    first, last = pair
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * done))


def learning_rate(recipe: DinoRecipe, step: int, total_steps: int) -> float:
    """Return the rate of a step: linear warm-up to the first rate, then a cosine to the last."""
    warmup = round(recipe.warmup_frac * total_steps)
    if step < warmup:
        return recipe.learning_rate[0] * (step + 1) / warmup
    return cosine(recipe.learning_rate, (step - warmup) / max(1, total_steps - warmup))


def teacher_temperature(recipe: DinoRecipe, step: int, total_steps: int) -> float:
    """Return the temperature of a step: linear from the first to the last value, then constant."""
    first, last = recipe.teacher_temperature
    warmup = recipe.teacher_temperature_warmup_frac * total_steps
    return last if step >= warmup else first + (last - first) * step / warmup
