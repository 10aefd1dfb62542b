"""What made a run: library versions and the commit."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from transfgu_ray import __version__

_PACKAGES = ("torch", "torchvision", "timm", "ray", "numpy", "pyarrow", "pillow", "faiss-cpu")


def library_versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide results."""
    versions = {"transfgu_ray": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(folder: Path = Path(__file__).parents[2]) -> str | None:
    """Commit of a checkout, by default that of this package, `-dirty` with changes; None where there is no checkout."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)  # nosec B603  # words of our own
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
