import pytest
import torch

from transfgu_ray.engine.halving import halved


def _doubling_at_most(most, seen):
    def run(batch):
        seen.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * batch

    return run


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(8, [7]), (4, [7, 3, 4]), (2, [7, 3, 1, 2, 4, 2, 2]), (1, [7, 3, 1, 2, 1, 1, 4, 2, 1, 1, 2, 1, 1])],
)
def test_halved__yields_all_in_order_in_halves_that_fit(most, sizes):
    seen, counts, batch = [], [], torch.arange(7)
    parts = list(halved(_doubling_at_most(most, seen), batch, lambda: counts.append(1)))
    assert torch.equal(torch.cat(parts), 2 * batch)
    assert seen == sizes
    assert len(counts) == sum(size > most for size in sizes)


def test_halved__one_item_that_does_not_fit():
    with pytest.raises(torch.OutOfMemoryError):
        list(halved(_doubling_at_most(0, []), torch.arange(3), lambda: None))
