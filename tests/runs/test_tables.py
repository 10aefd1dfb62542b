import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from transfgu_ray.algorithms.labels.bank import decode_scores, encode_scores
from transfgu_ray.algorithms.rounds.token_crops import encode_tokens
from transfgu_ray.runs.tables import (
    SCHEMA_VERSION,
    baseline_schema,
    build_table,
    concepts_schema,
    confusions_schema,
    features_schema,
    labels_schema,
    to_parquet,
    tokens_schema,
)


def _features():
    return {
        "image_id": ["a.jpg", "a.jpg", "b.jpg"],
        "crop_id": np.array([0, 3, 1], dtype=np.int32),
        "box_xyxy": np.arange(12, dtype=np.int32).reshape(3, 4),
        "window_frac": np.array([0.5, 0.5, 0.3], dtype=np.float32),
        "kind": ["foreground", "background", "any"],
        "foreground_frac": np.array([0.9, 0.1, 0.5], dtype=np.float32),
        "cls_token": np.linspace(-2, 2, 15).reshape(3, 5).astype(np.float16),
    }


def test_build_table__rows_keep_their_vectors_through_parquet():
    columns = _features()
    table = build_table(columns, features_schema(5))
    read = pq.read_table(pa.BufferReader(to_parquet(table, {})))
    assert read.schema.equals(features_schema(5))
    for row, got in enumerate(read.to_pylist()):
        assert got["image_id"] == columns["image_id"][row]
        assert got["box_xyxy"] == columns["box_xyxy"][row].tolist()
        assert got["cls_token"] == columns["cls_token"][row].tolist()


@pytest.mark.parametrize(
    "schema",
    [
        features_schema(5),
        concepts_schema(5),
        labels_schema(),
        tokens_schema(),
        baseline_schema({"raw_colour": 3}),
        confusions_schema(),
    ],
)
def test_schemas__no_column_may_be_null(schema):
    assert not any(field.nullable for field in schema)


def test_features_schema__columns_that_readers_rely_on():
    schema = features_schema(384)
    assert schema.field("box_xyxy").type == pa.list_(pa.int32(), 4)
    assert schema.field("cls_token").type == pa.list_(pa.float16(), 384)
    assert schema.field("crop_id").type == pa.int32()
    assert concepts_schema(384).field("centroid").type == pa.list_(pa.float32(), 384)


def test_labels_schema__scores_are_read_as_documented():
    scores = torch.rand(1, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    codes, low, high = (values[0].numpy() for values in encode_scores(scores))
    row = {
        "image_id": ["a"], "path": ["/a"], "height_px": [3], "width_px": [4], "grid_h": [3], "grid_w": [4],
        "scores": [codes.tobytes()], "low": [low.tobytes()], "high": [high.tobytes()], "foreground": [bytes(12)],
    }  # fmt: skip
    read = pq.read_table(pa.BufferReader(to_parquet(build_table(row, labels_schema()), {}))).to_pylist()[0]
    got = np.frombuffer(read["scores"], "u1").reshape(-1, read["grid_h"], read["grid_w"])
    assert np.array_equal(got.argmax(0), scores[0].argmax(0))
    floor, top = (np.frombuffer(read[name], "<f2").reshape(3, 4).astype(np.float32) for name in ("low", "high"))
    values = floor + np.sqrt((got - 1.0) / 62) * (top - floor)
    np.testing.assert_allclose(values, decode_scores(*encode_scores(scores))[0], atol=1e-6)


def test_tokens_schema__tokens_are_read_as_documented():
    tokens = np.linspace(-3, 3, 24, dtype=np.float32).reshape(6, 4)
    row = {"image_id": ["a"], "grid_h": [2], "grid_w": [3], "tokens": [encode_tokens(tokens)]}
    read = pq.read_table(pa.BufferReader(to_parquet(build_table(row, tokens_schema()), {}))).to_pylist()[0]
    got = np.frombuffer(read["tokens"], "<f2").reshape(read["grid_h"], read["grid_w"], -1)
    np.testing.assert_allclose(got.reshape(6, 4), tokens, rtol=2.0**-11)


def test_build_table__ignores_order_and_extra_columns():
    columns = _features()
    shuffled = dict(reversed(columns.items())) | {"more": [1, 2, 3]}
    assert build_table(shuffled, features_schema(5)).equals(build_table(columns, features_schema(5)))


def test_build_table__refuses_a_missing_column():
    columns = _features()
    del columns["kind"]
    with pytest.raises(KeyError, match="kind"):
        build_table(columns, features_schema(5))


def test_build_table__refuses_a_value_that_does_not_fit():
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        build_table(_features() | {"crop_id": ["x", "y", "z"]}, features_schema(5))


def test_build_table__refuses_vectors_of_another_width():
    with pytest.raises(pa.ArrowInvalid):
        build_table(_features(), features_schema(4))


def test_to_parquet__equal_input_gives_equal_bytes_with_metadata():
    table = build_table(_features(), features_schema(5))
    data = to_parquet(table, {"part": "7"})
    assert data.equals(to_parquet(build_table(_features(), features_schema(5)), {"part": "7"}))
    metadata = pq.read_schema(pa.BufferReader(data)).metadata
    assert metadata[b"part"] == b"7"
    assert metadata[b"schema_version"] == str(SCHEMA_VERSION).encode()
