"""What a piece of work is told: where it reads and writes, by which settings, with what, and whom it reports to."""

from dataclasses import dataclass, field

from transfgu_ray.config.run import RunConfig
from transfgu_ray.engine.progress import Progress
from transfgu_ray.engine.session import Resources
from transfgu_ray.storage import Folder


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work on a folder.

    Attributes:
        folder: what it reads from and writes to, laid out as a run folder.
        config: settings of the run.
        root: root of the dataset.
        resources: workers and devices.
        fingerprint: hash of everything that the results depend on; what was made with another one is made again.
        progress: takes what was done.
    """

    folder: Folder
    config: RunConfig
    root: Folder
    resources: Resources
    fingerprint: str
    progress: Progress = field(default_factory=Progress)
