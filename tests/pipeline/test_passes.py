"""What is shown of a clustering adds up, whoever tells of its passes and in what order; what is kept comes back."""

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from transfgu_ray.algorithms.concepts.sharded_kmeans import FitState
from transfgu_ray.engine.progress import Progress
from transfgu_ray.pipeline.passes import PassFile, ShownPasses, forget_passes
from transfgu_ray.storage import Folder


class Kept(Progress):
    """Keeps all that was said."""

    def __init__(self) -> None:
        self.total, self.said = 0, []

    def expect(self, total: int) -> None:
        self.total = total

    def __call__(self, done: int = 0, words: str = "", *, refused: int = 0) -> None:
        self.said.append((done, words))


@pytest.fixture
def kept() -> Kept:
    return Kept()


def test_shown_passes__worked_by_hand(kept: Kept) -> None:
    shown = ShownPasses(kept, ("foreground", "background"))
    shown.sign({})
    shown.expect({"foreground": 4, "background": 20})
    assert kept.total == 24
    # A worker's signs come at most every two seconds, and some passes go unseen.
    shown.sign({"group": 1, "number": 3, "most": 20})
    shown.sign({})
    shown.sign({"group": 1, "number": 9, "most": 20})
    shown.end("background")
    shown.begin("foreground")
    shown.sign({"number": 7, "most": 100})
    shown.reach(1, 4)
    shown.reach(2, 4)
    # Concepts were seeded anew, and passes begin again.
    shown.reach(1, 4)
    shown.reach(3, 4)
    shown.end("foreground")
    assert kept.said == [
        (0, ""),
        (3, "background: pass 3 of 20"),
        (0, "background: pass 3 of 20"),
        (6, "background: pass 9 of 20"),
        (11, "background: pass 9 of 20"),
        (0, "foreground: pass 7 of 100 over a sample"),
        (1, "foreground: pass 1 of 4"),
        (1, "foreground: pass 2 of 4"),
        (0, "foreground: pass 1 of 4"),
        (1, "foreground: pass 3 of 4"),
        (1, "foreground: pass 3 of 4"),
    ]


def test_shown_passes__a_single_group_needs_no_name(kept: Kept) -> None:
    shown = ShownPasses(kept, ("any",))
    shown.expect({"any": 20})
    shown.sign({"group": 0, "number": 7, "most": 20})
    # More than were planned, since starved concepts were seeded anew.
    shown.sign({"group": 0, "number": 33, "most": 40})
    shown.end("any")
    assert kept.said == [(7, "pass 7 of 20"), (13, "pass 33 of 40"), (0, "pass 33 of 40")]


STATE = FitState(np.arange(12, dtype=np.float32).reshape(3, 4) / 7, 5, 17, 2, 3, 4)


def test_pass_file__a_state_comes_back_and_goes(tmp_path: Path) -> None:
    run = Folder(str(tmp_path))
    passes = PassFile(run, "background", "these crops")
    assert passes.read() is None
    passes.write(FitState(np.zeros((3, 4), np.float32)))
    passes.write(STATE)
    found = passes.read()
    assert np.array_equal(found.centroids, STATE.centroids)
    assert astuple(found)[1:] == (5, 17, 2, 3, 4)
    assert PassFile(run, "foreground", "these crops").read() is None
    assert [path.name for path in (tmp_path / "concepts").iterdir()] == ["passes-background.safetensors"]
    forget_passes(run)
    assert passes.read() is None
    forget_passes(run)


def test_pass_file__of_other_crops_is_none_and_is_replaced(tmp_path: Path) -> None:
    run = Folder(str(tmp_path))
    PassFile(run, "any", "other crops").write(STATE)
    passes = PassFile(run, "any", "these crops")
    assert passes.read() is None
    passes.write(STATE)
    assert astuple(passes.read())[1:] == (5, 17, 2, 3, 4)


def test_pass_file__a_damaged_one_is_none(tmp_path: Path) -> None:
    run = Folder(str(tmp_path))
    passes = PassFile(run, "any", "these crops")
    passes.write(STATE)
    path = tmp_path / "concepts/passes-any.safetensors"
    whole = path.read_bytes()
    # Cut short, and with any single byte changed: of the header, a centroid, or a count.
    for length in (0, 7, 8, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert passes.read() is None
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert (found := passes.read()) is None or astuple(found)[1:] == (5, 17, 2, 3, 4)
        assert found is None or np.array_equal(found.centroids, STATE.centroids)
    path.write_bytes(whole)
    assert passes.read() is not None
