from contextlib import contextmanager

import numpy as np
import pytest
import torch

from transfgu_ray.algorithms.concepts import sharded_kmeans as lloyd
from transfgu_ray.algorithms.concepts import torch_nearest
from transfgu_ray.algorithms.concepts.kmeans import nearest
from transfgu_ray.algorithms.concepts.torch_nearest import TorchCentroids

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def _grid(num, dim=6, seed=0):
    """Points of small whole numbers: all sums and products are exact, and many centroids are equally near."""
    return np.random.default_rng(seed).integers(-2, 3, (num, dim)).astype(np.float16)


@contextmanager
def _tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _brute_force(points, centroids):
    squared = ((points[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(-1)
    # Of several the first.
    return squared.min(1), squared.argmin(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [4096, 7, 1])
def test_nearest__of_several_the_first_as_with_faiss(device, chunk, monkeypatch):
    monkeypatch.setattr(torch_nearest, "CHUNK", chunk)
    points, centroids = _grid(500), _grid(40, seed=1).astype(np.float32)
    centroids[25] = centroids[3]
    squared = ((points[:, None].astype(np.float64) - centroids[None]) ** 2).sum(-1)
    assert ((squared == squared.min(1, keepdims=True)).sum(1) > 1).mean() > 0.1, "ties"
    distance, assigned = TorchCentroids(centroids, device).nearest(torch.from_numpy(points).to(device))
    expected = _brute_force(points, centroids)
    by_faiss = nearest(points.astype(np.float32), centroids)
    for got, plain, faiss in zip((distance, assigned), expected, by_faiss, strict=True):
        assert np.array_equal(got.cpu().numpy(), plain)
        assert np.array_equal(faiss, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_nearest__as_exact_as_float32_whatever_the_process_allows(device):
    rng = np.random.default_rng(0)
    points, centroids = rng.normal(size=(300, 384)).astype(np.float16), rng.normal(size=(50, 384)).astype(np.float32)
    with _tf32():
        distance, assigned = TorchCentroids(centroids, device).nearest(torch.from_numpy(points).to(device))
    expected, plain = _brute_force(points, centroids)
    np.testing.assert_allclose(distance.cpu().numpy(), expected, rtol=1e-5)
    assert np.array_equal(assigned.cpu().numpy(), plain)


def test_nearest__tf32_is_off_only_while_it_multiplies(monkeypatch):
    seen, multiply = [], torch.addmm

    def watched(*arguments, **options):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return multiply(*arguments, **options)

    monkeypatch.setattr(torch, "addmm", watched)
    with _tf32():
        TorchCentroids(np.zeros((2, 3), np.float32), "cpu").nearest(torch.zeros(4, 3))
        assert seen == ["ieee"]
        assert (torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()) == ("tf32", "high")


def test_nearest__a_point_on_a_centroid_is_not_nearer_than_zero():
    points = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    distance, assigned = TorchCentroids(points, "cpu").nearest(torch.from_numpy(points))
    assert np.array_equal(assigned.numpy(), np.arange(200))
    assert (distance >= 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_sum_nearest_by_torch__same_sums_as_by_faiss(device):
    points, centroids = _grid(1000), _grid(30, seed=1).astype(np.float32)
    blocks = [points[:512], points[512:]]
    got = lloyd.sum_nearest_by_torch(blocks, centroids, device)
    expected = lloyd.sum_nearest(blocks, centroids, "cpu")
    assert got.sums.dtype == expected.sums.dtype == np.int64
    assert np.array_equal(got.sums, expected.sums)
    assert np.array_equal(got.num_points, expected.num_points)


@pytest.mark.parametrize("device", DEVICES)
def test_sum_nearest_by_torch__exact_for_the_largest_and_the_smallest_float16_together(device):
    points = np.full((lloyd.BLOCK_ROWS, 2), 65504, np.float16)
    points[1::2] = 2.0**-24
    points[5, 1] = -(2.0**-24)
    got = lloyd.sum_nearest_by_torch([points, points[::-1].copy()], np.zeros((1, 2), np.float32), device)
    units = [[int(float(value) * 2**24) for value in row] for row in points]
    assert got.sums.tolist() == [[2 * sum(column) for column in zip(*units, strict=True)]]


@pytest.mark.parametrize("device", DEVICES)
def test_blocks__may_be_overwritten_by_the_next(device):
    # As in the pipeline, whose shards read each block into the memory of the one before.
    points, centroids = _grid(1000), _grid(30, seed=1).astype(np.float32)

    def read():
        block = np.empty((100, 6), np.float16)
        for first in range(0, 1000, 100):
            block[:] = points[first : first + 100]
            yield block
        block[:] = np.nan

    expected = lloyd.sum_nearest([points], centroids, "cpu")
    assert np.array_equal(lloyd.sum_nearest_by_torch(read(), centroids, device).sums, expected.sums)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_farthest__on_cuda_equal_to_the_cpu():
    points, centroids = _grid(1000), _grid(30, seed=1).astype(np.float32)
    on_cpu, on_cuda = (
        lloyd.farthest([points], 7, centroids=centroids, concept=2, most=9, device=device) for device in ("cpu", "cuda")
    )
    assert np.array_equal(on_cpu.row, on_cuda.row)
    assert np.array_equal(on_cpu.distance, on_cuda.distance)
