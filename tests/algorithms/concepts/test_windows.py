import numpy as np
import pytest

from transfgu_ray.algorithms.concepts.windows import (
    classify_regions,
    classify_windows,
    enumerate_windows,
    foreground_fracs,
    region_boxes,
    to_original,
)

PAPER_FRACS = (0.5, 0.4, 0.3, 0.2)


@pytest.mark.parametrize("size", [24, 33, 97, 128, 224, 320, 641])
def test_enumerate_windows__square_counts_of_the_paper_at_any_size(size):
    _, fracs = enumerate_windows(size, size, PAPER_FRACS)
    assert [int((fracs == frac).sum()) for frac in PAPER_FRACS] == [9, 16, 36, 81]
    assert len(fracs) == 142


@pytest.mark.parametrize("size", [40, 43, 91])
def test_enumerate_windows__rounding_errors_add_no_window(size):
    # (43 - 4.3) / 2.15 is 18, but a little more in floating point.
    assert len(enumerate_windows(size, size, (0.1,))[0]) == 19 * 19


def test_enumerate_windows__worked_by_hand():
    # Side 4, step 2: rows at 0, 2, 4 and columns at 0, 2, 4, 6, 8.
    boxes, fracs = enumerate_windows(8, 12, (0.5,))
    want = [(x, y, x + 4, y + 4) for y in (0, 2, 4) for x in (0, 2, 4, 6, 8)]
    assert boxes.tolist() == [list(box) for box in want]
    assert fracs.tolist() == [0.5] * 15


@pytest.mark.parametrize(("height", "width"), [(64, 200), (301, 77), (50, 51), (33, 640)])
def test_enumerate_windows__each_scale_covers_a_non_square_image(height, width):
    boxes, fracs = enumerate_windows(height, width, PAPER_FRACS)
    for frac in PAPER_FRACS:
        covered = np.zeros((height, width), dtype=bool)
        for x0, y0, x1, y1 in boxes[fracs == frac]:
            # Outside the image a slice would be cut silently.
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            assert x1 - x0 == y1 - y0 == round(frac * min(height, width))
            covered[y0:y1, x0:x1] = True
        assert covered.all()


def test_enumerate_windows__full_size_window_is_the_image():
    assert enumerate_windows(40, 40, (1.0,))[0].tolist() == [[0, 0, 40, 40]]


def test_foreground_fracs__equal_to_counting_pixels():
    rng = np.random.default_rng(0)
    mask = rng.random((5, 7)) < 0.4
    boxes, _ = enumerate_windows(40, 56, (0.5, 0.3))
    pixels = np.kron(mask, np.ones((8, 8), dtype=bool))
    want = [pixels[y0:y1, x0:x1].mean() for x0, y0, x1, y1 in boxes]
    np.testing.assert_allclose(foreground_fracs(boxes, mask, 8), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("region_mode", "want"),
    [
        ("things_and_stuff", ["background", "background", "dropped", "dropped", "foreground", "foreground"]),
        ("things_only", ["dropped", "dropped", "dropped", "dropped", "foreground", "foreground"]),
        ("all_foreground", ["foreground"] * 6),
        ("no_prior", ["any"] * 6),
    ],
)
def test_classify_windows__bounds_of_the_paper(region_mode, want):
    # "More than 50 %" excludes 0.5; of the background, here more than 75 %, 0.25 is excluded. Floats hold both.
    fracs = np.array([0.0, 0.24, 0.25, 0.5, 0.51, 1.0])
    assert classify_windows(fracs, region_mode, foreground_min_frac=0.5, background_min_frac=0.75) == want


def test_to_original__scales_each_axis():
    boxes = np.array([[0, 0, 64, 64], [64, 32, 128, 96]], dtype=np.int32)
    assert to_original(boxes, (128, 128), (64, 256)).tolist() == [[0, 0, 128, 32], [128, 16, 256, 48]]


def test_to_original__never_empty_nor_outside():
    boxes, _ = enumerate_windows(128, 128, (0.02, 0.05))
    small = to_original(boxes, (128, 128), (5, 9))
    assert (small[:, 2:] > small[:, :2]).all()
    assert (small >= 0).all()
    assert (small[:, 2:] <= [9, 5]).all()


def test_region_boxes__worked_by_hand():
    classes = np.full((20, 30), 2, dtype=np.uint8)
    classes[2:5, 3:9] = 7
    classes[10:14, 20:22] = 7
    classes[0, 0] = 7
    classes[5, 3:9] = 255
    boxes, class_ids, num_small = region_boxes(classes)
    # The lone pixel is less than 1/400 of 600 px; void is not a region.
    assert boxes.tolist() == [[0, 0, 30, 20], [3, 2, 9, 5], [20, 10, 22, 14]]
    assert (class_ids.tolist(), num_small) == ([2, 7, 7], 1)


def test_region_boxes__nothing_but_void():
    boxes, class_ids, num_small = region_boxes(np.full((8, 8), 255, dtype=np.uint8))
    assert (boxes.shape, class_ids.shape, num_small) == ((0, 4), (0,), 0)


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [
        ("things_and_stuff", ["foreground", "background"]),
        ("things_only", ["foreground", "dropped"]),
        ("all_foreground", ["foreground", "dropped"]),
        ("no_prior", ["any", "any"]),
    ],
)
def test_classify_regions__by_region_mode(mode, kinds):
    assert classify_regions(np.array([True, False]), mode) == kinds
