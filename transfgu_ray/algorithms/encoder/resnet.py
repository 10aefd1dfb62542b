"""ResNet-50 with a feature pyramid, which the student can read instead of the vision transformer (Table 4).

Letters: b images, (h, w) patch grid, c = 3840 channels of the four stages, d width, k classes.
"""

import math

import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import ResNet, resnet50

from transfgu_ray.algorithms.encoder.checkpoints import read_state
from transfgu_ray.errors import WeightsError

# Of the four stages, with strides 4, 8, 16 and 32.
STAGE_CHANNELS = (256, 512, 1024, 2048)
# The normalisation with which DINO trained it.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A frozen ResNet-50, including its batch statistics.

    Args:
        resnet: torchvision's, without a classification head.
        precision: "float32", or "bfloat16" to run under autocast.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, resnet: ResNet, precision: str = "float32") -> None:
        super().__init__()
        self.resnet = resnet.eval().requires_grad_(False)
        self.precision = precision
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def read(self, images: UInt8[Tensor, "b 3 y x"], grid_hw: tuple[int, int]) -> Float[Tensor, "b hw 3840"]:
        """Return features of all four stages at each patch, float32, row by row, each stage resized bilinearly.

        Args:
            images: RGB in 0-255 on the backbone's device.
            grid_hw: the labels' patch grid.
        """
        net, found = self.resnet, []
        with torch.autocast(self.mean.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            maps = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
            maps = net.maxpool(net.relu(net.bn1(net.conv1(maps))))
            for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
                maps = stage(maps)
                found.append(functional.interpolate(maps.float(), grid_hw, mode="bilinear", align_corners=False))
        return torch.cat(found, dim=1).flatten(2).transpose(1, 2)


class PyramidDecoder(nn.Module):
    """A decoder behind the trainable part of a feature pyramid: 1x1 convolutions of the four stages, added up.

    A 1x1 convolution commutes with bilinear resizing, so the four and their sum are one linear layer on the features
    of `Backbone.read`.

    Args:
        decoder: takes tokens of width d.
        width: d.

    Reference: the FPN of PiCIE (Cho et al., CVPR 2021), without smoothing convolutions. Departures: each stage is
    resized to the patch grid in one step, not by doublings up to stride 4; the four biases, which are only ever added,
    are a single one; d is the prior's, so that the decoder equals that of the vision transformer (PiCIE: 256).
    """

    def __init__(self, decoder: nn.Module, width: int) -> None:
        super().__init__()
        self.lateral = nn.Linear(sum(STAGE_CHANNELS), width)
        with torch.no_grad():
            for weight in torch.split(self.lateral.weight, list(STAGE_CHANNELS), dim=1):
                # Each stage is initialised like a convolution of its own.
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.decoder = decoder

    def forward(
        self, tokens: Float[Tensor, "b hw 3840"], grid_hw: tuple[int, int]
    ) -> tuple[Float[Tensor, "b k h w"], Float[Tensor, "b k d"]]:
        """Decode the pyramid's features to class logits and class embeddings of unit length."""
        decoded: tuple[Tensor, Tensor] = self.decoder(self.lateral(tokens), grid_hw)
        return decoded


def random_resnet(seed: int) -> ResNet:
    """Build a ResNet-50 with weights drawn from `seed`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build()


def load_resnet(data: bytes, source: str) -> ResNet:
    """Build a ResNet-50 from the bytes of a file: a checkpoint in DINO's layouts, or safetensors; see `read_state`.

    Args:
        data: the file's content.
        source: its name, for messages.

    Raises:
        WeightsError: the file cannot be read or does not hold a ResNet-50 in torchvision's layout.
    """
    state = read_state(data, source)
    with torch.device("meta"):
        # Saves drawing weights that would be overwritten.
        resnet = _build()
    # Only training reads these counters, and older checkpoints lack them.
    counters = [key for key in resnet.state_dict() if key.endswith("num_batches_tracked")]
    wanted = {key: value for key, value in resnet.state_dict().items() if key not in counters}
    wrong = [key for key, value in wanted.items() if key not in state or state[key].shape != value.shape]
    if wrong:
        raise WeightsError(
            f"{source} holds no ResNet-50 in torchvision's layout: {len(wrong)} of its {len(wanted)} tensors are "
            f"missing or of another shape, the first {wrong[0]}; give a file such as DINO's dino_resnet50_pretrain.pth"
        )
    zeros = {key: torch.tensor(0) for key in counters}
    resnet.load_state_dict(zeros | {key: state[key].float() for key in wanted}, assign=True)
    return resnet


def load_backbone(data: bytes, source: str, *, precision: str, device: str) -> Backbone:
    """Build the frozen backbone from the bytes of a file; see `load_resnet`."""
    return Backbone(load_resnet(data, source), precision).to(device)


def dump_resnet(resnet: ResNet) -> bytes:
    """Return safetensors bytes that `load_resnet` reads."""
    return safetensors.torch.save({key: value.contiguous() for key, value in resnet.state_dict().items()})


def _build() -> ResNet:
    resnet = resnet50(weights=None)
    resnet.fc = nn.Identity()
    return resnet
