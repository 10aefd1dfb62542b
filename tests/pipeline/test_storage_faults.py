"""Storage that fails during a run, and files that are damaged afterwards."""

import contextlib
import errno
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.train import ControllerError, WorkerGroupError

from tests.faults.storage import FaultyStore, NotPermitted, SmallDisk, flip_byte, s3_server, tmpfs, truncate
from tests.fixtures import TINY, Silent, make_run, open_run, transfgu
from transfgu_ray.engine.stream import unwrapped_errors
from transfgu_ray.errors import ArtifactError, ConfigError
from transfgu_ray.models.model import load_model
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.runs.index import part_name
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.storage import Folder
from transfgu_ray.tracking import runs as tracking

pytestmark = pytest.mark.ray


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file with a checksum, by name."""
    names = [name for stage in STAGES.lasting for name in json.loads((folder / f"{stage}.files.json").read_bytes())]
    return {name: (folder / name).read_bytes() for name in names}


def copy_of(run: Run, folder: Path) -> Run:
    return Run.open(str(shutil.copytree(run.folder.path, folder)), None)


DAMAGE = {
    "bit in a part of the bank": ("labels", "labels/part-000001.parquet", flip_byte),
    "half a part of the features": ("extract", "features/part-000002.parquet", truncate),
    "bit in the encoder": ("extract", "model/encoder.safetensors", flip_byte),
    "bit in the concepts": ("concepts", "concepts.parquet", flip_byte),
    "deleted decoder": ("train", "model/decoder.safetensors", Path.unlink),
    "half a history": ("train", "train/history.json", truncate),
    "bit in a sample": ("evaluate", "samples/00/bootstrapped.png", flip_byte),
    "bit in the counts": ("evaluate", "confusions/part-000000.parquet", flip_byte),
}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name", "damage"), DAMAGE.values(), ids=list(DAMAGE))
def test_damage__is_found_reported_and_only_damaged_files_are_rebuilt(
    finished: Run, tmp_path: Path, stage: str, name: str, damage: Callable[[Path], None]
) -> None:
    run, folder, reporter = copy_of(finished, tmp_path / "run"), tmp_path / "run", Silent()
    before = files_of(folder)
    manifests = {each: (folder / f"{each}.json").read_bytes() for each in STAGES.lasting}
    damage(folder / name)
    later = STAGES.lasting[STAGES.lasting.index(stage) + 1 :]
    with pytest.raises(ArtifactError, match=rf"run/{name}: not what stage {stage} wrote, .*; run `transfgu {stage} "):
        run_stages(run, later[:1], address=None, reporter=Silent())
    run_stages(run, STAGES.lasting, address=None, reporter=reporter)
    assert files_of(folder) == before
    assert list(reporter.done) == [stage]
    assert reporter.notes == [f"{stage}: {name}: damaged or deleted after writing; rebuilding"]
    mended = run.require(stage)
    assert (mended["damaged"], mended["same_again"]) == ([name], True)
    if "parts" in mended and name.endswith(".parquet"):
        assert mended["parts_resumed"] == mended["parts"] - 1
    if stage == "train":
        assert mended["epochs"] == 2
    assert {each: (folder / f"{each}.json").read_bytes() for each in STAGES.lasting if each != stage} == {
        each: content for each, content in manifests.items() if each != stage
    }
    quiet = Silent()
    run_stages(run, STAGES.lasting, address=None, reporter=quiet)
    assert (quiet.done, quiet.notes) == ({}, [])


def remake_elsewhere(run: Run, stage: str, name: str) -> None:
    """Damage a file in a stage that another machine made, whose rounding differs: here it gets other bytes."""
    folder = Path(run.folder.path)
    content = (folder / name).read_bytes()
    flip_byte(folder / name)
    index = folder / name.partition("/")[0] / "_index/index.parquet"
    if index.is_file():
        table = pq.read_table(index)
        hashes = [hashlib.sha256((folder / part_name("labels", part)).read_bytes()).hexdigest() for part in range(3)]
        at = table.schema.get_field_index("sha256")
        pq.write_table(table.set_column(at, table.schema.field(at), pa.array(hashes)), index)
    manifest = run.require(stage)
    # Whatever was made of the stage was made of these bytes.
    run.write_manifest(stage, manifest["fingerprint"], {})
    there = run.require(stage)["files_sha256"]
    for later in filter(run.manifest, STAGES.after(stage)):
        of_later = run.require(later)
        of_later["made_of"] = of_later.get("made_of", {}) | {stage: there}
        run.folder.write_json(f"{later}.json", of_later)
    (folder / name).write_bytes(content[:-1])


@pytest.mark.slow
def test_damage__rebuilt_with_other_bytes_keeps_what_was_made_of_the_former_until_it_may_be_overwritten(
    finished: Run, tmp_path: Path
) -> None:
    run, folder, reporter = copy_of(finished, tmp_path / "run"), tmp_path / "run", Silent()
    before = files_of(folder)
    remake_elsewhere(run, "concepts", "concepts.parquet")
    question = (
        r"^stage labels of \S+ was made of other files than stage concepts has since it was made again; everything is "
        r"kept .* `transfgu run \S+ --overwrite`, or restore concepts\.json, concepts\.files\.json and the files"
    )
    for _ in range(2):
        with pytest.raises(ArtifactError, match=question):
            run_stages(run, STAGES.lasting, address=None, reporter=reporter)
    assert list(reporter.done) == ["concepts"]
    assert reporter.notes[1:] == ["concepts: rebuilt with other content than before"]
    assert files_of(folder) == before
    load_model(Folder(run.folder.uri_of("model"))).segment([Image.new("RGB", (64, 64))])
    with pytest.raises(ArtifactError, match=r"^stage labels .* `transfgu labels \S+ --overwrite`"):
        run_stages(run, ("evaluate",), address=None, reporter=reporter, overwrite=True)
    run_stages(run, STAGES.lasting, address=None, reporter=reporter, overwrite=True)
    assert list(reporter.done) == list(STAGES.lasting[1:])
    quiet = Silent()
    run_stages(run, STAGES.lasting, address=None, reporter=quiet)
    assert (quiet.done, quiet.notes) == ({}, [])
    after = files_of(folder)
    # The page reports the rebuilt files.
    assert {name for name in before if before[name] != after[name]} <= {"report.html"}


@pytest.mark.slow
def test_damage__rebuilt_with_other_bytes_in_one_call_with_overwrite(finished: Run, tmp_path: Path) -> None:
    run, reporter = copy_of(finished, tmp_path / "run"), Silent()
    remake_elsewhere(run, "labels", "labels/part-000001.parquet")
    run_stages(run, STAGES.lasting, address=None, reporter=reporter, overwrite=True)
    assert list(reporter.done) == list(STAGES.lasting[2:])
    assert run.require("labels")["same_again"] is False


def test_damage__rebuilt_with_other_bytes_is_resolved_by_a_copy_of_the_former(finished: Run, tmp_path: Path) -> None:
    run, folder, reporter = copy_of(finished, tmp_path / "run"), tmp_path / "run", Silent()
    names = ("concepts.json", "concepts.files.json", "concepts.parquet")
    kept = {name: (folder / name).read_bytes() for name in names}
    flip_byte(folder / "concepts.parquet")
    run.write_manifest("concepts", run.require("concepts")["fingerprint"], {})
    with pytest.raises(ArtifactError, match=r"stage labels .* other files than stage concepts"):
        run_stages(run, STAGES.lasting, address=None, reporter=reporter)
    for name, content in kept.items():
        run.folder.write_bytes(name, content)
    run_stages(run, STAGES.lasting, address=None, reporter=reporter)
    assert (reporter.done, reporter.notes) == ({}, [])


def test_damage__to_a_record_is_undone_but_with_a_file_makes_the_stage_run_again(finished: Run, tmp_path: Path) -> None:
    run, folder, reporter = copy_of(finished, tmp_path / "run"), tmp_path / "run", Silent()
    record = (folder / "labels.files.json").read_bytes()
    flip_byte(folder / "labels.files.json")
    run_stages(run, STAGES.lasting, address=None, reporter=reporter)
    assert (reporter.done, reporter.notes) == ({}, [])
    assert (folder / "labels.files.json").read_bytes() == record
    (folder / "labels.files.json").unlink()
    flip_byte(folder / "labels/part-000000.parquet")
    run_stages(run, STAGES.lasting, address=None, reporter=reporter)
    assert list(reporter.done) == ["labels"]
    assert reporter.notes == [
        "labels: labels.files.json and 4 more files: damaged or deleted after writing; rebuilding"
    ]
    assert (folder / "labels.files.json").read_bytes() == record
    assert run.require("labels")["parts_resumed"] == 0


@pytest.mark.slow
def test_damage__a_kill_during_the_rebuild_is_repaired_too(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder, name = copy_of(finished, tmp_path / "run"), tmp_path / "run", "labels/part-000001.parquet"
    before = files_of(folder)
    for steps in range(2):
        flip_byte(folder / name)
        removed, delete = iter(range(steps)), run.folder.delete

        def die(each: str, removed: Iterator[int] = removed, delete: Callable[[str], None] = delete) -> None:
            if next(removed, None) is None:
                raise KeyboardInterrupt
            delete(each)

        with monkeypatch.context() as patch:
            patch.setattr(run.folder, "delete", die)
            with pytest.raises(KeyboardInterrupt):
                run.discard("labels", [name])
        run_stages(run, STAGES.lasting, address=None, reporter=Silent())
        assert files_of(folder) == before


def test_damage__runs_of_older_versions_are_left_alone(finished: Run, tmp_path: Path) -> None:
    run, folder, reporter = copy_of(finished, tmp_path / "run"), tmp_path / "run", Silent()
    for stage in STAGES.lasting:
        manifest = run.require(stage)
        del manifest["files_sha256"], manifest["made_of"]
        (folder / f"{stage}.json").write_text(json.dumps(manifest))
        (folder / f"{stage}.files.json").unlink()
    run_stages(run, STAGES.lasting, address=None, reporter=reporter)
    assert (reporter.done, reporter.notes) == ({}, [])


FIRST_FOUR = ("extract", "concepts", "labels", "train")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, voc: Path, local_ray: None) -> Run:
    """A run without faults."""
    return make_run(tmp_path_factory.mktemp("trained") / "run", voc, stages=FIRST_FOUR, dataset="voc")


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    with contextlib.ExitStack() as stack:
        try:
            mounted = stack.enter_context(tmpfs("16m"))
        except NotPermitted as reason:
            pytest.skip(str(reason))
        yield mounted


def outputs(folder: Path) -> dict[str, bytes]:
    """Return the files of the first four stages, by name."""
    names = [name for stage in FIRST_FOUR for name in json.loads((folder / f"{stage}.files.json").read_bytes())]
    return {name: (folder / name).read_bytes() for name in names}


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def nearly_full(disk: SmallDisk, voc: Path, finished_before: tuple[str, ...], kilobytes_left: int) -> Path:
    """A run folder with the earlier stages, on a disk with little space left."""
    folder = disk.path / "run"
    if finished_before:
        make_run(folder, voc, stages=finished_before, dataset="voc")
    disk.remount(f"size={(disk.used_bytes() >> 10) + kilobytes_left}k")
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("finished_before", "kilobytes_left"),
    [((), 8), (FIRST_FOUR[:2], 4), (FIRST_FOUR[:3], 24), (FIRST_FOUR[:3], 200)],
    ids=["extract", "labels", "first checkpoint", "train"],
)
def test_full_disk__ends_in_a_message_and_with_space_resumes_to_the_same_bytes(
    trained: Run, voc: Path, disk: SmallDisk, finished_before: tuple[str, ...], kilobytes_left: int
) -> None:
    folder = nearly_full(disk, voc, finished_before, kilobytes_left)
    with pytest.raises(ArtifactError, match=r"cannot (be )?writ.*No space left on device; choose a writable folder"):
        make_run(folder, voc, stages=FIRST_FOUR, dataset="voc")
    assert not half_written(folder)
    disk.remount("size=16m")
    make_run(folder, voc, stages=FIRST_FOUR, dataset="voc")
    assert outputs(folder) == outputs(Path(trained.folder.path))
    assert not half_written(folder)


@pytest.mark.long
@pytest.mark.parametrize("finished_before", [(), FIRST_FOUR[:3]], ids=["extract", "train"])
def test_read_only_disk__ends_in_a_message(
    trained: Run, voc: Path, disk: SmallDisk, finished_before: tuple[str, ...]
) -> None:
    folder = disk.path / "run"
    open_run(folder, voc, dataset="voc")
    if finished_before:
        make_run(folder, voc, stages=finished_before, dataset="voc")
    disk.remount("ro")
    with pytest.raises(ArtifactError, match=r"cannot (be )?writ.*Read-only file system.*; choose a writable folder"):
        make_run(folder, voc, stages=FIRST_FOUR, dataset="voc")
    disk.remount("rw")
    make_run(folder, voc, stages=FIRST_FOUR, dataset="voc")
    assert outputs(folder) == outputs(Path(trained.folder.path))


@pytest.mark.long
@pytest.mark.parametrize(
    ("finished_before", "kilobytes_left"),
    [((), 8), (FIRST_FOUR[:2], 4), (FIRST_FOUR[:3], 24)],
    ids=["extract", "labels", "train"],
)
def test_full_disk__the_command_says_so_and_exits_with_2(
    trained: Run, voc: Path, disk: SmallDisk, finished_before: tuple[str, ...], kilobytes_left: int
) -> None:
    folder = nearly_full(disk, voc, finished_before, kilobytes_left)
    settings = [part for setting in TINY for part in ("--set", setting)]
    stage = FIRST_FOUR[len(finished_before)]
    process = transfgu(
        *(stage, str(folder), "--preset", "tiny_cpu", "--dataset", "voc", "--data", str(voc), *settings, "--quiet")
    )
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 2, said
    assert said.startswith("transfgu: "), said
    assert said.count("\n") == 1, said
    assert said.endswith("No space left on device; choose a writable folder with free space\n"), said
    assert not half_written(disk.path)


@pytest.mark.parametrize("kilobytes", [300, 1000])
def test_full_disk__mlflow_failure_is_a_message_and_its_store_is_whole_or_absent(
    voc: Path, disk: SmallDisk, kilobytes: int
) -> None:
    run = open_run(disk.path / "run", voc, dataset="voc")
    disk.remount(f"size={kilobytes}k")
    with pytest.raises(ConfigError, match=r"tracking URI sqlite.*mlflow\.db cannot be used: .*disk is full"):
        tracking.begin(run.folder, run.config)
    assert [path.name for path in disk.path.iterdir()] == ["run"]
    disk.remount("size=16m")
    assert tracking.begin(run.folder, run.config) == tracking.begin(run.folder, run.config)


def test_training_errors__are_reported_as_the_storage_failure_behind_them() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (WorkerGroupError("words", {0: full}), ControllerError(full)):
        with pytest.raises(ArtifactError, match=r"the storage cannot be written: .*No space left"), unwrapped_errors():
            raise error
    with pytest.raises(WorkerGroupError), unwrapped_errors():
        raise WorkerGroupError("words", {0: ValueError("of the loop")})


@pytest.fixture(scope="module")
def store() -> Iterator[FaultyStore]:
    pytest.importorskip("moto", reason="moto, of the extra `test`, is not installed")
    with s3_server() as server:
        yield server


def on_store(store: FaultyStore, tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Return the exit code and output of `transfgu run s3://bucket/run`."""
    settings = [part for setting in TINY for part in ("--set", setting)]
    process = transfgu(
        *("run", "s3://bucket/run", "--preset", "tiny_cpu", "--dataset", "voc", *settings, *arguments, "--quiet"),
        *("--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"),
        env=store.env,
    )
    said, _ = process.communicate(timeout=500)
    return process.returncode, said


def assert_sentence(code: int, said: str) -> None:
    # Arrow's own warnings may come before it, and where the log is after it.
    *_, last = [line for line in said.splitlines() if not line.startswith("transfgu: the log has more")]
    assert code == 2, said
    assert re.match(r"transfgu: .*AWS Error.*; the same command goes on once", last), said
    assert "Traceback" not in said


def put(store: FaultyStore, data: Path) -> None:
    fs = store.open()
    for path in data.rglob("*"):
        if path.is_file():
            with fs.open_output_stream(f"bucket/photos/{path.relative_to(data)}") as stream:
                stream.write(path.read_bytes())


@pytest.mark.long
def test_object_store__photographs_and_run_behind_faults_give_the_local_bytes(
    trained: Run, voc: Path, store: FaultyStore, tmp_path: Path
) -> None:
    put(store, voc)
    store.set_faults(share=0.1, seed=3, stall_s=5)
    code, said = on_store(store, tmp_path, "--data", "s3://bucket/photos")
    store.set_faults(share=0)
    assert code == 0, said
    assert store.count_faults() > 20
    found, expected = store.files("bucket"), outputs(Path(trained.folder.path))
    for name, content in expected.items():
        if name.startswith("labels/"):
            # They hold the path of the photograph.
            one, other = (pq.read_table(pa.BufferReader(each)) for each in (found[f"run/{name}"], content))
            assert one.drop_columns("path").equals(other.drop_columns("path"))
        else:
            assert found[f"run/{name}"] == content, name


@pytest.mark.long
def test_object_store__an_outage_ends_in_a_message_and_the_run_resumes_after_it(
    trained: Run, voc: Path, store: FaultyStore, tmp_path: Path
) -> None:
    store.open().delete_dir_contents("bucket")
    data = ("--data", str(voc))
    store.set_faults(share=1)
    began = time.monotonic()
    code, said = on_store(store, tmp_path, *data)
    assert_sentence(code, said)
    # A minute of trying again, and the start of the command.
    assert time.monotonic() - began < 180
    store.set_faults(share=0)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(on_store, store, tmp_path, *data)
        while not any(name.startswith("run/labels/") for name in store.files("bucket")):
            assert not call.done(), call.result()
            time.sleep(0.2)
        store.set_faults(share=1)
        code, said = call.result()
    assert_sentence(code, said)
    store.set_faults(share=0)
    code, said = on_store(store, tmp_path, *data)
    assert code == 0, said
    found = store.files("bucket")
    assert {name: found[f"run/{name}"] for name in outputs(Path(trained.folder.path))} == outputs(
        Path(trained.folder.path)
    )
