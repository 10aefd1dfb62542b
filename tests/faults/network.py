"""A network of one's own for clusters of several nodes."""

import os
import subprocess
import sys

_INSIDE = "TRANSFGU_FAULTS_INSIDE"


def in_own_network(module: str) -> None:
    """Starts this program again on a loopback network of its own, where the system allows that.

    The nodes of a cluster have addresses of their own, and then Ray listens on all there are.

    Args:
        module: what `python -m` runs.
    """
    if _INSIDE in os.environ:
        return
    os.environ[_INSIDE] = "1"
    # Mounts of its own too, for small disks.
    spaces = ["--net", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    command = ["unshare", *spaces, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        is_allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except OSError:
        is_allowed = False
    if not is_allowed:
        sys.stderr.write("no network of its own here: Ray listens on all of this machine's, with a token\n")
    program = [*(command if is_allowed else []), sys.executable, "-m", module, *sys.argv[1:]]
    os.execvp(program[0], program)
