"""What is shown of a clustering adds up, whoever tells of its passes and in what order."""

import pytest

from transfgu_ray.engine.progress import Progress
from transfgu_ray.pipeline.passes import ShownPasses


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
        (0, "foreground: first centroids, pass 7 of 100"),
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
