"""Labels: from images on the device to the stored form of the bank on the host."""

from functools import partial
from statistics import median

from torch import Tensor

from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.algorithms.labels.bank import encode_scores
from transfgu_ray.algorithms.labels.cam import attention_gradients
from transfgu_ray.bench.published import plain_gradients
from transfgu_ray.bench.subject import SIDE, VIT, build_encoder, build_labeller, window_concepts, working_images
from transfgu_ray.bench.timing import Measurements, Target, ratio, take_turns

_BATCH = 2
_ROUNDS = 5
_CONCEPTS = (27, 171, 1000)
# Backward passes to time; all take equally long.
_PASSES = 2


def measure(device: str) -> Measurements:
    """Measure our time relative to a bare forward, that of K backward passes relative to ours, and gradient errors."""
    encoder = build_encoder(device)
    images = working_images(_BATCH).to(device)
    concepts = window_concepts(encoder, max(_CONCEPTS))

    def label(count: int) -> list[Tensor]:
        scores, _ = build_labeller(encoder, concepts[:count])(images)
        return [part.cpu() for part in encode_scores(scores)]

    seconds = take_turns(
        {"bare": partial(encoder.all_tokens, images)} | {f"K={k}": partial(label, k) for k in _CONCEPTS}, _ROUNDS
    )
    slow = take_turns(
        {
            "one pass": partial(plain_gradients, encoder, images, concepts[:1]),
            "more passes": partial(plain_gradients, encoder, images, concepts[: 1 + _PASSES]),
            **{f"K={k}": partial(label, k) for k in (27, 171)},
        },
        num_rounds=2,
    )
    per_pass = median(b - a for a, b in zip(slow["one pass"], slow["more passes"], strict=True)) / _PASSES
    published = {k: median(slow["one pass"]) + (k - 1) * per_pass for k in (27, 171)}
    error = gradient_error(encoder, images[:1], concepts[:_PASSES])
    bare = [Target(f"labels / bare forward, K = {k}", "<=", 1.0, ratio(seconds, f"K={k}", "bare")) for k in _CONCEPTS]
    passes = [
        Target(f"K autograd passes / labels, K = {k}", ">=", wanted, published[k] / median(slow[f"K={k}"]))
        for k, wanted in ((27, 50.0), (171, 300.0))
    ]
    exact = Target("labels: gradient against autograd, relative error", "<=", 1e-5, error)
    return Measurements(
        targets=[*bare, *passes, exact],
        details={
            "encoder": f"{VIT}, {SIDE} px, batch {_BATCH}",
            "seconds": {name: median(values) for name, values in seconds.items()},
            "seconds_a_backward_pass": per_pass,
            "backward_passes_timed": _PASSES,
            "bfloat16": bfloat16_difference(device, images, concepts[:171]),
        },
    )


def gradient_error(encoder: Encoder, images: Tensor, concepts: Tensor) -> float:
    """Return the largest difference from the gradients of K backward passes, relative to the largest gradient."""
    plain = plain_gradients(encoder, images, concepts)
    row = encoder.class_row(encoder.prefix(images), encoder.grid_hw((images.shape[2], images.shape[3])))
    ours = attention_gradients(row, concepts)
    return ((ours - plain).abs().max() / plain.abs().max()).item()


def bfloat16_difference(device: str, images: Tensor, concepts: Tensor) -> dict[str, float]:
    """Return what bfloat16 forwards change: the share of patches with another winner, and the largest score change."""
    exact, rounded = (
        build_labeller(build_encoder(device, precision), concepts)(images)[0] for precision in ("float32", "bfloat16")
    )
    return {
        "patches_with_another_winner": (exact.argmax(1) != rounded.argmax(1)).float().mean().item(),
        "largest_score_difference": (exact - rounded).abs().max().item(),
    }
