"""Two thousand broken inputs: each ends in a result, or in one sentence of a `TransfguError` (exit code 2)."""

import contextlib
import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.builders import TINY_OVERRIDES, TINY_VIT, listed, make_folder
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, load_encoder, load_vit, random_vit
from transfgu_ray.cli.terminal import printable
from transfgu_ray.config.base import dump_yaml, flatten
from transfgu_ray.config.presets import configure, get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.errors import TransfguError
from transfgu_ray.images import ImageRefused, decode_rgb
from transfgu_ray.models.model import load_model_config
from transfgu_ray.runs.run import Run
from transfgu_ray.runs.stages import STAGES
from transfgu_ray.storage import Folder

pytestmark = pytest.mark.slow
CONFIG = get_preset("tiny_cpu")
NAMES = sorted(flatten(CONFIG.model_dump(mode="json")))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def cases(number: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


def refused(error: TransfguError) -> None:
    # As the command line shows it.
    message = printable(str(error))
    assert message.strip()
    assert len(message) < 5000


def bytes_of(base: bytes) -> st.SearchStrategy[bytes]:
    """Random bytes, or the given ones cut, with some replaced, or with some put in."""
    place = st.integers(0, len(base))
    changed = st.builds(lambda at, new: base[:at] + new + base[at + len(new) :], place, st.binary(max_size=8))
    longer = st.builds(lambda at, new: base[:at] + new + base[at:], place, st.binary(max_size=8))
    return st.binary(max_size=200) | place.map(lambda end: base[:end]) | changed | longer


@cases(300)
@given(content=PLAIN | st.dictionaries(st.sampled_from(sorted(CONFIG.model_dump())), PLAIN, max_size=4))
def test_configuration_file__of_any_values(tmp_path: Path, content: Any) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")
    try:
        configure("tiny_cpu", str(tmp_path / "a.yaml"), [])
    except TransfguError as error:
        refused(error)


@cases(300)
@given(content=bytes_of(dump_yaml(CONFIG).encode()))
def test_configuration_file__of_any_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    try:
        configure("tiny_cpu", str(tmp_path / "a.yaml"), [])
    except TransfguError as error:
        refused(error)


@cases(300)
@given(name=st.sampled_from(NAMES) | st.text(max_size=20), value=PLAIN.map(json.dumps) | st.text(max_size=20))
def test_set__of_any_name_and_value(name: str, value: str) -> None:
    try:
        build_config(CONFIG, None, [f"{name}={value}"])
    except TransfguError as error:
        refused(error)


FILE_NAMES = st.text(st.characters(blacklist_characters="/\x00", blacklist_categories=["Cs"]), min_size=1, max_size=20)


@cases(200)
@given(data=st.data())
def test_dataset_folder__of_any_names_and_bytes(
    tmp_path_factory: pytest.TempPathFactory, photograph: bytes, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("data")
    for name in data.draw(st.lists(FILE_NAMES.filter(lambda n: n not in (".", "..")), max_size=3)):
        (root / f"{name[:60]}.jpg").write_bytes(data.draw(bytes_of(photograph)))
    try:
        listing = listed(configure("tiny_cpu", None, [f"data.root={root}"]).data, "")
    except TransfguError as error:
        refused(error)
        return
    for image in listing.images:
        with contextlib.suppress(ImageRefused):
            assert decode_rgb((root / image.image_id).read_bytes(), 8, 10**6).mode == "RGB"


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (make_folder(tmp_path_factory.mktemp("one"), num_images=1) / "photo_000.jpg").read_bytes()


MANIFEST = json.dumps(
    {"stage": "extract", "fingerprint": "a" * 64, "rows_in": 3, "rows_out": 9, "refused": []}
).encode()


@cases(300)
@given(stage=st.sampled_from(STAGES.lasting), content=bytes_of(MANIFEST) | PLAIN.map(lambda v: json.dumps(v).encode()))
def test_manifest__of_any_content(tmp_path: Path, stage: str, content: bytes) -> None:
    run = Run(Folder(str(tmp_path)), CONFIG)
    (tmp_path / f"{stage}.json").write_bytes(content)
    for read in (run.manifest, run.require):
        try:
            found = read(stage)
            assert found is None or isinstance(found["fingerprint"], str)
        except TransfguError as error:
            refused(error)


@cases(200)
@given(content=bytes_of(dump_yaml(CONFIG).encode()))
def test_run_folder__with_any_config_yaml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    try:
        Run.open(str(tmp_path), None)
    except TransfguError as error:
        refused(error)


@cases(100)
@given(content=bytes_of(b'{"format": "transfgu-model-1"}') | PLAIN.map(lambda v: json.dumps(v).encode()))
def test_model_folder__with_any_config_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    try:
        load_model_config(Folder(str(tmp_path)))
    except TransfguError as error:
        refused(error)


VIT = random_vit(TINY_VIT, TINY_OVERRIDES, 0)
OWN = dump_encoder(VIT, TINY_VIT, overrides=TINY_OVERRIDES)
HEADER = struct.unpack("<Q", OWN[:8])[0] + 8


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"teacher": VIT.state_dict()}, buffer)
    return buffer.getvalue()


@cases(300)
@given(content=bytes_of(OWN[:HEADER]).map(lambda head: head + OWN[HEADER:]) | bytes_of(OWN) | bytes_of(pickled()))
def test_checkpoint__of_any_bytes(content: bytes) -> None:
    for load in (
        lambda: load_vit(content, "a.pth", name=TINY_VIT, overrides=TINY_OVERRIDES),
        lambda: load_encoder(content, "a.pth"),
    ):
        try:
            load()
        except TransfguError as error:
            refused(error)


@cases(100)
@given(values=st.dictionaries(st.sampled_from(["format", "name", "overrides", "mean", "std"]), st.text(max_size=12)))
def test_checkpoint__with_any_metadata(values: dict[str, str]) -> None:
    state = {name: value.contiguous() for name, value in VIT.state_dict().items()}
    metadata = {"format": "transfgu-encoder-1", "name": TINY_VIT, "overrides": "{}"} | values
    content = safetensors.torch.save(state, metadata)
    for load in (
        lambda: load_vit(content, "a.pth", name=TINY_VIT, overrides=TINY_OVERRIDES),
        lambda: load_encoder(content, "a.pth"),
    ):
        try:
            load()
        except TransfguError as error:
            refused(error)
