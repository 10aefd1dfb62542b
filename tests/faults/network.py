"""A separate network for clusters of several nodes."""

import os
import subprocess
import sys

_INSIDE = "TRANSFGU_FAULTS_INSIDE"


def in_own_network(module: str) -> None:
    """Restart this program on a separate loopback network, where the system allows that.

    The nodes of a cluster have different addresses, and Ray then listens on every network of the machine.

    Args:
        module: what `python -m` runs.
    """
    if _INSIDE in os.environ:
        return
    os.environ[_INSIDE] = "1"
    # Separate mounts too, for small disks.
    spaces = ["--net", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    command = ["unshare", *spaces, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        is_allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except OSError:
        is_allowed = False
    if not is_allowed:
        sys.stderr.write(
            "a separate network is not permitted: Ray listens on all networks of this machine, with a token\n"
        )
    program = [*(command if is_allowed else []), sys.executable, "-m", module, *sys.argv[1:]]
    os.execvp(program[0], program)
