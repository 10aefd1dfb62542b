"""The bank's stored form at K = 171 on 40 x 40 patches: bytes, exactness and speed on one core."""

import time
from collections.abc import Callable
from statistics import median

import pyarrow as pa
import torch
from torch import Tensor

from transfgu_ray.algorithms.labels.bank import decode_scores, encode_scores
from transfgu_ray.algorithms.rounds.segmenter import MaskTransformer
from transfgu_ray.bench.subject import build_encoder, build_labeller, window_concepts, working_images
from transfgu_ray.bench.timing import Measurements, Target

_CONCEPTS = 171
_IMAGES = 4
_ROUNDS = 15
# Training steps of the teacher; more steps make it surer and the changed targets fewer.
_TEACHER_STEPS = 12


def measure(device: str) -> Measurements:
    """Measure bytes after zstd, patches and targets changed by rounding, and images per second on one core."""
    encoder = build_encoder(device)
    images = working_images(_IMAGES).to(device)
    label = build_labeller(encoder, window_concepts(encoder, _CONCEPTS))
    scores = torch.cat([label(image[None])[0] for image in images])
    tokens = torch.cat([encoder.patch_tokens(image[None]) for image in images])
    encoded = encode_scores(scores)
    stored = decode_scores(*encoded)
    teacher = _teacher(tokens, scores)
    changed = (stored + teacher).argmax(1) != (scores + teacher).argmax(1)
    scores, parts = scores.cpu(), [part.cpu() for part in encoded]
    packed = [_pack(*(part[i] for part in parts)) for i in range(_IMAGES)]

    def rate(action: Callable[[], object]) -> float:
        # CPU time, which a busy machine does not lengthen.
        seconds = []
        for _ in range(_ROUNDS):
            start = time.process_time()
            action()
            seconds.append(time.process_time() - start)
        return 1 / median(seconds)

    sizes = [sum(len(part) for part in image) for image in packed]
    return Measurements(
        targets=[
            Target("bank: kB an image, K = 171", "<=", 120.0, sum(sizes) / len(sizes) / 1e3),
            Target("bank: patches with another argmax", "<=", 0.0, _share(stored.argmax(1).cpu() != scores.argmax(1))),
            Target("bank: targets changed after the teacher, %", "<=", 0.5, 100 * _share(changed)),
            Target("bank: images/s a core, encode", ">=", 200.0, rate(lambda: _pack(*encode_one(scores[:1])))),
            Target("bank: images/s a core, decode", ">=", 200.0, rate(lambda: decode_scores(*_unpack(packed[0])))),
        ],
        details={"released_kB": scores[0].numel() * 4 / 1e3, "largest_kB": max(sizes) / 1e3},
    )


def encode_one(scores: Tensor) -> list[Tensor]:
    """Return the stored form of a batch of one."""
    return [part[0] for part in encode_scores(scores)]


def _pack(codes: Tensor, low: Tensor, high: Tensor) -> list[bytes]:
    # As Parquet compresses a row group of one image.
    return [pa.compress(part.numpy().tobytes(), "zstd", asbytes=True) for part in (codes, low, high)]


def _unpack(packed: list[bytes]) -> list[Tensor]:
    shapes = ((_CONCEPTS, 40, 40), torch.uint8), ((40, 40), torch.float16), ((40, 40), torch.float16)
    unpacked = []
    for data, (shape, kind) in zip(packed, shapes, strict=True):
        size = torch.Size(shape).numel() * kind.itemsize
        raw = bytearray(pa.decompress(data, size, "zstd", asbytes=True))
        unpacked.append(torch.frombuffer(raw, dtype=kind).view(shape))
    return unpacked


def _teacher(tokens: Tensor, scores: Tensor) -> Tensor:
    """Return the probabilities of a decoder that has begun to learn the bank (Eq. 9)."""
    torch.manual_seed(0)
    decoder = MaskTransformer(_CONCEPTS, tokens.shape[-1]).to(tokens.device)
    optimiser = torch.optim.Adam(decoder.parameters(), 1e-3)
    for step in range(_TEACHER_STEPS):
        one = slice(step % _IMAGES, step % _IMAGES + 1)
        logits, _ = decoder(tokens[one], (40, 40))
        loss = torch.nn.functional.cross_entropy(logits, scores[one].argmax(1))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    with torch.no_grad():
        return torch.cat([decoder.eval()(one[None], (40, 40))[0].softmax(1) for one in tokens])


def _share(mask: Tensor) -> float:
    return mask.float().mean().item()
