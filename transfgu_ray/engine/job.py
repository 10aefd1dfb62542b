"""The input of a piece of work: where it reads and writes, its settings, its resources and its progress."""

from dataclasses import dataclass, field

from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.storage import Folder


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work on a folder.

    Attributes:
        folder: read from and written to, laid out as a run folder.
        config: settings of the run.
        root: root of the dataset.
        resources: workers and devices.
        fingerprint: hash of everything that the results depend on; results with another fingerprint are made again.
        progress: counts the items done.
    """

    folder: Folder
    config: RunConfig
    root: Folder
    resources: Resources
    fingerprint: str
    progress: Progress = field(default_factory=Progress)
