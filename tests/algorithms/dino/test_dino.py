"""DINO and iBOT against plain rewrites, their schedules by hand, and what a step may change."""

import copy
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from tests.builders import TINY_OVERRIDES, TINY_VIT, random_images, shake
from transfgu_ray.algorithms.dino.distillation import Dino
from transfgu_ray.algorithms.dino.losses import class_cross_entropy, koleo, masked_cross_entropy, sinkhorn
from transfgu_ray.algorithms.dino.multicrop import MultiCrop
from transfgu_ray.algorithms.dino.network import DinoHead, DinoNetwork
from transfgu_ray.algorithms.dino.schedules import DinoRecipe, cosine, learning_rate, teacher_temperature
from transfgu_ray.algorithms.encoder.checkpoints import random_vit
from transfgu_ray.algorithms.encoder.vit import Encoder

RECIPE = DinoRecipe(
    num_prototypes=16,
    head_hidden_dim=12,
    head_bottleneck_dim=8,
    student_temperature=0.1,
    teacher_temperature=(0.04, 0.07),
    teacher_temperature_warmup_frac=0.5,
    assignment="centring",
    center_momentum=0.9,
    teacher_momentum=(0.9, 1.0),
    learning_rate=(0.01, 0.001),
    warmup_frac=0.2,
    weight_decay=(0.04, 0.4),
    clip_norm=3.0,
    freeze_last_layer_frac=0.3,
    koleo_weight=0.0,
    masked_weight=1.0,
    mask_prob=0.5,
    mask_ratio=(0.1, 0.5),
    precision="float32",
)
CROPS = MultiCrop(
    global_size=32,
    local_size=16,
    num_local=2,
    global_scale=(0.4, 1.0),
    local_scale=(0.1, 0.4),
    jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grey_prob=0.2,
    blur_probs=(0.5, 0.1, 0.5),
    solarise_prob=0.2,
)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
STEPS = 10


def network(masked: bool = True, seed: int = 0, name: str = TINY_VIT) -> DinoNetwork:
    vit = shake(random_vit(name, TINY_OVERRIDES | {"img_size": 32}, seed), seed)
    torch.manual_seed(seed)
    return DinoNetwork(vit, DinoHead(24, 12, bottleneck_dim=8, num_prototypes=16), masked=masked, mean=MEAN, std=STD)


def dino(seed: int = 0, rank: int = 0, wrap=lambda module: module, **changes) -> Dino:
    recipe = replace(RECIPE, **changes)
    return Dino(
        network(recipe.masked_weight > 0), recipe, crops=CROPS, total_steps=STEPS, seed=seed, rank=rank, wrap=wrap
    )


def images(seed: int = 0, num: int = 4) -> torch.Tensor:
    return random_images(num, 40, 40, seed)


def weights(trained: Dino) -> dict[str, torch.Tensor]:
    state = {"student": trained.student.state_dict(), "teacher": trained.teacher.state_dict(), "c": trained._centers}
    return {f"{part}.{name}": value.clone() for part, group in state.items() for name, value in group.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_class_cross_entropy__is_the_sum_over_pairs():
    rng = torch.Generator().manual_seed(0)
    targets = torch.rand(2, 3, 5, generator=rng).softmax(-1)
    logits = torch.randn(4, 3, 5, generator=rng)
    losses = []
    for t in range(2):
        for v in range(4):
            if t == v:
                continue
            for b in range(3):
                log_q = logits[v, b] - logits[v, b].exp().sum().log()
                losses.append(-sum(targets[t, b, p] * log_q[p] for p in range(5)))
    torch.testing.assert_close(class_cross_entropy(targets, logits), torch.stack(losses).mean())


def test_masked_cross_entropy__counts_images_alike():
    rng = torch.Generator().manual_seed(0)
    masks = torch.zeros(3, 2, 2, dtype=torch.bool)
    masks[0, 0, 0] = True
    masks[2] = True
    targets, logits = torch.rand(5, 6, generator=rng).softmax(-1), torch.randn(5, 6, generator=rng)
    each = [-(targets[i] * logits[i].log_softmax(-1)).sum() for i in range(5)]
    # One masked patch in the first image, four in the third, none in the second.
    torch.testing.assert_close(masked_cross_entropy(targets, logits, masks), (each[0] + sum(each[1:]) / 4) / 2)


def test_schedules__by_hand():
    assert cosine((1.0, 0.0), 0.0) == 1.0
    assert cosine((1.0, 0.0), 0.5) == pytest.approx(0.5)
    assert cosine((0.04, 0.4), 1.0) == pytest.approx(0.4)
    # Warm-up over 2 of 10 steps, then a cosine over the other 8.
    assert [learning_rate(RECIPE, step, STEPS) for step in (0, 1, 2)] == pytest.approx([0.005, 0.01, 0.01])
    assert learning_rate(RECIPE, 6, STEPS) == pytest.approx(0.0055)
    assert learning_rate(RECIPE, 10, STEPS) == pytest.approx(0.001)
    assert [teacher_temperature(RECIPE, step, STEPS) for step in (0, 1, 5, 9)] == pytest.approx(
        [0.04, 0.046, 0.07, 0.07]
    )
    assert learning_rate(replace(RECIPE, warmup_frac=0.0), 0, STEPS) == pytest.approx(0.01)


def test_head__cosines_with_prototypes():
    head = DinoHead(24, 12, bottleneck_dim=8, num_prototypes=16)
    tokens = torch.randn(5, 24)
    projected = head.mlp(tokens)
    for i in range(5):
        for p in range(16):
            want = torch.cosine_similarity(projected[i], head.prototypes[p], dim=0)
            assert head(tokens)[i, p].item() == pytest.approx(want.item(), abs=1e-5)


@pytest.mark.parametrize("name", [TINY_VIT, "vit_small_patch16_dinov3"])
def test_tokens__are_the_encoders(name):
    net, photos = network(name=name), images(num=2)[:, :, :32, :32]
    with torch.no_grad():
        tokens = net.tokens(photos.float() / 255)
    encoder = Encoder(copy.deepcopy(net.vit), MEAN, std=STD)
    torch.testing.assert_close(tokens[:, 0], encoder.cls_tokens(photos), atol=1e-5, rtol=1e-4)
    patches = tokens[:, encoder.num_prefix_tokens :]
    torch.testing.assert_close(patches, encoder.patch_tokens(photos), atol=1e-5, rtol=1e-4)


def test_class_tokens__are_the_teachers_at_the_size_of_a_global_view():
    trained, photos = dino(), images(num=2)[:, :, :32, :32]
    trained.step(images(), 0)
    encoder = Encoder(copy.deepcopy(trained.teacher.vit), MEAN, std=STD)
    torch.testing.assert_close(trained.class_tokens(photos), encoder.cls_tokens(photos), atol=1e-5, rtol=1e-4)
    assert trained.class_tokens(images(num=2)).shape == (2, 24)


def test_forward__masked_patches_are_replaced_before_the_blocks():
    net, views = network(), [images(num=2)[:, :, :32, :32].float() / 255]
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = True
    with torch.no_grad():
        net.mask_token.normal_()
        (classes,), patches, _ = net(views, mask, mask)
        embedded = net.vit.patch_embed((views[0] - net.mean) / net.std)
        embedded[0, 1, 2] = net.mask_token
        tokens = net.vit.norm(net.vit.blocks(net.vit._pos_embed(embedded)))
        torch.testing.assert_close(classes, net.head(tokens[:, 0]))
        # Patches come row by row: (1, 2) on a grid of 4 is the seventh.
        torch.testing.assert_close(patches, net.head(tokens[:1, 1 + 6]))


def test_step__centers_and_teacher_move_by_their_momenta():
    trained = dino(masked_weight=0.0)
    seen = []
    handle = trained.teacher.register_forward_hook(lambda module, given, got: seen.append(got[0][0]))
    before = weights(trained)
    trained.step(images(), 0)
    handle.remove()
    after = weights(trained)
    torch.testing.assert_close(after["c.class"], 0.1 * seen[0].mean(0))
    for name, value in trained.student.state_dict().items():
        want = 0.9 * before[f"teacher.{name}"] + 0.1 * value
        torch.testing.assert_close(after[f"teacher.{name}"], want)
    assert not same({"": before["student.vit.cls_token"]}, {"": after["student.vit.cls_token"]})


def test_step__prototypes_stay_for_the_first_share_only():
    trained = dino()
    start = trained.student.head.prototypes.clone()
    for step in range(3):
        trained.step(images(step), step)
        assert torch.equal(trained.student.head.prototypes, start)
    trained.step(images(3), 3)
    assert not torch.equal(trained.student.head.prototypes, start)


def test_step__biases_and_norms_are_not_decayed():
    trained = dino()
    decayed, kept = trained._optimiser.param_groups
    trained.step(images(), 0)
    assert decayed["weight_decay"] == pytest.approx(0.04)
    assert kept["weight_decay"] == 0
    assert {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(trained.student.parameters()))


def test_step__what_it_returns():
    terms = dino(masked_weight=0.5).step(images(), 0)
    assert terms["loss"] == pytest.approx(terms["class_loss"] + 0.5 * terms["patch_loss"])
    assert 0 < terms["teacher_entropy"] <= terms["usage_entropy"] <= math.log(16)


def test_step__without_local_views_still_masks_an_image():
    crops = replace(CROPS, num_local=0)
    trained = Dino(network(), replace(RECIPE, mask_prob=0.0), crops=crops, total_steps=STEPS, seed=0)
    terms = trained.step(images(), 0)
    assert terms["patch_loss"] > 0
    assert trained.student.mask_token.grad is not None, "data-parallel workers wait for every gradient"


def test_step__lowers_the_loss_on_one_batch():
    trained = dino(teacher_momentum=(0.99, 0.99), freeze_last_layer_frac=0.0, teacher_temperature=(0.04, 0.04))
    losses = [trained.step(images(num=8), step)["loss"] for step in range(STEPS)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1


def test_draw_masks__ratio_and_share():
    trained = dino(mask_prob=0.5, mask_ratio=(0.25, 0.5))
    masks = trained._draw_masks(torch.zeros(400, 3, 64, 64), np.random.default_rng(0)).flatten(1).float().mean(1)
    masked = masks[masks > 0]
    assert len(masked) == 200
    # The last rectangle may overshoot.
    assert masked.min() >= 0.25
    assert masked.median() < 0.6


def test_state_dict__continues_exactly():
    whole, half = dino(), dino()
    terms = [whole.step(images(step), step) for step in range(6)]
    for step in range(3):
        half.step(images(step), step)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    continued = dino()
    continued.load_state_dict(torch.load(file, weights_only=True))
    assert [continued.step(images(step), step) for step in range(3, 6)] == terms[3:]
    assert same(weights(continued), weights(whole))


def test_step__seed_and_rank_fix_the_views():
    assert dino().step(images(), 0) == dino().step(images(), 0)
    assert dino().step(images(), 0) != dino(seed=1).step(images(), 0)
    assert dino().step(images(), 0) != dino(rank=1).step(images(), 0)


@pytest.mark.parametrize("masked_weight", [0.0, 1.0])
def test_step__not_finite_leaves_everything_as_it_was(masked_weight: float):
    trained = dino(masked_weight=masked_weight)
    trained.step(images(), 0)
    with torch.no_grad():
        trained.student.head.mlp[0].bias[0] = float("nan")
    before = weights(trained)
    with pytest.raises(FloatingPointError, match="loss is nan and its gradient nan in step 1"):
        trained.step(images(1), 1)
    after = weights(trained)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_sinkhorn__like_loops_and_alike_use():
    logits = torch.randn(6, 4) * 3
    want = logits.double().exp()
    for _ in range(3):
        for column in range(4):
            want[:, column] /= want[:, column].sum()
        for row in range(6):
            want[row] /= want[row].sum()
    torch.testing.assert_close(sinkhorn(logits), want.float())
    torch.testing.assert_close(sinkhorn(logits, 200).sum(0), torch.full((4,), 6 / 4))
    # A constant shared by all images, as in a collapse, changes nothing.
    torch.testing.assert_close(sinkhorn(logits + torch.tensor([9.0, 0, 0, 0])), sinkhorn(logits), atol=0.2, rtol=0)


def test_sinkhorn__a_prototype_out_of_reach_is_not_nan():
    assert torch.isfinite(sinkhorn(torch.tensor([[0.0, -1e4], [0.0, -1e4]]))).all()


def test_koleo__by_hand():
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    # Nearest: 0 -> 1 at sqrt(0.8), 1 -> 2 at sqrt(0.4), 2 -> 1 at sqrt(0.4).
    want = -(0.5 * math.log(0.8) + math.log(0.4)) / 3
    assert koleo(rows).item() == pytest.approx(want, abs=1e-4)
    same_rows = torch.ones(3, 2, requires_grad=True)
    koleo(torch.nn.functional.normalize(same_rows, dim=-1)).backward()
    assert torch.isfinite(same_rows.grad).all()


def test_step__koleo_is_weighed_and_spreads():
    terms = dino(koleo_weight=0.25, masked_weight=0.0).step(images(), 0)
    assert terms["loss"] == pytest.approx(terms["class_loss"] + 0.25 * terms["koleo_loss"])
    trained = dino(koleo_weight=5.0, masked_weight=0.0)
    spread = [trained.step(images(num=8), step)["koleo_loss"] for step in range(STEPS)]
    assert spread[-1] < spread[0] - 0.1


def sinkhorn_half(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(sinkhorn(sinkhorn_logits()[rank::2]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def sinkhorn_logits() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 3


def test_sinkhorn__over_all_workers(tmp_path):
    mp.start_processes(sinkhorn_half, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in (0, 1):
        half = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(half, sinkhorn(sinkhorn_logits())[rank::2])


def data_parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    trained = dino(rank=rank, wrap=torch.nn.parallel.DistributedDataParallel, clip_norm=1e9)
    trained.step(images(rank), 0)
    grads = {name: parameter.grad for name, parameter in trained.student.named_parameters()}
    torch.save({"grads": grads, "weights": weights(trained)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_step__two_workers_share_gradients_and_centers(tmp_path):
    # Forked, since a fresh process would take seconds to import torch and timm.
    mp.start_processes(data_parallel, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first["weights"], second["weights"])
    alone = [dino(rank=rank, clip_norm=1e9) for rank in (0, 1)]
    for rank, trained in enumerate(alone):
        trained.step(images(rank), 0)
    ones, others = (dict(trained.student.named_parameters()) for trained in alone)
    for name, grad in first["grads"].items():
        if name != "head.prototypes":
            torch.testing.assert_close(grad, (ones[name].grad + others[name].grad) / 2, atol=1e-6, rtol=1e-4)
    for kind in ("class", "patch"):
        mean = (alone[0]._centers[kind] + alone[1]._centers[kind]) / 2
        torch.testing.assert_close(first["weights"][f"c.{kind}"], mean)
