"""The token table: its content, its rows in step with the bank, and its lifetime."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.fixtures import Silent, open_run
from transfgu_ray.algorithms.encoder.tokens import read_tokens
from transfgu_ray.engine.parts import UnitDone
from transfgu_ray.engine.stream import Photo
from transfgu_ray.errors import DataError
from transfgu_ray.images import decode_rgb, to_working
from transfgu_ray.models.weights import load_run_encoder
from transfgu_ray.pipeline import train as train_rounds
from transfgu_ray.pipeline.run import run_stages
from transfgu_ray.pipeline.tokens import TokenCacher
from transfgu_ray.pipeline.train import TrainResult
from transfgu_ray.pipeline.train_data import bank_image_ids
from transfgu_ray.runs.run import Run

pytestmark = pytest.mark.ray
CACHED = (
    "train.features=cached",
    "train.token_window=16",
    "train.augment={jitter_prob: 0, grey_prob: 0, blur_prob: 0}",
)


@pytest.fixture
def photographs(photographs_with_refused: Path) -> Path:
    return photographs_with_refused


@pytest.fixture
def run(labelled: Run, photographs: Path, tmp_path: Path) -> Run:
    folder = Path(shutil.copytree(labelled.folder.path, tmp_path / "run"))
    return open_run(folder, photographs, *CACHED, overwrite=True)


def cacher(run: Run) -> TokenCacher:
    place = {"run_uri": run.folder.uri, "table": "tokens", "fingerprint": "", "device": "cpu", "threads": 1}
    return TokenCacher(run.config, **place)


def read_photos(photographs: Path, *names: str) -> list[Photo]:
    return [Photo(name, (photographs / name).read_bytes(), None, None) for name in names]


def read_whole(run: Run) -> pa.Table:
    return pq.read_table(Path(run.folder.path) / "tokens").replace_schema_metadata()


def expected_tokens(run: Run, photographs: Path) -> dict[str, np.ndarray]:
    """Return the tokens that inference reads for each photograph of the bank, one at a time."""
    encoder, found = load_run_encoder(run.folder, "float32", "cpu"), {}
    for image_id in bank_image_ids(run.folder):
        photo = decode_rgb((photographs / image_id).read_bytes(), 32, 10**6)
        image = to_working(photo, run.config.train_crop_size, "bilinear")
        found[image_id] = read_tokens(encoder, torch.from_numpy(image)[None], window=16)[0].numpy()
    return found


def test_token_cacher__stores_what_inference_reads_in_the_order_of_the_bank(run: Run, photographs: Path) -> None:
    names = sorted(path.name for path in photographs.iterdir())
    for unit in range(3):
        cacher(run).process(unit, read_photos(photographs, *names[2 * unit : 2 * unit + 2]))
    rows, expected = read_whole(run).to_pylist(), expected_tokens(run, photographs)
    assert [row["image_id"] for row in rows] == bank_image_ids(run.folder) == list(expected)
    for row in rows:
        assert (row["grid_h"], row["grid_w"]) == (4, 4)
        got = np.frombuffer(row["tokens"], "<f2").reshape(16, 48)
        # Half a float16 step, plus the last bits that depend on the shape of the batch.
        np.testing.assert_allclose(got, expected[row["image_id"]], rtol=2.0**-11, atol=1e-5)
    parts = [pq.ParquetFile(path) for path in sorted((Path(run.folder.path) / "tokens").glob("part-*"))]
    assert [(part.num_row_groups, part.metadata.num_rows) for part in parts] == [(2, 2), (1, 1), (2, 2)]


NOT_IN_BANK = "not in the bank: it could not be used when the bank was labelled"


@pytest.mark.parametrize("is_readable_now", [True, False])
def test_token_cacher__a_photograph_that_the_bank_lacks_is_refused(
    run: Run, photographs: Path, is_readable_now: bool
) -> None:
    whole, other = read_photos(photographs, "photo_000.jpg", "photo_002.jpg")
    mended = Photo("photo_001a.jpg", whole.data if is_readable_now else b"no picture", None, None)
    assert UnitDone.load(cacher(run).process(1, [mended, other])).refused == 1
    part = pq.ParquetFile(Path(run.folder.path) / "tokens/part-000001.parquet")
    assert part.read(["image_id"])["image_id"].to_pylist() == ["photo_002.jpg"]
    assert part.num_row_groups == 1
    stats = json.loads(part.metadata.metadata[b"stats"])
    assert stats["images"] == 1
    assert stats["refused"] == [{"image_id": "photo_001a.jpg", "reason": NOT_IN_BANK}]


@pytest.mark.parametrize(
    ("data", "error", "now"),
    [(b"no picture", None, "not an image"), (None, "cannot be read: not found", "cannot be read: not found")],
)
def test_token_cacher__a_photograph_of_the_bank_must_still_be_usable(
    run: Run, photographs: Path, data: bytes | None, error: str | None, now: str
) -> None:
    photos = [*read_photos(photographs, "photo_000.jpg"), Photo("photo_001.jpg", data, None, error)]
    with pytest.raises(DataError, match=rf"photo_001\.jpg has changed .*\(now: {now}\); restore it"):
        cacher(run).process(0, photos)
    assert not (Path(run.folder.path) / "tokens").exists(), "a part that does not follow the bank was written"


@pytest.mark.slow
def test_train__table_survives_a_kill_and_does_not_depend_on_workers(
    run: Run, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[pa.Table] = []

    def interrupted(*arguments: object, **named: object) -> TrainResult:
        found.append(read_whole(run))
        raise InterruptedError

    monkeypatch.setattr(train_rounds, "train", interrupted)
    with pytest.raises(InterruptedError):
        run_stages(run, ("train",), address=None, reporter=Silent())
    parts = sorted((Path(run.folder.path) / "tokens").glob("part-*"))
    before = {part: part.stat().st_mtime_ns for part in parts}
    num_bytes = sum(part.stat().st_size for part in parts)
    parts[1].unlink()

    history = [{"loss": 1.0}]
    after: dict[Path, int] = {}

    def trained(*arguments: object, **named: object) -> TrainResult:
        after.update({part: part.stat().st_mtime_ns for part in parts})
        found.append(read_whole(run))
        return TrainResult(history, 0, 0, 0)

    monkeypatch.setattr(train_rounds, "train", trained)
    wide = open_run(Path(run.folder.path), photographs, *CACHED, "runtime.num_workers=2", "runtime.num_blocks=3")
    reporter = Silent()
    (manifest,) = run_stages(wide, ("train",), address=None, reporter=reporter).values()
    assert [after[part] == before[part] for part in parts] == [True, False, True]
    assert found[1].equals(found[0])
    kept = {name: manifest["cached_tokens"][name] for name in ("bytes", "parts", "parts_resumed")}
    assert kept == {"bytes": num_bytes, "parts": 3, "parts_resumed": 2}
    assert reporter.done == {"tokens": 6, "train": 0}, "one pass over six photographs for the tokens"


@pytest.mark.slow
def test_train__table_is_deleted_when_the_model_is_written(
    run: Run, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = train_rounds.save_decoder, []

    def save_decoder(*arguments: object, **named: object) -> None:
        seen.append((Path(run.folder.path) / "tokens").exists())
        real(*arguments, **named)

    monkeypatch.setattr(train_rounds, "save_decoder", save_decoder)
    reporter = Silent()
    run_stages(run, ("train",), address=None, reporter=reporter)
    assert seen == [True, True]
    assert not (Path(run.folder.path) / "tokens").exists()
    assert len(json.loads(run.folder.read_bytes("train/history.json"))) == 2
    assert not (Path(run.folder.path) / "tokens.json").exists()
    assert reporter.done == {"tokens": 6, "train": 2}
