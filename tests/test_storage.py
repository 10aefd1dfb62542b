import errno
import json
import logging
import os
import random
import re
import time
from collections import Counter

import aiohttp
import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.faults.storage import s3_server
from transfgu_ray import storage
from transfgu_ray.errors import ArtifactError, CredentialsError, StorageError
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


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(storage, "LONGEST_WAIT_S", 0.002)


class Stuttering(pafs.LocalFileSystem):
    """A disk whose every operation fails with `error` the first `times` times."""

    def plan(self, error, times):
        self.error, self.times, self.calls = error, times, Counter()
        return self

    def _do(self, name, *given, **named):
        self.calls[name] += 1
        if self.calls[name] <= self.times:
            raise self.error
        return getattr(pafs.LocalFileSystem, name)(self, *given, **named)

    def get_file_info(self, *given, **named):
        return self._do("get_file_info", *given, **named)

    def create_dir(self, *given, **named):
        return self._do("create_dir", *given, **named)

    def open_input_file(self, *given, **named):
        return self._do("open_input_file", *given, **named)

    def open_output_stream(self, *given, **named):
        return self._do("open_output_stream", *given, **named)

    def move(self, *given, **named):
        return self._do("move", *given, **named)

    def delete_file(self, *given, **named):
        return self._do("delete_file", *given, **named)


class Refused(Exception):
    """Like the errors of the libraries of stores, which are no OSErrors."""

    def __init__(self, status):
        super().__init__("refused")
        self.status_code = status


PASSING = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.ETIMEDOUT, "Connection timed out"),
    OSError(errno.EAGAIN, "Try again"),
    OSError(errno.ECONNRESET, "Connection reset by peer"),
    OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)"),
    pa.ArrowException("Unknown error: google::cloud::Status(UNKNOWN: try later)"),
    pa.ArrowCapacityError("google::cloud::Status(RESOURCE_EXHAUSTED: too many requests)"),
    OSError("When reading 'a': AWS Error UNKNOWN (HTTP status 429) during HeadObject operation: No response body."),
    OSError("GetProperties for 'a' failed. Azure Error: [ServerBusy] 503 The server is busy."),
    aiohttp.ClientConnectionError("Server disconnected"),
    TimeoutError("timed out"),
    Refused(503),
    Refused(408),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: repr(error)[:60])
def test_folder__every_operation_outlasts_an_error_that_passes(tmp_path, monkeypatch, quick, error):
    folder, other = Folder(str(tmp_path / "one")), Folder(str(tmp_path / "other"))

    def stutter():
        for each in (folder, other):
            monkeypatch.setattr(each, "fs", Stuttering().plan(error, times=2))

    def check(call, expected):
        stutter()
        assert call() == expected

    check(lambda: folder.write_json("a", {"b": 1}), None)
    content = (tmp_path / "one" / "a").read_bytes()
    assert json.loads(content) == {"b": 1}
    check(lambda: folder.exists("a"), True)
    check(lambda: folder.is_file("a"), True)
    check(lambda: list(folder.files()), [("a", len(content))])
    check(lambda: folder.read("a", lambda file: file.read()), content)
    check(lambda: folder.read_json("a"), {"b": 1})
    check(lambda: folder.try_read("a"), (content, None))
    check(lambda: other.copy_from(folder, "a"), None)
    check(lambda: other.read_bytes("a"), content)
    check(lambda: folder.delete("a"), None)
    assert os.listdir(tmp_path / "one") == []
    assert os.listdir(tmp_path / "other") == ["a"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "No such file or directory"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "Not a directory"),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), "Is a directory"),
        (OSError("Cannot open for reading: path 'a' is a directory"), "Cannot open for reading: path 'a' is a dir"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "File name too long"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links"), "Too many levels of symbolic links"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (PermissionError("Forbidden"), "Forbidden"),
        (OSError("When reading 'a': AWS Error ACCESS_DENIED during HeadObject operation: No"), "When reading 'a': AWS"),
        (OSError("When reading 'a': AWS Error UNKNOWN (HTTP status 403) during GetObject"), "When reading 'a': AWS"),
        (OSError("Opening 'a' failed. Azure Error: [AuthorizationFailure] 403 Not"), "Opening 'a' failed. Azure"),
        (Refused(404), "refused"),
        (Refused(401), "refused"),
    ],
)
def test_try_read__an_answer_is_not_asked_for_again(tmp_path, monkeypatch, error, reason):
    folder = Folder(str(tmp_path))
    monkeypatch.setattr(folder, "fs", Stuttering().plan(error, times=9))
    data, said = folder.try_read("a")
    assert data is None
    assert said.startswith(f"cannot be read: {reason}")
    assert folder.fs.calls["open_input_file"] == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_write_bytes__a_full_or_read_only_disk_is_told_at_once(tmp_path, monkeypatch, number):
    folder = Folder(str(tmp_path))
    monkeypatch.setattr(folder, "fs", Stuttering().plan(OSError(number, os.strerror(number)), times=9))
    with pytest.raises(ArtifactError, match=rf"cannot write .*/a: {os.strerror(number)}; choose a writable folder"):
        folder.write_bytes("a", b"1")
    assert folder.fs.calls["create_dir"] == 1


def test_folder__a_lasting_failure_is_told_with_its_file_after_bounded_time(tmp_path, monkeypatch, quick, caplog):
    monkeypatch.setattr(storage, "RETRY_S", 0.4)
    folder = Folder(str(tmp_path))
    monkeypatch.setattr(folder, "fs", Stuttering().plan(OSError(errno.EIO, "Input/output error"), times=10**9))
    sentence = rf"the storage does not answer: {tmp_path}/a: Input/output error; the same command goes on once it does"
    with caplog.at_level(logging.WARNING, "transfgu_ray"):
        for call in (folder.try_read, folder.exists, folder.delete, lambda name: folder.write_bytes(name, b"1")):
            caplog.clear()
            with pytest.raises(StorageError, match=sentence):
                call("a")
            (record,) = caplog.records
            assert record.getMessage() == f"{tmp_path}/a: Input/output error; trying again for up to 0 s"
    assert folder.fs.calls["open_input_file"] > 2


def test_folder_once__does_not_try_again(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    monkeypatch.setattr(folder, "fs", Stuttering().plan(OSError(errno.EIO, "Input/output error"), times=1))
    with pytest.raises(StorageError, match="the storage does not answer"):
        folder.once().read_bytes("a")
    assert folder.fs.calls["open_input_file"] == 1


def test_patiently__time_counts_not_attempts(monkeypatch, quick):
    monkeypatch.setattr(storage, "RETRY_S", 0.05)
    attempts = []

    def slow():
        # Like pyarrow, which asks S3 again for seconds before it gives up.
        attempts.append(1)
        time.sleep(0.06)
        raise OSError("AWS Error SLOW_DOWN")

    with pytest.raises(StorageError, match="the storage does not answer: a: AWS Error SLOW_DOWN"):
        storage.patiently(slow, "a")
    assert len(attempts) == 1


def test_read__damaged_content_is_no_failure_of_the_storage(tmp_path, caplog):
    folder, reads = Folder(str(tmp_path)), []
    pq.write_table(pa.table({"a": list(range(9))}), tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    # The first bytes of the footer: pyarrow reports them as an OSError without a number.
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[footer : footer + 20] = b"\xff" * 20
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(OSError, match="thrift"):
        pq.read_metadata(pa.BufferReader(bytes(data)))

    def reader(file):
        reads.append(file)
        return pq.read_metadata(file)

    with pytest.raises(pa.ArrowInvalid, match="thrift"):
        folder.read("a", reader)
    assert len(reads) == 2
    assert not caplog.records


class StutteringStore(MemoryFileSystem):
    """A store of fsspec that fails now and then."""

    protocol = "stuttering"
    cachable = False
    store, pseudo_dirs = {}, [""]
    rng = random.Random(0)

    def _fail(self):
        if self.rng.random() < 0.25:
            raise aiohttp.ClientConnectionError("Server disconnected")

    def info(self, path, **named):
        self._fail()
        return super().info(path, **named)

    def ls(self, path, detail=True, **named):
        self._fail()
        return super().ls(path, detail, **named)


def test_fsspec__an_error_of_the_store_is_no_missing_file(quick):
    fsspec.register_implementation("stuttering", StutteringStore, clobber=True)
    folder = Folder("stuttering://run")
    names = ["a", "b/c", "b/d"]
    for name in names:
        folder.write_bytes(name, name.encode())
    for _ in range(3):
        assert [folder.try_read(name) for name in names] == [(name.encode(), None) for name in names]
        assert [name for name, _ in folder.files(recursive=True)] == names
        assert [name for name, _ in folder.files()] == ["a"]
        assert folder.exists("b")
    folder.delete("a")
    assert [name for name, _ in folder.files(recursive=True)] == names[1:]


STORE_IS_DOWN = OSError("When reading key 'a': AWS Error SLOW_DOWN during GetObject operation: reduce\nyour rate")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (STORE_IS_DOWN, r"^the storage does not answer: .*SLOW_DOWN.*reduce; the same command goes on once it does$"),
        (OSError(errno.ENOSPC, "No space left on device"), "^the storage cannot be written: .*No space left"),
        (OSError(errno.EROFS, "Read-only file system"), "^the storage cannot be written: .*Read-only.*; choose"),
        (OSError(errno.EIO, "Input/output error"), "^the storage does not answer: Input/output error; the same"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "^the storage refuses: .*denied: 'a'; check perm"),
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
    monkeypatch.setattr(storage, "RETRY_S", 0.0)
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


@pytest.mark.parametrize("answer", ["403 AccessDenied", "403 InvalidAccessKeyId", "401 Unauthorized", "404 NoSuchKey"])
def test_object_store__missing_or_forbidden_is_told_at_once(store, on_store, caplog, answer):
    on_store.write_bytes("a", b"1")
    store.set_faults(share=1, answer=answer)
    data, reason = on_store.try_read("a")
    assert data is None
    assert reason.startswith("cannot be read: ")
    with pytest.raises(ArtifactError, match=r"cannot write bucket/run/a: .*; choose a writable folder"):
        on_store.write_bytes("a", b"2")
    assert not caplog.records
    store.set_faults(share=0)
    assert on_store.read_bytes("a") == b"1"


@pytest.mark.parametrize("answer", ["400 ExpiredToken", "400 TokenRefreshRequired", "400 InvalidToken"])
def test_object_store__credentials_that_expired_refuse_no_file_and_are_told_at_once(store, on_store, caplog, answer):
    on_store.write_bytes("a", b"1")
    store.set_faults(share=1, answer=answer)
    words = "the storage takes no request with these credentials: .*AWS Error UNKNOWN .*; renew them if they"
    for call in (
        lambda: on_store.try_read("a"),
        lambda: on_store.exists("a"),
        lambda: on_store.write_bytes("a", b"2"),
        lambda: list(on_store.files("none", recursive=True)),
        lambda: on_store.patiently("", lambda: on_store.fs.get_file_info(pafs.FileSelector(on_store.path))),
    ):
        with pytest.raises(CredentialsError, match=words):
            call()
    assert not caplog.records
    store.set_faults(share=0)
    assert on_store.read_bytes("a") == b"1"


def test_object_store__credentials_that_expired_while_a_file_is_read(store, on_store):
    on_store.write_bytes("a", b"1")

    def expired(file):
        store.set_faults(share=1, answer="400 ExpiredToken")
        return file.read()

    with pytest.raises(CredentialsError, match="the storage takes no request with these credentials"):
        on_store.read("a", expired)


@pytest.mark.parametrize("status", [400, 403])
def test_storage_failure__a_listing_names_credentials_that_expired(status):
    of_listing = f"AWS Error UNKNOWN (HTTP status {status}) during ListObjectsV2 operation"
    error = OSError(f"When listing: {of_listing}: Unable to parse ExceptionName: ExpiredToken Message: The provided")
    assert isinstance(storage_failure(error), CredentialsError)
    attempts = []

    def refused():
        attempts.append(1)
        raise error

    with pytest.raises(CredentialsError, match="ExpiredToken Message: The provided; renew them"):
        storage.patiently(refused, "a")
    assert len(attempts) == 1


def test_object_store__one_that_does_not_answer_is_told_in_bounded_time(store, on_store, monkeypatch):
    store.set_faults(share=1)
    monkeypatch.setattr(storage, "RETRY_S", 0.5)
    began = time.monotonic()
    words = r"the storage does not answer: s3://bucket/run/{}: .*AWS Error.*; the same command goes on once it does"
    with pytest.raises(StorageError, match=words.format("a")):
        on_store.write_bytes("a", b"1")
    with pytest.raises(StorageError, match=words.format("config.yaml")):
        Run.stored_config("s3://bucket/run")
    assert time.monotonic() - began < 60


@pytest.mark.reports
def test_write_bytes__names_as_long_as_a_file_system_allows(tmp_path):
    name = "é" * 125 + "a.jpg"
    assert len(name.encode()) == 255
    Folder(str(tmp_path)).write_bytes(name, b"x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_requests__an_object_is_written_and_a_folder_listed_by_one_each(monkeypatch):
    with s3_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        folder = Folder("s3://bucket/run")

        def asked(action):
            before = len(server.requests())
            result = action()
            return result, server.requests()[before:]

        for name in ("a/b.json", "a/b c#.json"):
            assert asked(lambda name=name: folder.write_bytes(name, b"x" * 1000))[1] == [f"PUT /bucket/run/{name}"]
        assert len(asked(lambda: list(folder.files("a")))[1]) == 1
        assert list(folder.files()) == []
        assert list(folder.files(recursive=True)) == [("a/b c#.json", 1000), ("a/b.json", 1000)]
        assert list(folder.files("a/b.json")) == [("a/b.json", 1000)]
        assert list(folder.files("nothing")) == []
        assert folder.read_bytes("a/b.json") == b"x" * 1000
        # Too large for one request.
        folder.write_bytes("large", bytes(12_000_000))
        assert folder.read_bytes("large") == bytes(12_000_000)


def test_folder__opens_a_store_once_per_process_and_settings(monkeypatch):
    with s3_server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        assert Folder("s3://bucket/run").fs is Folder("s3://bucket/run").fs
        before = Folder("s3://bucket/run").fs
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "renewed")
        assert Folder("s3://bucket/run").fs is not before
