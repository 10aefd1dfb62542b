import os

import pyarrow.fs as pafs
import pytest

from transfgu_ray.errors import ArtifactError
from transfgu_ray.storage import Folder, resolve


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
