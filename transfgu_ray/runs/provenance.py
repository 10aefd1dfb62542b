"""The provenance of a run: library versions and the commit."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

from transfgu_ray import __version__

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "ray",
    "numpy",
    "pyarrow",
    "pillow",
    "tifffile",
    "imagecodecs",
    "faiss-cpu",
)


@functools.cache
def library_versions() -> dict[str, str]:
    """Return the versions of this package, Python and the libraries that determine results."""
    versions = {"transfgu_ray": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(folder: Path = Path(__file__).parents[2]) -> str | None:
    """Return the commit of a checkout, by default this package's, `-dirty` if changed; None if it is no checkout."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)  # nosec B603  # fixed arguments
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
