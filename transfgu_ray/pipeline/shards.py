"""The class tokens of a group, spilled to the local disks of Ray actors; each has one block of its shard in memory."""

import io
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from transfgu_ray.algorithms.concepts import sharded_kmeans as lloyd
from transfgu_ray.algorithms.concepts.kmeans import KMeans, has_gpu, train
from transfgu_ray.engine.parts import read_part
from transfgu_ray.engine.session import WORKER_CPUS, Resources, cores_per_gpu, granted_by_node
from transfgu_ray.engine.signs import Sign
from transfgu_ray.engine.stream import even_ranges, peak_memory_mb
from transfgu_ray.errors import ArtifactError
from transfgu_ray.runs.tables import vectors
from transfgu_ray.storage import Folder

# Restarts of a killed actor, which spills its shard and repeats its call; calls have no side effects.
_MAX_RESTARTS = 3
# Each actor on a GPU keeps about 1 GB of its memory.
_MOST_PER_GPU = 8


@dataclass(frozen=True)
class Piece:
    """The points of one part.

    Attributes:
        name: file of the part.
        first_row: index of its first point in the group.
    """

    name: str
    first_row: int


@dataclass(frozen=True)
class ShardPlan:
    """A shard: rows `start` to `stop` of a group, and the parts that hold them."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


def plan_shards(parts: Sequence[tuple[str, int]], num_shards: int) -> list[ShardPlan]:
    """Split a group at multiples of `BLOCK_ROWS` into at most `num_shards` shards of nearly equal size.

    Args:
        parts: name of each part in order, and its number of points of the group.
        num_shards: number of shards wanted.
    """
    edges = list(itertools.accumulate((rows for _, rows in parts), initial=0))
    total = edges[-1]
    num_blocks = -(-total // lloyd.BLOCK_ROWS)
    runs = even_ranges(num_blocks, min(num_shards, num_blocks))
    cuts = [min(blocks.start * lloyd.BLOCK_ROWS, total) for blocks in runs] + [total]
    return [
        ShardPlan(
            start,
            stop,
            tuple(
                Piece(name, first)
                for (name, rows), first in zip(parts, edges, strict=False)
                if rows and first < stop and first + rows > start
            ),
        )
        for start, stop in itertools.pairwise(cuts)
    ]


def read_points(run_folder: Folder, name: str, kind: str) -> np.ndarray:
    """Read the class tokens of one kind from a part of the features, float16 (n, d), in order."""
    return vectors(read_part(run_folder, name, ["kind", "cls_token"]).filter(pc.field("kind") == kind)["cls_token"])


class PointShard:
    """One shard. Its points are in an unnamed file, which vanishes with the process, however that ends."""

    def __init__(self, run_uri: str, kind: str, *, plan: ShardPlan, threads: int, use_gpu: bool, sign: Sign) -> None:
        import faiss

        faiss.omp_set_num_threads(threads)
        self._run_folder = Folder(run_uri)
        self._kind = kind
        self._plan = plan
        self._sign = sign
        self._device = "cuda" if use_gpu and _has_cuda() else "cpu"
        self._spilled: tuple[io.BufferedRandom, int] | None = None

    def load(self) -> tuple[float, bool]:
        """Spill the points; return their largest magnitude, and whether a GPU will be used."""
        return lloyd.largest_value(self._blocks()), self._device == "cuda"

    def sum_nearest(self, centroids: np.ndarray) -> lloyd.ClusterSums:
        """Return `lloyd.sum_nearest` of the shard."""
        return lloyd.sum_nearest(self._blocks(), centroids, self._device)

    def farthest(self, centroids: np.ndarray, concept: int, most: int) -> lloyd.FarPoints:
        """Return `lloyd.farthest` of the shard."""
        return lloyd.farthest(
            self._blocks(), self._plan.start, centroids=centroids, concept=concept, most=most, device=self._device
        )

    def central(self, centroids: np.ndarray, most: int) -> lloyd.CentralPoints:
        """Return `lloyd.central` of the shard."""
        return lloyd.central(self._blocks(), self._plan.start, centroids=centroids, most=most, device=self._device)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the points of those of the group's rows that are in this shard, float16 (n, d)."""
        file, width = self._file()
        own = rows[(rows >= self._plan.start) & (rows < self._plan.stop)] - self._plan.start
        points = np.empty((len(own), width), np.float16)
        for point, row in zip(points, own.tolist(), strict=True):
            file.seek(row * point.nbytes)
            file.readinto(point.data)
        return points

    def train_on(
        self, rows: np.ndarray, num_concepts: int, *, how: KMeans, start: np.ndarray | None, others: list[Any]
    ) -> np.ndarray:
        """Run `train` on some rows of the group, fetched in order from all shards, a block at a time.

        Its signs name each pass and the number of passes.
        """
        import ray

        _, width = self._file()
        points = np.empty((len(rows), width), np.float32)
        for first in range(0, len(rows), lloyd.BLOCK_ROWS):
            drawn = rows[first : first + lloyd.BLOCK_ROWS]
            far = [other.take.remote(drawn) for other in others]
            np.concatenate([self.take(drawn), *ray.get(far)], out=points[first : first + len(drawn)])
        how = replace(how, use_gpu=self._device == "cuda" and has_gpu())
        return train(points, num_concepts, how=how, start=start, on_pass=lambda n, of: self._sign(number=n, most=of))

    def peak_mb(self) -> int:
        """Return the peak resident memory of this process so far, MB."""
        return peak_memory_mb()

    def _blocks(self) -> Iterator[np.ndarray]:
        """Yield blocks of `BLOCK_ROWS` points, the last one shorter; each is overwritten by the next."""
        file, width = self._file()
        file.seek(0)
        # Read rather than mapped: mapped pages count as memory of this process.
        block = np.empty((lloyd.BLOCK_ROWS, width), np.float16)
        while num_bytes := file.readinto(block.data):
            self._sign()
            yield block[: num_bytes // block[0].nbytes]

    def _file(self) -> tuple[io.BufferedRandom, int]:
        if self._spilled is None:
            width = 0
            with self._disk_errors():
                # As Any: the stubs give the type of the Windows wrapper; on POSIX it is the file itself.
                opened: Any = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the actor
                file: io.BufferedRandom = opened
            for piece in self._plan.pieces:
                self._sign()
                points = read_points(self._run_folder, piece.name, self._kind)
                width = points.shape[1]
                own = points[max(self._plan.start - piece.first_row, 0) : self._plan.stop - piece.first_row]
                with self._disk_errors():
                    file.write(np.ascontiguousarray(own).data)
            with self._disk_errors():
                file.flush()
            self._spilled = file, width
        return self._spilled

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(
                f"cannot keep {self._plan.stop - self._plan.start} {self._kind} class tokens in "
                f"{tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a folder with more free space"
            ) from None


class ActorShards(lloyd.ShardedPoints):
    """The shards as Ray actors; only centroids, sums and the drawn sample cross the network."""

    def __init__(self, actors: list[Any], num_points: int) -> None:
        self._actors = actors
        loaded = self._all("load")
        self.num_points = num_points
        self.largest_value = float(np.max([largest for largest, _ in loaded]))
        self.used_gpu = all(used_gpu for _, used_gpu in loaded)

    def train_on(
        self,
        rows: np.ndarray,
        num_concepts: int,
        *,
        how: KMeans,
        start: np.ndarray | None,
    ) -> np.ndarray:
        """Train on the first actor."""
        import ray

        first, *others = self._actors
        centroids: np.ndarray = ray.get(first.train_on.remote(rows, num_concepts, how=how, start=start, others=others))
        return centroids

    def sum_nearest(self, centroids: np.ndarray) -> list[lloyd.ClusterSums]:
        """Run one pass of all actors over their points."""
        return self._all("sum_nearest", centroids)

    def farthest(self, centroids: np.ndarray, concept: int, most: int) -> list[lloyd.FarPoints]:
        """Run one pass of all actors over their points."""
        return self._all("farthest", centroids, concept, most)

    def central(self, centroids: np.ndarray, most: int) -> list[lloyd.CentralPoints]:
        """Run one pass of all actors over their points."""
        return self._all("central", centroids, most)

    def peak_mb(self) -> int:
        """Return the highest peak memory of any actor so far, MB."""
        peaks: list[int] = self._all("peak_mb")
        return max(peaks)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        import ray

        return ray.get([getattr(actor, method).remote(*arguments) for actor in self._actors])


def _has_cuda() -> bool:
    # Takes seconds and much memory, which workers without a GPU spare themselves.
    import torch

    return torch.cuda.is_available()


def count_shards(resources: Resources, nodes: Sequence[Mapping[str, float]]) -> int:
    """Return how many actors shall hold a large group: without GPUs as many as a stage has workers.

    Reading and spilling want cores, so that several actors share a GPU: as many as its share of the cores of its node
    carries, at most `_MOST_PER_GPU`.

    Args:
        resources: workers, threads and GPUs.
        nodes: what Ray grants on each node; GPUs that are still to come are taken to be of the same kinds.
    """
    if resources.device != "cuda":
        return resources.num_workers
    # Where Ray still has no GPU, none is known.
    carried = [cores_per_gpu(node) // resources.threads for node in nodes if node.get("GPU")] or [1]
    return resources.num_workers * max(1, min(*carried, _MOST_PER_GPU))


def gpu_share(resources: Resources, num_shards: int) -> float:
    """Return the GPUs that each of so many actors requests, so that they are spread evenly over all GPUs."""
    if resources.device != "cuda":
        return 0.0
    # Ray counts in ten-thousandths, and rounds up.
    return 10_000 // -(-num_shards // resources.num_workers) / 10_000


@contextmanager
def actor_shards(
    run_folder: Folder, kind: str, *, parts: Sequence[tuple[str, int]], resources: Resources, sign: Sign
) -> Iterator[ActorShards]:
    """Yield the points of one kind in the actors of `count_shards`; they end with the context.

    Args:
        run_folder: the run folder.
        kind: kind of the crops.
        parts: name of each part of the features in order, and its number of points of this kind.
        resources: workers, threads and GPUs.
        sign: given for each block that is read.

    Raises:
        ArtifactError: an actor's temporary folder is full.
    """
    import ray

    plans = plan_shards(parts, count_shards(resources, granted_by_node()))
    # Ray needs both numbers to replace a killed actor and repeat its call.
    worker: Any = ray.remote(PointShard).options(
        num_cpus=WORKER_CPUS,
        num_gpus=gpu_share(resources, len(plans)),
        max_restarts=_MAX_RESTARTS,
        max_task_retries=_MAX_RESTARTS,
    )
    use_gpu = resources.device == "cuda"
    actors = [
        worker.remote(run_folder.uri, kind, plan=plan, threads=resources.threads, use_gpu=use_gpu, sign=sign)
        for plan in plans
    ]
    try:
        yield ActorShards(actors, sum(rows for _, rows in parts))
    finally:
        for actor in actors:
            ray.kill(actor)
