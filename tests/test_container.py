"""The whole demo as containers run it: a user without a name, HOME=/, nothing to write but one folder and TMPDIR."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.reports, pytest.mark.long]
UID = 12345
PROJECT = Path(__file__).resolve().parents[1]

# A folder that others may not enter is replaced, in this mount namespace, by one that holds only what Python needs.
_SCRIPT = """
set -e
if [ -n "$CLOSED" ]; then
    mount --bind "$CLOSED" /mnt
    mount -t tmpfs -o mode=755 tmpfs "$CLOSED"
    for needed in $NEEDED; do
        mkdir -p "$CLOSED/$needed"
        mount --bind "/mnt/$needed" "$CLOSED/$needed"
    done
fi
mount -t tmpfs -o "mode=700,uid=$AS,gid=$AS" tmpfs "$VOLUME"
mount -o remount,ro,bind /
cd /
exec setpriv --reuid="$AS" --regid="$AS" --clear-groups env -i HOME=/ PATH=/usr/bin:/bin PYTHONPATH="$PROJECT" \\
    TMPDIR="$VOLUME" "$PYTHON" -m transfgu_ray.cli demo "$VOLUME/data/run"
"""


def _closed(path: Path) -> Path | None:
    """Return the outermost folder above a path that others may not enter."""
    return next((each for each in reversed(path.parents) if not each.stat().st_mode & 0o001), None)


def _needed() -> tuple[Path | None, list[Path]]:
    """Return the closed folder, and what Python needs of it."""
    places = {Path(each).resolve() for each in (sys.prefix, sys.base_prefix, PROJECT)}
    closed = {folder for each in places if (folder := _closed(each))}
    if len(closed) > 1:
        pytest.skip("Python lies in several folders that other users may not enter")
    if not closed:
        return None, []
    (folder,) = closed
    return folder, [each.relative_to(folder) for each in places if each.is_relative_to(folder)]


def test_demo__as_a_nameless_user_of_a_read_only_container() -> None:
    if os.getuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("only root can make a mount namespace")
    volume = Path("/srv")
    closed, needed = _needed()
    process = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", _SCRIPT],
        env=os.environ
        | {
            "CLOSED": str(closed or ""),
            "NEEDED": " ".join(map(str, needed)),
            "AS": str(UID),
            "VOLUME": str(volume),
            "PROJECT": str(PROJECT),
            "PYTHON": sys.executable,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout
    assert "Traceback" not in process.stdout
    assert "mIoU" in process.stdout
