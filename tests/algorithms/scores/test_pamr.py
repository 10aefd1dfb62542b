import numpy as np
import torch

from transfgu_ray.algorithms.scores import pamr
from transfgu_ray.algorithms.scores.pamr import DILATIONS, colour_affinities, refine, refined_argmax
from transfgu_ray.algorithms.scores.upsampling import upsample_argmax


def plain_refine(masks, image, iterations):
    """Pixel by pixel, from the paper's formula: no shifted views."""
    _, height, width = image.shape
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]

    def at(values, y, x):
        return values[:, min(max(y, 0), height - 1), min(max(x, 0), width - 1)]

    for _ in range(iterations):
        out = np.zeros_like(masks)
        for y in range(height):
            for x in range(width):
                seen = [at(image, y + d * dy, x + d * dx) for d in DILATIONS for dy, dx in around]
                deviation = np.std(seen, axis=0, ddof=1)
                cells = [(y + d * dy, x + d * dx) for d in DILATIONS for dy, dx in around if (dy, dx) != (0, 0)]
                likeness = [-(np.abs(image[:, y, x] - at(image, *c)) / (1e-8 + 0.1 * deviation)).mean() for c in cells]
                weights = np.exp(likeness) / np.exp(likeness).sum()
                out[:, y, x] = sum(w * at(masks, *c) for w, c in zip(weights, cells, strict=True))
        masks = out
    return masks


def test_refine__equals_a_plain_loop_over_pixels(monkeypatch):
    monkeypatch.setattr(pamr, "NUM_ITERATIONS", 2)
    rng = np.random.default_rng(0)
    image, masks = rng.random((3, 5, 6)), rng.random((2, 5, 6))
    got = refine(torch.from_numpy(masks), torch.from_numpy(image))
    np.testing.assert_allclose(got, plain_refine(masks, image, 2), rtol=1e-9)


def test_refine__probabilities_stay_probabilities():
    rng = torch.Generator().manual_seed(0)
    image, masks = torch.rand(3, 16, 12, generator=rng), torch.rand(4, 16, 12, generator=rng).softmax(0)
    assert colour_affinities(image).shape == (48, 16, 12)
    np.testing.assert_allclose(colour_affinities(image).sum(0), 1, rtol=1e-5)
    np.testing.assert_allclose(refine(masks, image).sum(0), 1, rtol=1e-5)


def test_refined_argmax__moves_a_boundary_to_the_edge_of_colour():
    # The object is 13 px wide; the patch grid of 8 px can only give 8 or 16.
    image = torch.full((3, 32, 32), 40, dtype=torch.uint8)
    image[:, :, :13] = 200
    maps = torch.zeros(2, 4, 4)
    maps[0, :, :2], maps[1, :, 2:] = 3.0, 3.0
    truth = (torch.arange(32) >= 13).long().expand(32, 32)
    plain, refined = upsample_argmax(maps, (32, 32)), refined_argmax(maps, image)
    assert (plain != truth).sum() == 32 * 3
    assert torch.equal(refined, truth)
