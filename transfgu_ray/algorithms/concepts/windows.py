"""Sliding windows over an image, and which of them are foreground (3.2, 4.2 of the paper)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64, UInt8
from scipy import ndimage

# A labelled region with a smaller share of the image shows nothing once it is enlarged to a crop.
_MIN_REGION = 1 / 400
_VOID = 255

FOREGROUND, BACKGROUND, ANY, DROPPED = "foreground", "background", "any", "dropped"


def enumerate_windows(
    height: int, width: int, window_fracs: Sequence[float]
) -> tuple[Int32[np.ndarray, "n 4"], Float[np.ndarray, " n"]]:
    """Lay out square windows of side beta * min(height, width) at half-side steps, row by row, in the order of beta.

    The last window of a row or column is flush with the edge, so the image is covered. The counts do not
    depend on the size: a square image has 9, 16, 36 and 81 windows for beta 0.5, 0.4, 0.3 and 0.2.

    Args:
        height: image height in px.
        width: image width in px.
        window_fracs: values of beta in (0, 1].

    Returns:
        Boxes (x0, y0, x1, y1) in px, half-open, and the beta of each. A row's index is its crop_id.

    Reference: 3.2 and 4.2. Departures: corners and sides are rounded to whole pixels.
    """
    boxes, fracs = [], []
    for frac in window_fracs:
        side = frac * min(height, width)
        side_px = max(1, round(side))
        for top in _starts(height, side, side_px):
            for left in _starts(width, side, side_px):
                boxes.append((left, top, left + side_px, top + side_px))
                fracs.append(frac)
    return np.array(boxes, dtype=np.int32).reshape(-1, 4), np.array(fracs, dtype=np.float64)


def _starts(length: int, side: float, side_px: int) -> list[int]:
    # Counted in real numbers: rounding the side first would lose or add a window at small sizes.
    steps = math.ceil((length - side) / (side / 2) - 1e-9)
    return [min(round(i * side / 2), length - side_px) for i in range(steps)] + [length - side_px]


def enumerate_patch_windows(
    grid_hw: tuple[int, int], patch_size: int, window_fracs: Sequence[float]
) -> tuple[Int32[np.ndarray, "n 4"], Float[np.ndarray, " n"]]:
    """Lay out windows as the published code does: on the patch grid, with both end patches.

    A window of b = floor(beta * min(h, w)) patches lies around a patch, half of b to each side, and keeps both patches
    at its ends and all but the last pixel: 8 (b + 1) - 1 px on patches of 8 px. Centres lie on multiples of b / 2;
    where these leave patches at the far edge, one more row or column is flush with it.

    Args:
        grid_hw: patch grid (h, w) of the image.
        patch_size: side of a patch in px.
        window_fracs: values of beta in (0, 1].

    Returns:
        Boxes (x0, y0, x1, y1) in px, half-open, and the beta of each, by beta, then row by row.

    Reference: `generate_box_anchors` and the crop scripts of the released code. Departures: none.
    """
    boxes, fracs = [], []
    for frac in window_fracs:
        # As theirs: the smaller of the two products, rounded down.
        side = int(min(grid_hw[0] * frac, grid_hw[1] * frac))
        rows, columns = (_centres(length, side) for length in grid_hw)
        for y, row in rows.items():
            for x, column in columns.items():
                # Off the steps in both directions only the window in the far corner is kept.
                if row.on_step or column.on_step or (row.at_end and column.at_end):
                    left, top = (patch_size * math.ceil(at - side / 2) for at in (x, y))
                    right, bottom = (patch_size * (math.floor(at + side / 2) + 1) - 1 for at in (x, y))
                    boxes.append((left, top, right, bottom))
                    fracs.append(frac)
    return np.array(boxes, dtype=np.int32).reshape(-1, 4), np.array(fracs, dtype=np.float64)


class _Centre(NamedTuple):
    """Whether a centre lies on a step of the published layout, and whether its window is flush with the far edge."""

    on_step: bool
    at_end: bool


def _centres(length: int, side: int) -> dict[int, _Centre]:
    """Return the patches that windows of `side` patches lie around along `length` patches: on steps or at the end."""
    half = side / 2
    centres = {
        at: _Centre(at % half == 0, at + half == length - 1)
        for at in range(length)
        if half <= at and at + half < length
    }
    return {at: centre for at, centre in centres.items() if any(centre)}


def window_shares(
    boxes: Int32[np.ndarray, "n 4"], grid_hw: tuple[int, int], patch_size: int
) -> Float32[np.ndarray, "n h w"]:
    """Return each window's share of the area that windows cover of each patch; at a covered patch the shares sum to 1.

    Args:
        boxes: (x0, y0, x1, y1) in px.
        grid_hw: patch grid (h, w).
        patch_size: side of a patch in px.
    """
    edges = [np.arange(count) * patch_size for count in grid_hw]
    overlaps = [
        np.minimum(boxes[:, None, axis + 2], edge + patch_size) - np.maximum(boxes[:, None, axis], edge)
        for axis, edge in ((1, edges[0]), (0, edges[1]))
    ]
    rows, columns = (np.maximum(overlap, 0).astype(np.float32) for overlap in overlaps)
    areas = rows[:, :, None] * columns[:, None, :]
    shares: np.ndarray = areas / areas.sum(0)
    return shares


def foreground_fracs(
    boxes: Int32[np.ndarray, "n 4"], foreground: Bool[np.ndarray, "h w"], patch_size: int
) -> Float[np.ndarray, " n"]:
    """Return the share of each window's pixels that lie on foreground patches, in [0, 1].

    Args:
        boxes: (x0, y0, x1, y1) in px of an image of (h * patch_size, w * patch_size) px.
        foreground: mask on the patch grid.
        patch_size: side of a patch in px.
    """
    pixels = foreground.repeat(patch_size, axis=0).repeat(patch_size, axis=1)
    area = np.zeros((pixels.shape[0] + 1, pixels.shape[1] + 1), dtype=np.int64)
    area[1:, 1:] = pixels.cumsum(0, dtype=np.int64).cumsum(1)
    x0, y0, x1, y1 = boxes.T
    inside = area[y1, x1] - area[y0, x1] - area[y1, x0] + area[y0, x0]
    shares: np.ndarray = inside / ((x1 - x0) * (y1 - y0)).astype(np.float64)
    return shares


def classify_windows(
    fracs: Float[np.ndarray, " n"], region_mode: str, *, foreground_min_frac: float, background_min_frac: float
) -> list[str]:
    """Return the kind of each window: `foreground`, `background`, `any` or `dropped`.

    Args:
        fracs: foreground share of each window, in [0, 1].
        region_mode: things_and_stuff keeps both groups; things_only keeps the foreground; all_foreground and
            no_prior keep every window, as `foreground` and `any`.
        foreground_min_frac: a window is foreground if more of it than this is (paper: 0.5).
        background_min_frac: a window is background if more of it than this is (paper: 0.8).

    Reference: 4.2, Foreground prior.
    """
    if region_mode == "all_foreground":
        return [FOREGROUND] * len(fracs)
    if region_mode == "no_prior":
        return [ANY] * len(fracs)
    keep_background = region_mode == "things_and_stuff"
    kinds = []
    for frac in fracs:
        if frac > foreground_min_frac:
            kinds.append(FOREGROUND)
        elif keep_background and 1 - frac > background_min_frac:
            kinds.append(BACKGROUND)
        else:
            kinds.append(DROPPED)
    return kinds


def region_boxes(
    classes: UInt8[np.ndarray, "h w"],
) -> tuple[Int32[np.ndarray, "n 4"], Int64[np.ndarray, " n"], int]:
    """Return boxes around the connected regions of each class but void, by class, then from the top.

    Args:
        classes: class id of each pixel; 255 is void.

    Returns:
        Boxes (x0, y0, x1, y1) in px, half-open; the class of each; and how many regions below 1/400 of the image were
        left out.

    Reference: supplement, The Quality of Cropping. Departures: the text does not say how the boxes are cut; regions are
    4-connected, so that two objects of one class that touch share a box.
    """
    boxes, class_ids, num_small = [], [], 0
    for class_id in np.setdiff1d(classes, [_VOID]):
        regions, _ = ndimage.label(classes == class_id)
        areas = np.bincount(regions.ravel())[1:]
        for area, (rows, columns) in zip(areas, ndimage.find_objects(regions), strict=True):
            if area < _MIN_REGION * classes.size:
                num_small += 1
                continue
            boxes.append((columns.start, rows.start, columns.stop, rows.stop))
            class_ids.append(int(class_id))
    return np.array(boxes, dtype=np.int32).reshape(-1, 4), np.array(class_ids, dtype=np.int64), num_small


def classify_regions(is_thing: Bool[np.ndarray, " n"], region_mode: str) -> list[str]:
    """Return the kind of each labelled region, like `classify_windows` for windows.

    Args:
        is_thing: whether each region's class is a thing.
        region_mode: stuff is background in things_and_stuff, and left to Eq. 8 in things_only and all_foreground.
    """
    if region_mode == "no_prior":
        return [ANY] * len(is_thing)
    stuff = BACKGROUND if region_mode == "things_and_stuff" else DROPPED
    return [FOREGROUND if thing else stuff for thing in is_thing]


def to_original(
    boxes: Int32[np.ndarray, "n 4"], working_hw: tuple[int, int], original_hw: tuple[int, int]
) -> Int32[np.ndarray, "n 4"]:
    """Return boxes of the working image in px of the original image, rounded, never empty."""
    scale = np.array([original_hw[1] / working_hw[1], original_hw[0] / working_hw[0]] * 2)
    scaled: np.ndarray = np.rint(boxes * scale).astype(np.int32)
    limit = np.array([original_hw[1], original_hw[0]], dtype=np.int32)
    scaled[:, :2] = np.minimum(scaled[:, :2], limit - 1)
    scaled[:, 2:] = np.maximum(scaled[:, 2:], scaled[:, :2] + 1)
    return scaled
