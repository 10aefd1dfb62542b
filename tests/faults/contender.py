"""A process that tries to lock a folder at given moments: `python -m tests.faults.contender URI`.

Each line of its input is a moment of the monotonic clock, followed by a line once it may leave. It answers `in` or
`refused`, then `left`.
"""

import sys
import time

from transfgu_ray.errors import ArtifactError
from transfgu_ray.runs.lock import locked
from transfgu_ray.storage import Folder

# Sleeping wakes up too late to begin at the same moment as another process.
_SPIN_S = 0.005


def main(uri: str) -> None:
    folder = Folder(uri)
    _say("ready")
    for line in sys.stdin:
        moment = float(line)
        time.sleep(max(0.0, moment - time.monotonic() - _SPIN_S))
        while time.monotonic() < moment:
            pass
        try:
            with locked(folder):
                _say("in")
                sys.stdin.readline()
        except ArtifactError:
            _say("refused")
            sys.stdin.readline()
        _say("left")


def _say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
