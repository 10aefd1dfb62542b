"""What comes from untrusted files stays text and stays in its folder; what is secret is written nowhere."""

import contextlib
import io
import ipaddress
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from scipy.sparse import csr_array

from tests.builders import TINY_VIT, listed, make_folder, make_voc
from tests.fixtures import TINY
from transfgu_ray.algorithms.encoder.checkpoints import load_encoder, load_vit
from transfgu_ray.cli.terminal import Terminal
from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.config.sections import DataConfig
from transfgu_ray.errors import ArtifactError, ConfigError, WeightsError
from transfgu_ray.images import ImageRefused, decode_label, decode_rgb
from transfgu_ray.models.model import ModelConfig, save_decoder
from transfgu_ray.models.names import Names
from transfgu_ray.pretraining.copies import build_index, fetch_copies
from transfgu_ray.reports.comparison import comparison_markdown
from transfgu_ray.reports.run_page import write_report
from transfgu_ray.runs.run import Run
from transfgu_ray.serving.photographs import find_photographs
from transfgu_ray.serving.predict import output_stems
from transfgu_ray.storage import Folder, refuse_credentials
from transfgu_ray.tracking.client import registry_uri, tracking_uri

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'}};{{7*7}}</style><svg onload=alert(1)>")


class Elements(HTMLParser):
    """Which elements a page has, the names of their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = Counter(), set(), ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def reported(folder: Path, names: tuple[str, ...]) -> Elements:
    """The page of a run whose classes, photographs, reasons and run folder are named by others."""
    data = folder / "data"
    data.mkdir(parents=True)
    (data / "names.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(names)))
    settings = [*TINY, "data.dataset=paired", f"data.root={data}", "evaluate.baselines=[]"]
    settings.append(f"train.decoder_weights={json.dumps(f'/{names[0]}.pt')}")
    run_folder = folder / names[1].replace("/", "")
    run = Run.open(str(run_folder), build_config(get_preset("tiny_cpu"), None, settings))
    model = ModelConfig((8, 8), ("any",) * len(names), 1, 1, "float32", "")
    save_decoder(Folder(run.folder.uri_of("model")), {}, config=model)
    scored = {"miou": 0.5, "miou_interval": None, "pixel_accuracy": 0.5, "coverage": 1.0, "super": None}
    scored |= {"held_out": None, "photo_miou": {"mean": 0.5, "worst_decile": 0.5}}
    scored |= {"dead_concepts": [], "num_dead_concepts": 0}
    metrics = {
        "scored": True, "dataset": names[0], "split": names[1], "granularity": "fine", "protocol": names[2],
        "unmatched": "count", "num_images": 1, "num_classes": len(names), "num_concepts": len(names),
        "stages": dict.fromkeys(("initial", "trained", "bootstrapped"), scored), "refined": None,
        "baselines": {"raw_colour": scored},
        "per_class": [
            {"name": name, "kind": names[2], "iou": 0.5, "concepts": [i]} for i, name in enumerate(names)
        ],
    }  # fmt: skip
    run.folder.write_bytes("metrics.json", json.dumps(metrics).encode())
    run.folder.write_bytes("train/history.json", b"[]")
    refused = [{"image_id": f"{name}.jpg", "reason": f"damaged: {name}"} for name in names]
    shown = {"rows_in": 9, "rows_out": 9, "seconds": 1.0, "items_per_second": 1.0, "peak_memory_mb": 1}
    run.write_manifest("extract", "a", shown | {"refused": refused, "dropped": {names[0]: 1}})
    run.folder.write_bytes("model/names.yaml", Names(model.kinds, dict(enumerate(names))).dump())
    confusion = np.eye(len(names), dtype=np.int64).flatten() + 1
    assert write_report(run, csr_array(confusion[None]), [names[0]]) == 0
    return Elements((run_folder / "report.html").read_text())


def test_report__names_are_text(tmp_path: Path) -> None:
    hostile = reported(tmp_path / "hostile", HOSTILE)
    harmless = reported(tmp_path / "harmless", ("cat", "dog", "horse"))
    assert hostile.tags == harmless.tags
    assert hostile.attributes == harmless.attributes
    assert hostile.tags["img"] == 1, "the confusion matrix alone"
    assert "svg" not in hostile.tags
    for name in HOSTILE:
        # The class, its photograph and the reason.
        assert hostile.text.count(name) >= 4


def test_comparison_markdown__names_are_text() -> None:
    per_class = [{"name": f"{name} | x", "iou": 0.5} for name in HOSTILE]
    row = {
        "version": 1, "tagged_score": None, "score": 0.5, "miou": 0.5, "miou_interval": None, "pixel_accuracy": 0.5,
        "difference": None, "photos_per_second": 1.0, "megabytes": 1.0, "per_class": per_class, "weights_sha256": "",
    }  # fmt: skip
    comparison = {
        "versions": [row], "champion": None, "reference": 1, "scored": True, "num_probed": 1, "device": "cpu",
        "num_images": 1, "split": "val", "protocol": "transfgu", "unmatched": "count",
    }  # fmt: skip
    text = comparison_markdown(comparison)
    assert not Elements(text).tags
    assert {line.replace(r"\|", "").count("|") for line in text.splitlines() if "alert" in line} == {3}


def test_terminal__names_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(quiet=False)
    terminal.table([["[red]a[/red] \x1b]0;b\x07", "1"]], ["[bold]c", "d\x1b[2J"])
    terminal.note("e\x1b[2J [link=f]g")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    for text in ("[red]a[/red]", "[bold]c", "[link=f]g"):
        assert text in shown


OUT = ("../photo.jpg", "a/../../photo.jpg", "/etc/photo.jpg")


@pytest.mark.parametrize("name", OUT)
def test_folder__names_never_lead_out(name: str, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "run"))
    (tmp_path / "photo.jpg").write_bytes(b"kept")
    for act in (
        folder.join, folder.uri_of, folder.read_bytes, folder.exists, folder.delete, folder.files, folder.try_read,
        lambda at: folder.write_bytes(at, b"1"), lambda at: folder.copy_from(Folder(str(tmp_path)), at),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match="leads out of"):
            list(act(name))
    assert [each.name for each in tmp_path.iterdir()] == ["photo.jpg"]
    assert (tmp_path / "photo.jpg").read_bytes() == b"kept"


def test_folder__dots_in_names_lead_nowhere(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write_bytes("..a/b..c/d...jpg", b"1")
    assert (tmp_path / "..a/b..c/d...jpg").read_bytes() == b"1"


@pytest.mark.parametrize("key", OUT[:2])
def test_predict__keys_of_an_object_store_never_lead_out(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Folder(f"memory://{uuid.uuid4().hex}")
    root.write_bytes("fine.jpg", b"1")
    # As an object store would list it; the file systems at hand tidy such names.
    listed = [(key, 1), ("fine.jpg", 1)]
    monkeypatch.setattr(Folder, "files", lambda self, name="", recursive=False: iter(listed))
    _, listing = find_photographs(root.uri)
    assert output_stems([image.image_id for image in listing.images]) == {"fine.jpg": "fine"}
    assert listing.refused == ({"image_id": key, "reason": "name out of the folder"},)


def test_list_images__a_list_names_nothing_outside(tmp_path: Path) -> None:
    make_voc(tmp_path / "voc", num_train=2, num_val=1)
    make_folder(tmp_path, num_images=1)
    with (tmp_path / "voc/ImageSets/Segmentation/train.txt").open("a") as file:
        file.write("../../photo_000\n")
    listing = listed(DataConfig(dataset="voc", root=str(tmp_path / "voc")), "train")
    assert len(listing.images) == 2
    assert listing.refused == ({"image_id": "JPEGImages/../../photo_000.jpg", "reason": "name out of the folder"},)


def test_fetch_copies__an_index_names_nothing_outside(tmp_path: Path) -> None:
    row = {"image_id": "a", "split": "train", "label": None, "file": "../secret.arrow", "row": 0}
    with pytest.raises(ArtifactError, match="leads out of"):
        fetch_copies(str(tmp_path), build_index([row]).select(["file", "row"]))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("hf-hub:somebody/model", {}),
        ("local-dir:/etc", {}),
        ("somebody/model", {}),
        (TINY_VIT, {"checkpoint_path": "/etc/passwd"}),
        (TINY_VIT, {"cache_dir": "/tmp/elsewhere"}),
        (TINY_VIT, {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/a"}}),
    ],
)
def test_weights__an_architecture_names_no_files(
    name: str, overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr("timm.create_model", lambda *words, **more: made.append(words))
    metadata = {"format": "transfgu-encoder-1", "name": name, "overrides": json.dumps(overrides)}
    data = safetensors.torch.save({}, metadata)
    for load in (lambda: load_encoder(data, "a"), lambda: load_vit(data, "a", name=TINY_VIT, overrides={})):
        with pytest.raises(WeightsError):
            load()
    assert not made


def test_images__are_decoded_as_five_kinds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *words, **more: started.append(words))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    gif = io.BytesIO()
    Image.new("P", (64, 64)).save(gif, "GIF")
    for data in (eps, gif.getvalue()):
        with pytest.raises(ImageRefused, match="not an image"):
            decode_rgb(data, 8, 10**6)
        with pytest.raises(ImageRefused, match="its label is damaged"):
            decode_label(data)
    assert not started


SECRET = "m4rk3r"
WITH_SECRET = (
    f"mysql://user:{SECRET}@host/db",
    f"postgresql+psycopg2://user:{SECRET}@host:5432/db?sslmode=require",
    f"https://user:{SECRET}@host",
    f"https://{SECRET}@host:5000/path",
    f"s3://KEY:{SECRET}/with/slashes@bucket/run",
    f"simplecache::s3://KEY:{SECRET}@bucket/run",
    f"https://host/weights.pth?X-Amz-Signature={SECRET}",
    f"https://host/weights.pth?sv=1&sig={SECRET}",
    f"postgresql://host/db?user=me&password={SECRET}",
)
WITHOUT = (
    "sqlite:////data/mlflow.db",
    "https://host:5000",
    "https://host:5000/a@b",
    "s3://bucket/run@2?region=eu-west-1&endpoint_override=localhost:9000",
    "abfs://container@account.dfs.core.windows.net/run",
    "hdfs://user@namenode:8020/run",
    "postgresql://user@host:5432/db",
    "/data/a:b@c",
)


@pytest.mark.parametrize("uri", WITHOUT)
def test_refuse_credentials__lets_others_pass(uri: str) -> None:
    refuse_credentials("tracking.uri", uri)


@pytest.mark.parametrize("uri", WITH_SECRET)
def test_uri__a_password_is_refused_unrepeated_and_unwritten(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = get_preset("tiny_cpu")
    (tmp_path / "a.yaml").write_text(json.dumps({"encoder": {"weights": uri}}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(json.dumps(base.model_dump(mode="json") | {"tracking": {"uri": uri}}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for act in (
        lambda: build_config(base, None, [f"tracking.uri={json.dumps(uri)}"]),
        lambda: build_config(base, None, [f"data.rot={json.dumps(uri)}"]),
        lambda: build_config(base, None, [f"data.root={json.dumps(uri)}", "data.dataset=paired"]),
        lambda: build_config(base, str(tmp_path / "a.yaml")),
        lambda: Run.open(str(tmp_path / "run"), None),
        lambda: Run.open(uri, base),
        lambda: tracking_uri(Folder(str(tmp_path)), base),
        lambda: registry_uri(None),
        lambda: registry_uri(uri),
        lambda: find_photographs(uri),
    ):
        with pytest.raises(
            ConfigError, match=r"holds a password, a key or a token, .* MLFLOW_TRACKING_PASSWORD"
        ) as error:
            act()
        assert SECRET not in str(error.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.yaml", "run"]


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def marked(mark: str) -> Iterator[Path]:
    """/proc of every process that has some text in its environment, which children inherit."""
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and mark.encode() in (process / "environ").read_bytes():
                yield process


def listening(mark: str) -> set[str]:
    """Addresses that such processes listen on."""
    address_of = {}
    for family in ("tcp", "tcp6"):
        for line in Path("/proc/net", family).read_text().splitlines()[1:]:
            _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
            if state == "0A":
                # Words of four bytes, each turned round.
                words = struct.iter_unpack("<I", bytes.fromhex(local.partition(":")[0]))
                number = b"".join(struct.pack(">I", word) for (word,) in words)
                address_of[f"socket:[{inode}]"] = str(ipaddress.ip_address(number))
    found = set()
    for process in marked(mark):
        with contextlib.suppress(OSError):
            found |= {address_of.get(os.readlink(each), "") for each in (process / "fd").iterdir()}
    return found - {""}


def outside(addresses: set[str]) -> set[str]:
    """Those that other machines reach."""
    mapped = {text: getattr(ipaddress.ip_address(text), "ipv4_mapped", None) for text in addresses}
    return {text for text in addresses if not (mapped[text] or ipaddress.ip_address(text)).is_loopback}


def test_outside__knows_loopback() -> None:
    assert outside({"127.0.0.1", "::1", "::ffff:127.0.0.1", "::", "0.0.0.0", "10.0.0.7"}) == {
        "::",
        "0.0.0.0",
        "10.0.0.7",
    }


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """Of a command that nothing was set for; Ray's sockets need a short path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    folder = tempfile.mkdtemp(prefix="r")
    return kept | {"RAY_TMPDIR": folder, "HOME": str(tmp_path), "PYTHONPATH": os.getcwd(), **more}


SESSION = """
from transfgu_ray.config.sections import RuntimeConfig
from transfgu_ray.engine.session import ray_session
with ray_session(None, RuntimeConfig(object_store_mb=100), dashboard=True):
    print("ready", flush=True)
    input()
"""


@linux
@pytest.mark.ray
def test_ray_session__listens_on_loopback_alone(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    env = environment(tmp_path, TEST_MARK=mark)
    command = [sys.executable, "-c", SESSION]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            found = listening(mark)
        finally:
            process.communicate("\n")
    shutil.rmtree(env["RAY_TMPDIR"], ignore_errors=True)
    assert found
    assert not outside(found)


@linux
@pytest.mark.ray
@pytest.mark.slow
def test_run__writes_no_secret_and_listens_on_loopback_alone(tmp_path: Path) -> None:
    """Two workers, since a training of one has nobody to listen to."""
    secret = uuid.uuid4().hex
    named = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN")
    env = environment(tmp_path, **dict.fromkeys(named, secret), RAY_AUTH_MODE="token")
    data = make_folder(tmp_path / "data", num_images=4)
    settings = (*TINY, "runtime.train_workers=2", "data.region_mode=things_and_stuff", "evaluate.baselines=[]")
    command = [sys.executable, "-m", "transfgu_ray.cli", "run", str(tmp_path / "run"), "--preset", "tiny_cpu"]
    command += ["--data", str(data), *(word for each in settings for word in ("--set", each))]
    found = set()
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            found |= listening(secret)
            time.sleep(0.3)
    folders = (tmp_path, Path(env["RAY_TMPDIR"]))
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if secret.encode() in path.read_bytes()]
    shutil.rmtree(env["RAY_TMPDIR"], ignore_errors=True)
    assert process.returncode == 0, (tmp_path / "output").read_text()
    assert {"output", "config.yaml", "report.html", "mlflow.db", "register.json"} <= {path.name for path in files}
    assert any(path.suffix in (".log", ".out") for path in files)
    assert not kept
    assert found
    assert not outside(found)
