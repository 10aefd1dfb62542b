"""Generator of the colours of masks: what the table in transfgu_ray/reports/palette.py was frozen from."""

import numpy as np

# Okabe and Ito's colour-blind-safe palette, without its black, which is the background's.
_OKABE_ITO = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
# How linear RGB is seen: as it is, and without red, green or blue cones (Machado et al., 2009, severity 1).
_VISIONS = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)
_RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE_XYZ = np.array([0.95047, 1.0, 1.08883])
# Lightness L* of colours that stand out on black and on white.
_LIGHTNESS = (25, 93)
_NUM_COLOURS = 256


def seen_colours(colours: np.ndarray) -> np.ndarray:
    """Return the CIELAB of colours as four kinds of colour vision see them: normal, protan, deutan, tritan.

    Args:
        colours: RGB in 0-255, (n, 3).

    Returns:
        float64 (4, n, 3).
    """
    shares = colours / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    seen = np.einsum("vij,nj->vni", _VISIONS, linear).clip(0, 1)
    ratios = np.einsum("ij,vnj->vni", _RGB_TO_XYZ, seen) / _WHITE_XYZ
    x, y, z = np.moveaxis(np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def glasbey_colours() -> np.ndarray:
    """Return Okabe and Ito's colours, then each time the one farthest from all before it in the worst of the visions.

    Glasbey et al. (2007), over four kinds of vision and a grid of 16 values per channel; uint8 (256, 3).
    """
    steps = np.arange(0, 256, 17)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness = seen_colours(grid)[0, :, 0]
    grid = grid[(lightness > _LIGHTNESS[0]) & (lightness < _LIGHTNESS[1])]
    seen = seen_colours(grid)
    chosen = list(_OKABE_ITO)
    taken = seen_colours(np.array([*chosen, (0, 0, 0), (255, 255, 255)]))
    nearest = np.linalg.norm(seen[:, :, None] - taken[:, None], axis=-1).min((0, 2))
    for _ in range(_NUM_COLOURS - len(chosen)):
        # Rounded, so that the last bits of a machine's arithmetic choose nothing.
        farthest = int(nearest.round(6).argmax())
        chosen.append(tuple(grid[farthest]))
        nearest = np.minimum(nearest, np.linalg.norm(seen - seen[:, [farthest]], axis=-1).min(0))
    return np.array(chosen, dtype=np.uint8)
