"""Faults that a run must survive: each disturbs a small real run on a real cluster, and the results are compared."""

from tests.faults import disks, frozen, locks, processes, services
from tests.faults.bench import TABLES, WORKERS, Fault
from transfgu_ray.runs.stages import STAGES


def _after(stage: str) -> str:
    return STAGES.lasting[STAGES.lasting.index(stage) + 1]


FAULTS: tuple[Fault | locks.Race, ...] = (
    *(Fault(f"driver killed in {stage}", stage, processes.driver_killed) for stage in WORKERS),
    *(Fault(f"worker killed in {stage}", stage, processes.worker_killed) for stage in WORKERS),
    Fault("worker killed after writing a part, extract", "extract", processes.dies_after_write),
    Fault("worker killed by Ray, out of memory, extract", "extract", processes.out_of_memory),
    *(Fault(f"node lost in {stage}", stage, processes.node_lost) for stage in WORKERS),
    Fault("node lost in train, none spare, replaced after 20 s (3 min scaled)", "train", processes.node_replaced(20)),
    Fault("node lost in train, none spare, replaced after 70 s (10 min scaled)", "train", processes.node_replaced(70)),
    Fault("five losses in train: node, worker, node, ...", "train", processes.lost_again_and_again),
    *(Fault(f"workers frozen in {stage}", stage, frozen.workers_frozen) for stage in ("extract", "train")),
    Fault("one worker frozen within a unit, extract", "extract", frozen.unit_frozen),
    Fault("clustering frozen in concepts", "concepts", frozen.clustering_frozen),
    Fault("training of a trial frozen in tune", "train", frozen.trial_frozen, compare=frozen.compare_sweeps),
    Fault("second run on the folder", "extract", locks.second_writer),
    locks.Race("two commands at once on a folder", 40, is_remote=False),
    locks.Race("two commands at once on a folder, object store", 8, is_remote=True),
    Fault("all file times a year ahead, driver killed in extract", "extract", locks.file_times_wrong(locks.YEAR_S)),
    Fault("all file times a year back, driver killed in labels", "labels", locks.file_times_wrong(-locks.YEAR_S)),
    Fault("time.time() of the driver an hour ahead, killed in extract", "extract", locks.clock_wrong(locks.HOUR_S)),
    *(Fault(f"part truncated, {stage}", stage, disks.part_truncated, begins=_after(stage)) for stage in TABLES),
    *(Fault(f"bit flipped, {stage}", stage, disks.part_flipped, begins=_after(stage)) for stage in TABLES),
    Fault("disk full", "labels", disks.disk_full),
    Fault("folder read-only", "labels", disks.read_only),
    Fault("disk away for 1 s in extract", "extract", disks.disk_away(1)),
    Fault("disk away for 30 s in extract", "extract", disks.disk_away(30)),
    Fault("disk away for 30 s in train", "train", disks.disk_away(30)),
    Fault("disk away in extract until the command gives up (5 min scaled)", "extract", disks.disk_away(None)),
    Fault("object store: 10 % of answers 500, 503 or late", "extract", disks.store_fails),
    Fault("object store away for 1 s in extract", "extract", disks.store_away(1)),
    Fault("object store away for 30 s in extract", "extract", disks.store_away(30)),
    Fault("object store away in extract until the command gives up (5 min scaled)", "extract", disks.store_away(None)),
    Fault("5 % hostile files", "extract", disks.hostile_corpus),
    Fault(
        "MLflow away for 1 min each in begin, extract, train, register", "train", services.mlflow_away, begins="extract"
    ),
    Fault("job stopped, submitted again", "extract", processes.job_stopped),
    Fault("head lost, job submitted again", "labels", processes.head_lost),
)
