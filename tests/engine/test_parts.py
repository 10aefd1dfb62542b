import numpy as np
import pytest

from transfgu_ray.engine.parts import PartStats, require_finite
from transfgu_ray.errors import DataError


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_require_finite__names_the_photographs(bad):
    require_finite(np.empty((0, 3), np.float16), [], "class tokens")
    values = np.ones((4, 2, 3), np.float16)
    require_finite(values, ["a", "b", "b", "c"], "class tokens")
    values[2, 1, 0] = values[3, 0, 0] = bad
    with pytest.raises(DataError, match="the class tokens of 2 photographs are NaN or infinite, the first, b;"):
        require_finite(values, ["a", "b", "b", "c"], "class tokens")


def test_part_stats__add_up():
    one, other = PartStats(images=1), PartStats(images=2, refused=[{"image_id": "a", "reason": "b"}])
    one.halve()
    other.halve()
    other.drop("small", 3)
    one.add(other)
    assert vars(one) == {"images": 3, "refused": other.refused, "dropped": {"small": 3}, "halvings": 2}
