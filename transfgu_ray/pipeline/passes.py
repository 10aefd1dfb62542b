"""The passes of k-means over the crops of each group: shown while they are made, and kept so that a rerun goes on."""

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import astuple, fields

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from transfgu_ray.algorithms.concepts.sharded_kmeans import FitState
from transfgu_ray.engine.progress import Progress
from transfgu_ray.storage import Folder

_FOLDER = "concepts"


class ShownPasses:
    """The progress of a clustering. Passes are counted once, whoever tells of them: workers by signs, or the driver.

    Args:
        progress: counts passes over all crops of a group; others, over a sample, are only told in words.
        kinds: kind of the crops of each group, in order.
    """

    def __init__(self, progress: Progress, kinds: Iterable[str]) -> None:
        self._progress = progress
        self._order = list(kinds)
        self._planned: Mapping[str, int] = {}
        self._done = dict.fromkeys(self._order, 0)
        self._kind, self._words = "", ""
        # Signs come from a thread.
        self._lock = threading.Lock()

    def expect(self, planned: Mapping[str, int]) -> None:
        """Set the most passes that each group takes, as long as no concept is seeded anew."""
        self._planned = planned
        self._progress.expect(sum(planned.values()))

    def begin(self, kind: str) -> None:
        """Go on to a group of which the driver tells."""
        with self._lock:
            self._kind, self._words = kind, ""

    def reach(self, number: int, most: int) -> None:
        """Count a pass over all crops of the group that was begun last; passes after a reseeding begin at 1 again."""
        self._reach(self._kind, number, most)

    def end(self, kind: str) -> None:
        """Count what is left of a group, whose centroids may rest early."""
        with self._lock:
            self._count(kind, self._planned[kind])

    def sign(self, words: Mapping[str, float]) -> None:
        """Take a sign of life, which may name a pass: its `number`, how many there are at `most`, and its `group`.

        Without a group it is a pass over a sample of the large group that was begun last.
        """
        if "group" in words:
            self._reach(self._order[int(words["group"])], int(words["number"]), int(words["most"]))
            return
        with self._lock:
            if "number" in words:
                said = f"pass {words['number']:.0f} of {words['most']:.0f} over a sample"
                self._words = self._named(self._kind, said)
            self._progress(0, self._words)

    def _reach(self, kind: str, number: int, most: int) -> None:
        with self._lock:
            self._words = self._named(kind, f"pass {number} of {most}")
            self._count(kind, number)

    def _named(self, kind: str, said: str) -> str:
        return f"{kind}: {said}" if len(self._order) > 1 else said

    def _count(self, kind: str, done: int) -> None:
        done = min(done, self._planned[kind])
        self._progress(max(0, done - self._done[kind]), self._words)
        self._done[kind] = max(done, self._done[kind])


class PassFile:
    """The state of an unfinished clustering of one group, `concepts/passes-KIND.safetensors` in the run folder.

    Args:
        run_folder: the run folder.
        kind: kind of the crops.
        made_of: identifies settings and crops; a state of others is none.
    """

    def __init__(self, run_folder: Folder, kind: str, made_of: str) -> None:
        self._run_folder = run_folder
        self._made_of = made_of
        self._name = f"{_FOLDER}/passes-{kind}.safetensors"

    def read(self) -> FitState | None:
        """Return the state; None if there is none, it is damaged, or it was made of something else."""
        if (data := self._run_folder.find_bytes(self._name)) is None:
            return None
        try:
            centroids = safetensors.numpy.load(data)["centroids"]
            facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            state = FitState(centroids, *(int(facts[field.name]) for field in fields(FitState)[1:]))
        except (SafetensorError, ValueError, KeyError):
            return None
        return state if facts == self._facts(state) else None

    def write(self, state: FitState) -> None:
        """Write the state, whole or not at all.

        Raises:
            ArtifactError: the run folder cannot be written.
        """
        centroids = np.ascontiguousarray(state.centroids)
        self._run_folder.write_bytes(self._name, safetensors.numpy.save({"centroids": centroids}, self._facts(state)))

    def _facts(self, state: FitState) -> dict[str, str]:
        """Return the metadata of a state's file, with a checksum of all that is in it."""
        counts = {field.name: str(value) for field, value in zip(fields(state), astuple(state), strict=True)}
        counts["centroids"] = hashlib.sha256(state.centroids.tobytes()).hexdigest()
        facts = {"made_of": self._made_of, **counts}
        return facts | {"sha256": hashlib.sha256(json.dumps(facts).encode()).hexdigest()}


def forget_passes(run_folder: Folder) -> None:
    """Delete the states of all groups, once their concepts are written."""
    run_folder.delete(_FOLDER)
