import pytest

from transfgu_ray.config.presets import get_preset
from transfgu_ray.config.run import build_config
from transfgu_ray.engine.session import Resources
from transfgu_ray.planning.operations import VitShape
from transfgu_ray.planning.passes import Passes, by_size
from transfgu_ray.planning.plan import Cluster, Photographs, plan_stages, predict
from transfgu_ray.runs.stages import STAGES

PIECES = {
    "start_stage": 10.0, "start_training": 20.0, "windows": 25.0, "kept_windows": 8.0, "decode": 0.01, "cut": 0.001,
    "crop": 0.009, "foreground": 0.04, "label": 0.09, "bank_bytes": 1000.0, "baselines": 0.5, "views": 0.0,
    "read_tokens": 0.2, "sample": 0.01, "first_round_step": 0.3, "step": 0.6, "mask": 0.1, "kmeans": 1e-9,
}  # fmt: skip
RESNET = ("train.backbone_weights=random", "train.backbone=resnet50_fpn")
SHAPE = VitShape(depth=2, width=96, mlp_weights=8 * 96**2, patch_size=16, num_prefix_tokens=1)
TWO = Cluster(num_workers=2, train_workers=2, num_cores=2, shares_cores=True)


def configured(*settings):
    base = ("data.region_mode=things_and_stuff", "train.round_epochs=[1, 2]", "train.batch_size=20", *settings)
    return build_config(get_preset("tiny_cpu"), None, base)


HUNDRED = Photographs(clustered=100, training=100, scored=10)


def plan(*settings, cluster=TWO, photographs=HUNDRED, **pieces):
    config = configured(*settings)
    return {
        stage.stage: stage
        for stage in plan_stages(config, PIECES | pieces, photographs=photographs, shape=SHAPE, cluster=cluster)
    }


def test_plan_stages__are_those_of_the_table_in_its_order():
    # The last two, pages and the registry, cost next to nothing.
    assert list(plan()) == list(STAGES.lasting[: STAGES.lasting.index("report")])


def test_plan_stages__by_hand():
    stages = plan()
    # 800 crops and 100 photographs, 50 photographs and 400 crops per worker: 10 + 50 * (0.01 + 0.04) + 400 * 0.01.
    assert (stages["extract"].forwards, stages["extract"].seconds) == (900, pytest.approx(16.5))
    assert stages["extract"].num_bytes == 800 * (2 * 96 + 60)
    # 8 concepts, 100 iterations, 800 points of width 96.
    assert stages["concepts"].seconds == pytest.approx(1e-9 * 8 * 100 * 800 * 96)
    assert (stages["labels"].forwards, stages["labels"].num_bytes) == (100, 100_000)
    assert stages["labels"].seconds == pytest.approx(15)
    # 3 epochs of 5 steps of 10 images per worker; on average 0.5 per image for the step, 0.2 to read, 0.02 to feed.
    assert stages["train"].forwards == 300
    assert stages["train"].seconds == pytest.approx(20 + 150 * 0.72)
    # Decode, label, tokens and three masks of ten photographs on two workers.
    assert stages["evaluate"].seconds == pytest.approx(10 + 5 * 0.6)


def test_plan_stages__windows_of_more_photographs_than_are_trained_on():
    # As of the curated COCO: only extract and concepts see the others.
    more = plan(photographs=Photographs(clustered=300, training=100, scored=10))
    assert more["extract"].forwards == 3 * plan()["extract"].forwards
    assert more["concepts"].seconds == pytest.approx(3 * plan()["concepts"].seconds)
    assert all(more[stage] == plan()[stage] for stage in ("labels", "train", "evaluate"))


def test_plan_stages__mini_batches_are_clustered_by_one_worker():
    spread, mini = (
        plan("concepts.init_points=10", f"concepts.algorithm={algorithm}")["concepts"].seconds
        for algorithm in ("faiss", "mini_batch")
    )
    assert mini == pytest.approx(2 * spread)


def test_plan_stages__a_hierarchy_clusters_each_level_and_what_is_resampled():
    # 16 clusters of 800 crops, ten times of 16 * 25 of them too, whose clusters 800 crops are given; then 8 of the 16.
    distances = 16 * (100 * (800 + 10 * 16 * 25) + 10 * 800) + 8 * 100 * 16
    hierarchy = plan("concepts.method=hierarchical")["concepts"]
    assert hierarchy.seconds == pytest.approx(1e-9 * distances * 96)


def test_plan_stages__free_cores_feed_the_training():
    cluster = Cluster(num_workers=4, train_workers=2, num_cores=4, shares_cores=True)
    assert plan(cluster=cluster)["train"].seconds == pytest.approx(20 + 150 * 0.7)
    on_gpu = Cluster(num_workers=2, train_workers=2, num_cores=1, shares_cores=False)
    assert plan(cluster=on_gpu)["train"].seconds == pytest.approx(20 + 150 * 0.7)


def test_plan_stages__cached_features_are_read_once():
    settings = ("train.augment={jitter_prob: 0, grey_prob: 0, blur_prob: 0}", "train.features=cached")
    train = plan(*settings)["train"]
    assert train.forwards == 100
    assert train.seconds == pytest.approx(20 + 150 * 0.51 + 10 + 50 * 0.21)


def test_plan_stages__a_published_decoder_is_not_trained():
    train = plan("train.decoder_weights=voc_decoder.pt")["train"]
    assert (train.forwards, train.seconds) == (0, 0)


def test_plan_stages__no_prior_has_no_forward_for_the_foreground():
    assert plan("data.region_mode=no_prior")["extract"].forwards == 800


def test_plan_stages__windows_vote_in_labels():
    stages = plan("cam.response=windows")
    assert stages["labels"].forwards == 100 * 26
    assert stages["evaluate"].forwards == 10 * 26 + 10


def test_by_size__adds_up_what_is_alike():
    passes = [Passes(2, (32, 64), True), Passes(3, (32, 64), True), Passes(1, (32, 64), False), Passes(0, (8, 8), True)]
    rows = by_size(passes, SHAPE)
    assert [(row["count"], row["image_hw"], row["class_only"]) for row in rows] == [
        (1, (32, 64), False), (5, (32, 64), True),
    ]  # fmt: skip
    assert rows[0]["operations_each"] > rows[1]["operations_each"]


def test_plan_stages__baselines_read_the_training_photographs_too():
    plain, more = plan()["evaluate"], plan("evaluate.baselines=[patch_tokens, raw_colour]")["evaluate"]
    kmeans = 1e-9 * 8 * 100 * 50_000 * 96
    assert more.seconds - plain.seconds == pytest.approx(10 + 50 * 0.51 + 5 * 0.5 + 2 * kmeans)
    # Colours need no encoder.
    assert more.forwards - plain.forwards == 110


def test_plan_stages__wider_decoder_tokens_take_longer_to_cluster():
    plain, more = (plan("evaluate.baselines=[decoder_tokens]", *wide)["evaluate"] for wide in ((), RESNET))
    # 3840 channels instead of 96.
    assert more.seconds - plain.seconds == pytest.approx(39 * 1e-9 * 8 * 100 * 50_000 * 96)
    # Its own backbone, not the encoder, reads the decoder's input.
    assert (plain.forwards, more.forwards) == (10 + 10 + 110, 10)


def test_plan_stages__windows_of_the_decoders_input_are_forwards_of_their_own():
    sizes = ("data.image_size=[128, 128]", "train.image_size=[128, 128]", "train.inference_size=[64, 64]")
    stages = plan("train.token_window=32", *sizes, "evaluate.baselines=[decoder_tokens]")
    # 3 x 3 windows of 32 px, 16 px apart, in a crop of 64 px; 7 x 7 in the whole photograph.
    assert stages["train"].passes == (Passes(300 * 9, (32, 32), class_only=False),)
    assert stages["evaluate"].forwards == 10 + 10 * 9 + 110 * 49


def test_plan_stages__two_views_of_the_training_photographs_for_heads_that_share_their_tokens():
    plain = plan("evaluate.baselines=[patch_tokens]")["evaluate"]
    more = plan("evaluate.baselines=[patch_tokens, iic, picie]", views=0.2)["evaluate"]
    kmeans = 1e-9 * 8 * 100 * 50_000 * 96
    assert more.seconds - plain.seconds == pytest.approx(50 * 0.2 + 2 * kmeans)
    assert more.forwards - plain.forwards == 200


def test_plan_stages__twice_the_workers_halve_all_but_the_start():
    cluster = Cluster(num_workers=4, train_workers=2, num_cores=2, shares_cores=True)
    for stage in ("extract", "labels", "evaluate"):
        assert plan(cluster=cluster)[stage].seconds - 10 == pytest.approx((plan()[stage].seconds - 10) / 2)


def predicted(card, gpu_tflops, num_gpus=2):
    resources = Resources(num_gpus * 8, num_gpus, num_gpus, "cpu" if card is None else "cuda", 1, None)
    return predict(
        configured(),
        PIECES | {"card": card},
        photographs=HUNDRED,
        shape=SHAPE,
        resources=resources,
        start_ray=5.0,
        gpu_tflops=gpu_tflops,
    )


def test_predict__no_speed_of_a_gpu_is_invented():
    found = predicted(None, None)
    assert all(stage["gpu_seconds"] == {} for stage in [*found["stages"], found["all"]])
    assert found["all"]["seconds"] == pytest.approx(5 + sum(stage["seconds"] for stage in found["stages"]))
    sizes = sum(row["count"] * row["operations_each"] for row in found["passes"])
    assert sizes == found["all"]["operations"] == sum(stage["operations"] for stage in found["stages"]) > 0


def test_predict__a_given_speed_bounds_the_hours_of_the_encoders_work():
    found = predicted(None, 50.0)
    for stage in [*found["stages"], found["all"]]:
        assert stage["gpu_seconds"] == {n: pytest.approx(stage["operations"] / (50e12 * n)) for n in (1, 8)}


def test_predict__timed_on_gpus_it_plans_for_one_and_eight_of_them():
    found = predicted("H100", 50.0)
    assert (found["card"], found["gpu_tflops"]) == ("H100", None)
    labels = next(stage for stage in found["stages"] if stage["stage"] == "labels")
    # 100 photographs of 0.01 + 0.09 s after a start of 10 s; 8 cores a GPU, as where it was timed.
    assert labels["gpu_seconds"] == {1: pytest.approx(20), 8: pytest.approx(11.25)}
    for count in (1, 8):
        cluster = Cluster(num_workers=count, train_workers=count, num_cores=8 * count, shares_cores=False)
        seconds = [stage.seconds for stage in plan(cluster=cluster).values()]
        assert found["all"]["gpu_seconds"][count] == pytest.approx(5 + sum(seconds))
