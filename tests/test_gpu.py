"""On a CUDA device the same weights give the same maps, labels and masks as on the CPU, up to rounding."""

import numpy as np
import pytest
import torch

from tests.builders import TINY_OVERRIDES, TINY_VIT, random_images
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, load_encoder, random_vit
from transfgu_ray.algorithms.encoder.tokens import read_tokens
from transfgu_ray.algorithms.labels.cam import GradientResponse
from transfgu_ray.algorithms.labels.labeller import Labeller
from transfgu_ray.algorithms.rounds.bootstrap import Bootstrap, BootstrapSettings
from transfgu_ray.algorithms.rounds.schedule import schedule
from transfgu_ray.algorithms.rounds.segmenter import MaskTransformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def encoder_on(device: str, precision: str = "float32"):
    vit = random_vit(TINY_VIT, TINY_OVERRIDES, 0)
    return load_encoder(
        dump_encoder(vit, TINY_VIT, overrides=TINY_OVERRIDES), "tiny", precision=precision, device=device
    )


def test_labeller__cuda_equals_cpu() -> None:
    images, centroids = random_images(3, 64, 64), torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    scores = {}
    for device in ("cpu", "cuda"):
        encoder = encoder_on(device)
        response = GradientResponse(encoder=encoder, centroids=centroids.to(device))
        labeller = Labeller(encoder, response, None, "attention")
        scores[device] = labeller(images.to(device))[0].cpu()
    torch.testing.assert_close(scores["cuda"], scores["cpu"], atol=1e-4, rtol=0)


def test_cls_tokens__bfloat16_on_cuda_is_close_to_float32() -> None:
    images = random_images(3, 64, 64).to("cuda")
    exact, rounded = (encoder_on("cuda", precision).cls_tokens(images) for precision in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rounded).min() > 0.99


def test_step__cuda_lowers_the_loss_over_a_round_turn() -> None:
    torch.manual_seed(0)
    student = MaskTransformer(5, 24, dropout=0.0).to("cuda")
    bootstrap = Bootstrap(
        student,
        BootstrapSettings(learning_rate=1e-3, weight_decay=5e-4, gradient_clamp=1.0, omega_1=1.0, omega_2=0.3, seed=0),
    )
    tokens = read_tokens(encoder_on("cuda"), random_images(4, 64, 64).to("cuda"), window=None)
    scores = torch.rand(4, 5, 8, 8, device="cuda")
    for epoch in schedule((1, 1), (0.03, 0.1)):
        bootstrap.begin_epoch(epoch, rank=0)
        losses = [bootstrap.step(tokens, scores, epoch=epoch, step=step)["loss"] for step in range(8)]
        assert np.isfinite(losses).all()
        assert losses[-1] < losses[0]
