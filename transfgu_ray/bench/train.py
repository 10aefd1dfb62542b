"""A training step of a bootstrapped round, relative to its indispensable parts."""

from statistics import median

import torch

from transfgu_ray.algorithms.rounds.bootstrap import Bootstrap, BootstrapSettings
from transfgu_ray.algorithms.rounds.schedule import Epoch
from transfgu_ray.algorithms.rounds.segmenter import MaskTransformer
from transfgu_ray.bench.published import plain_step
from transfgu_ray.bench.subject import SIDE, VIT, build_encoder, working_images
from transfgu_ray.bench.timing import Measurements, Target, ratio, take_turns

_CONCEPTS = 27
_BATCH = 2
_ROUNDS = 3
_EPOCH = Epoch(index=1, round=1, starts_round=True, alpha=0.03)


def measure(device: str) -> Measurements:
    """Measure a step relative to one encoder forward and decoder forward and backward, and to one on cached tokens."""
    encoder = build_encoder(device)
    images = working_images(_BATCH).to(device)
    grid_hw = encoder.grid_hw((SIDE, SIDE))
    scores = torch.rand(_BATCH, _CONCEPTS, *grid_hw, generator=torch.Generator().manual_seed(0)).to(device)
    student = MaskTransformer(_CONCEPTS, encoder.embed_dim).to(device)
    bootstrap = Bootstrap(
        student,
        BootstrapSettings(learning_rate=1e-4, weight_decay=5e-4, gradient_clamp=1.0, omega_1=1.0, omega_2=0.3, seed=0),
    )
    # Makes the teacher, with which a step takes longest.
    bootstrap.begin_epoch(_EPOCH, rank=0)
    kept = encoder.patch_tokens(images)

    def bare() -> None:
        logits, _ = student(encoder.patch_tokens(images), grid_hw)
        (logits * scores).sum().backward()

    seconds = take_turns(
        {
            "bare": bare,
            "step": lambda: bootstrap.step(encoder.patch_tokens(images), scores, epoch=_EPOCH, step=0),
            "step, cached tokens": lambda: bootstrap.step(kept, scores, epoch=_EPOCH, step=0),
            "published, step": lambda: plain_step(encoder, bootstrap, images=images, scores=scores, epoch=_EPOCH),
        },
        _ROUNDS,
    )
    step, cached = ratio(seconds, "step", "bare"), ratio(seconds, "step", "step, cached tokens")
    return Measurements(
        targets=[
            Target("train: step / (encoder forward + decoder both ways)", "<=", 1.15, step),
            Target("train: step / step on cached tokens", ">=", 10.0, cached),
        ],
        details={
            "encoder": f"{VIT}, {SIDE} px, batch {_BATCH}, K = {_CONCEPTS}",
            "seconds": {name: median(values) for name, values in seconds.items()},
        },
    )
