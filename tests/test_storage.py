import errno
import os
import re
import time

import pyarrow.fs as pafs
import pytest

from tests.faults.storage import s3_server
from transfgu_ray.errors import ArtifactError
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder, resolve, storage_failure


@pytest.fixture(params=["path", "file", "fsspec+local", "memory"])
def folder(request, tmp_path):
    if request.param == "memory":
        folder = Folder(f"memory://{tmp_path.name}")
        yield folder
        folder.delete("")
    else:
        scheme = "" if request.param == "path" else f"{request.param}://"
        yield Folder(f"{scheme}{tmp_path}/run")


def test_folder__write_read_list_delete(folder):
    assert not folder.exists()
    assert list(folder.files(recursive=True)) == []
    folder.write_bytes("b/two.bin", b"22")
    folder.write_bytes("a.txt", b"1")
    assert list(folder.files(recursive=True)) == [("a.txt", 1), ("b/two.bin", 2)]
    assert list(folder.files()) == [("a.txt", 1)]
    assert list(folder.files("b")) == [("b/two.bin", 2)]
    assert folder.read_bytes("b/two.bin") == b"22"
    assert folder.is_file("a.txt")
    assert folder.exists("b")
    assert not folder.is_file("b")
    folder.delete("b")
    folder.delete("nothing")
    assert list(folder.files(recursive=True)) == [("a.txt", 1)]


def test_write_bytes__replaces_and_leaves_no_temporary_file(folder):
    folder.write_bytes("a/config.yaml", b"old and longer")
    folder.write_bytes("a/config.yaml", b"new")
    assert folder.read_bytes("a/config.yaml") == b"new"
    assert list(folder.files(recursive=True)) == [("a/config.yaml", 3)]


def test_write_bytes__old_content_survives_a_failed_write(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    folder.write_bytes("a.txt", b"old")

    class FullDisk(pafs.LocalFileSystem):
        def open_output_stream(self, path, **options):
            stream = super().open_output_stream(path, **options)
            stream.write(b"ne")
            stream.close()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "fs", FullDisk())
    with pytest.raises(ArtifactError, match=r"a\.txt: No space left on device; choose a writable folder"):
        folder.write_bytes("a.txt", b"new")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert folder.read_bytes("a.txt") == b"old"


def test_write_bytes__refuses_a_target_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    folder = Folder(str(tmp_path))
    with pytest.raises(ArtifactError, match=r"cannot write .*file/a\.txt: .*choose a writable folder with free space"):
        folder.write_bytes("file/a.txt", b"x")
    with pytest.raises(ArtifactError, match=r"cannot write .*folder: "):
        folder.write_bytes("folder", b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_folder__paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder("run").uri == Folder("~/run").uri == str(tmp_path / "run")
    assert Folder("run").uri_of("model/x") == str(tmp_path / "run/model/x")


@pytest.mark.parametrize("uri", ["nosuch://bucket/run", "fsspec+nosuch://run"])
def test_resolve__refuses_an_unknown_scheme(uri):
    with pytest.raises(ArtifactError, match=r"cannot open .*nosuch"):
        resolve(uri)


def test_resolve__refuses_a_store_whose_library_or_host_fails(monkeypatch):
    # As pyarrow does for hdfs:// without Java and for s3:// without a network.
    class Broken:
        @staticmethod
        def from_uri(uri):
            raise OSError("Unable to load libjvm\nand much more")

    monkeypatch.setattr(pafs, "FileSystem", Broken)
    with pytest.raises(ArtifactError, match=r"cannot open hdfs://name/run: Unable to load libjvm$"):
        resolve("hdfs://name/run")


def test_try_read__content_or_reason(tmp_path):
    folder = Folder(str(tmp_path))
    (tmp_path / "a").write_bytes(b"1")
    assert folder.try_read("a") == (b"1", None)
    data, reason = folder.try_read("b")
    assert data is None
    assert reason.startswith("cannot be read: ")


def test_try_read__passing_failures_are_tried_again(tmp_path, monkeypatch):
    folder, answers = Folder(str(tmp_path)), [OSError("busy"), OSError("busy"), b"1"]

    def read(name):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(folder, "read_bytes", read)
    assert folder.try_read("a") == (b"1", None)
    answers += [OSError("gone\nfor good")] * 3
    assert folder.try_read("a") == (None, "cannot be read: gone")


STORE_IS_DOWN = OSError("When reading key 'a': AWS Error SLOW_DOWN during GetObject operation: reduce\nyour rate")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (STORE_IS_DOWN, r"^the storage does not answer: .*SLOW_DOWN.*reduce; the same command goes on once it does$"),
        (OSError(errno.ENOSPC, "No space left on device"), "^the storage cannot be written: .*No space left"),
        (OSError(errno.EROFS, "Read-only file system"), "^the storage cannot be written: .*Read-only.*; choose"),
    ],
)
def test_storage_failure__is_told_in_a_sentence(error, words):
    failure = storage_failure(error)
    assert isinstance(failure, ArtifactError)
    assert re.search(words, str(failure))


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "gone"), OSError("not a Parquet file"), ValueError("AWS Error")]
)
def test_storage_failure__what_a_single_file_says_is_none(error):
    assert storage_failure(error) is None


def test_try_read__a_store_that_does_not_answer_is_no_fault_of_the_photograph(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))

    class Down(pafs.LocalFileSystem):
        def open_input_file(self, path):
            raise STORE_IS_DOWN

    monkeypatch.setattr(folder, "fs", Down())
    with pytest.raises(ArtifactError, match="the storage does not answer"):
        folder.try_read("a")


@pytest.fixture(scope="module")
def store():
    pytest.importorskip("moto", reason="moto, of the extra `test`, is not installed")
    with s3_server() as server:
        yield server


@pytest.fixture
def on_store(store, monkeypatch):
    for name, value in store.env.items():
        monkeypatch.setenv(name, value)
    yield Folder("s3://bucket/run")
    store.set_faults(share=0)


def test_object_store__passing_faults_are_not_noticed(store, on_store):
    store.set_faults(share=0.3, seed=1)
    before = store.count_faults()
    for i in range(8):
        on_store.write_bytes(f"features/part-{i}.parquet", bytes([i]) * 1000)
    assert [on_store.try_read(f"features/part-{i}.parquet") for i in range(8)] == [
        (bytes([i]) * 1000, None) for i in range(8)
    ]
    data, reason = on_store.try_read("none")
    assert data is None
    assert "No such file or directory" in reason
    assert list(on_store.files(recursive=True)) == [(f"features/part-{i}.parquet", 1000) for i in range(8)]
    on_store.delete("features/part-0.parquet")
    assert len(list(on_store.files("features"))) == 7
    on_store.delete("features")
    assert list(on_store.files(recursive=True)) == []
    assert store.count_faults() - before > 5


def test_object_store__reads_shorter_than_the_message_of_a_refusal_are_retried(store, on_store):
    # pyarrow itself does not retry them.
    on_store.write_bytes("a", b"ten bytes.")
    store.set_faults(share=0.25, seed=1)
    assert [on_store.read_bytes("a") for _ in range(10)] == [b"ten bytes."] * 10


def test_object_store__a_stalled_answer_is_retried(store, on_store):
    on_store.write_bytes("a", b"1")
    # The seed makes the first request wait.
    store.set_faults(share=0.5, seed=4, stall_s=20)
    began = time.monotonic()
    assert on_store.read_bytes("a") == b"1"
    assert 2 < time.monotonic() - began < 20


@pytest.mark.slow
def test_object_store__one_that_does_not_answer_is_told_in_bounded_time(store, on_store):
    store.set_faults(share=1)
    began = time.monotonic()
    with pytest.raises(ArtifactError, match=r"cannot write bucket/run/a: .*AWS Error.*; the same command goes on once"):
        on_store.write_bytes("a", b"1")
    with pytest.raises(ArtifactError, match=r"cannot open the run folder s3://bucket/run: .*AWS Error"):
        Run.stored_config("s3://bucket/run")
    assert time.monotonic() - began < 30
