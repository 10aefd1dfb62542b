import numpy as np
import pytest
from PIL import Image

from tests.reports.glasbey import glasbey_colours, seen_colours
from transfgu_ray.reports.palette import class_colours, spotlight


def smallest_difference(colours):
    """Return the CIE76 distance of the two most similar colours, in the worst of four colour visions."""
    seen = seen_colours(colours)
    distances = np.linalg.norm(seen[:, :, None] - seen[:, None], axis=-1)
    distances[:, np.arange(len(colours)), np.arange(len(colours))] = np.inf
    return distances.min()


def test_seen_colours__are_cielab():
    # CIE values of sRGB's white, black, red and grey 119.
    want = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [50.03, 0, 0]]
    got = seen_colours(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [119, 119, 119]]))
    assert got[0] == pytest.approx(np.array(want), abs=0.05)
    # Without red or green cones, grey still looks grey.
    assert got[:, 3, 1:] == pytest.approx(np.zeros((4, 2)), abs=0.3)


def test_class_colours__are_those_of_the_generator_and_repeat_beyond():
    made = glasbey_colours()
    assert made.shape == (256, 3)
    assert np.array_equal(class_colours(256, None), made)
    assert np.array_equal(class_colours(1000, None), np.tile(made, (4, 1))[:1000])


@pytest.mark.parametrize(("num_classes", "least"), [(7, 16), (16, 16), (27, 13), (80, 7), (171, 5)])
def test_class_colours__are_distinct_in_every_colour_vision(num_classes, least):
    # 2.3 is a just noticeable difference.
    assert smallest_difference(class_colours(num_classes, None)) > least
    assert smallest_difference(np.concatenate([class_colours(num_classes, None), [[0, 0, 0], [255] * 3]])) > least / 2


def test_class_colours__the_background_takes_none_of_the_palette():
    plain, with_background = class_colours(5, None), class_colours(6, 2)
    assert (with_background[2] == 0).all()
    assert (np.delete(with_background, 2, axis=0) == plain).all()
    assert len(class_colours(1000, None)) == 1000


def test_spotlight__lights_what_is_high():
    photo = Image.new("RGB", (8, 4), (200, 100, 0))
    lit = np.asarray(spotlight(photo, np.array([[0.0, 0.5]])))
    assert lit.shape == (4, 8, 3)
    assert lit[0, -1].tolist() == [200, 100, 0]
    assert lit[0, 0].tolist() == [25, 25, 25]
    assert (np.asarray(spotlight(photo, np.zeros((2, 2)))) == 25).all()
