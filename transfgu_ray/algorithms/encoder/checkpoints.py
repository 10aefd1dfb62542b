"""Encoder weights: read from common formats, written as safetensors with the architecture in the metadata."""

import hashlib
import io
import json
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from transfgu_ray.algorithms.encoder.layouts import backbone_state, to_timm
from transfgu_ray.algorithms.encoder.vit import Encoder
from transfgu_ray.errors import WeightsError, foreign_words

FORMAT = "transfgu-encoder-1"
# What may differ from the named architecture. timm accepts more, such as files to read.
OVERRIDES = {
    *("embed_dim", "depth", "num_heads", "patch_size", "pos_embed", "img_size", "reg_tokens"),
    *("attn_type", "num_kv_heads", "qkv_fused", "qk_norm", "scale_attn_inner"),
}
_INTERPOLATION = "pos_embed_interpolation"


def build_vit(name: str, overrides: dict[str, int | str], pretrained: bool = False) -> nn.Module:
    """Build an untrained (or hub-trained) timm model without a head, for any size divisible by its patch.

    Raises:
        WeightsError: timm does not know the name, or the overrides do not fit together.
    """
    unknown = WeightsError(f"encoder.name={name} is unknown to timm {timm.__version__}; see timm.list_models('vit_*')")
    # A file may bring an `hf-hub:` or `local-dir:` name, which timm would read from the network or the disk.
    if not timm.is_model(name):
        raise unknown
    if not set(overrides) <= OVERRIDES:
        raise WeightsError(f"the overrides of {name} may be {', '.join(sorted(OVERRIDES))}, not {', '.join(overrides)}")
    options: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True, **overrides}
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except RuntimeError as error:
        if not str(error).startswith(("Unknown model", "Invalid pretrained tag")):
            raise
        raise unknown from None
    except (TypeError, AssertionError) as error:
        raise WeightsError(
            f"encoder.name={name} with overrides {overrides} is not a usable vision transformer: {error}"
        ) from None


def random_vit(name: str, overrides: dict[str, int | str], seed: int) -> nn.Module:
    """Build a timm model with weights drawn from `seed`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_vit(name, overrides)


def load_vit(data: bytes, source: str, *, name: str, overrides: dict[str, int | str]) -> nn.Module:
    """Build a timm model with weights from the bytes of a file.

    Accepts our own safetensors (the architecture in the file wins over `name`), and state dicts under timm's names
    or in the layouts of `layouts`, as safetensors or as a PyTorch checkpoint. Never unpickles objects. The file must
    hold every tensor of the model, and nothing else but the known extras of `layouts`.

    Args:
        data: the file's content.
        source: its name, for messages.
        name: of the timm model.
        overrides: changes to its architecture.

    Raises:
        WeightsError: the file cannot be read or its tensors do not fit the architecture.
    """
    tensors, metadata = read_safetensors(data, source) if _is_safetensors(data) else (None, {})
    if tensors is not None and metadata.get("format") == FORMAT:
        name, overrides = _architecture(metadata, source)
        vit, state = build_vit(name, overrides), tensors
    else:
        checkpoint = read_checkpoint(data, source) if tensors is None else tensors
        vit = build_vit(name, overrides)
        state = to_timm(checkpoint, vit, source=source, name=name)
    if problem := misfit(state, vit.state_dict()):
        changed, advice = "", "name the model it was trained as"
        if overrides:
            changed = f" with encoder.overrides={overrides}"
            advice += ", and set encoder.overrides={} unless it was made with these"
        raise WeightsError(f"{source} does not fit encoder.name={name}{changed}: it {problem}; {advice}")
    if unusable := not_finite(state):
        raise WeightsError(f"{source} {unusable}; train it again, or take another checkpoint of it")
    vit.load_state_dict({key: value.float() for key, value in state.items()})
    return vit


def not_finite(state: dict[str, Tensor]) -> str | None:
    """Return which tensors are NaN or infinite, as the rest of a sentence about the file; None if none are."""
    bad = [key for key, value in state.items() if not torch.isfinite(value).all()]
    return f"holds NaN or infinite values in {bad[0]} ({len(bad)} tensors in all)" if bad else None


def misfit(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str | None:
    """Return the first mismatch of a state dict, as the rest of a sentence about it; None if it fits exactly."""
    if missing := [key for key in wanted if key not in state]:
        return f"lacks {missing[0]} ({len(missing)} tensors in all)"
    if unknown := [key for key in state if key not in wanted]:
        return f"holds {unknown[0]}, which has no place in it ({len(unknown)} tensors in all)"
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            return f"has {key} of shape {tuple(state[key].shape)}, not {tuple(value.shape)}"
    return None


def dump_encoder(
    vit: nn.Module,
    name: str,
    *,
    overrides: dict[str, int | str],
    dtype: torch.dtype | None = None,
    facts: dict[str, str] | None = None,
) -> bytes:
    """Return safetensors bytes with architecture, normalisation and the stored weights' SHA-256 in the metadata.

    Args:
        vit: the model.
        name: its timm name.
        overrides: changes to that architecture.
        dtype: floating type to store; None keeps the types. `load_vit` always returns float32.
        facts: further metadata, such as how the weights were trained.
    """
    state = {key: value.detach().cpu().to(dtype or value.dtype).contiguous() for key, value in vit.state_dict().items()}
    mean, std = normalisation(vit)
    metadata = {
        **(facts or {}),
        "format": FORMAT,
        "name": name,
        "overrides": json.dumps(overrides, sort_keys=True),
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
        "weights_sha256": hash_weights(state),
    }
    return _save(state, metadata)


def normalisation(vit: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the RGB mean and deviation, in [0, 1], that timm records for a model."""
    known: Any = vit.pretrained_cfg  # a dict, which timm does not declare
    return tuple(known.get("mean", (0.485, 0.456, 0.406))), tuple(known.get("std", (0.229, 0.224, 0.225)))


def load_encoder(data: bytes, source: str, *, precision: str = "float32", device: str = "cpu") -> Encoder:
    """Build the frozen encoder from the bytes of `dump_encoder`.

    Raises:
        WeightsError: the bytes are of another format.
    """
    metadata = _encoder_metadata(data, source)
    name, overrides = _architecture(metadata, source)
    vit = load_vit(data, source, name=name, overrides=overrides)
    return _as_encoder(vit, metadata, source=source, precision=precision, device=device)


def load_untrained(data: bytes, source: str, *, seed: int, precision: str = "float32", device: str = "cpu") -> Encoder:
    """Build an encoder from the architecture and normalisation that `dump_encoder` wrote, with weights from `seed`.

    Raises:
        WeightsError: the bytes are of another format.
    """
    metadata = _encoder_metadata(data, source)
    vit = random_vit(*_architecture(metadata, source), seed)
    return _as_encoder(vit, metadata, source=source, precision=precision, device=device)


def _encoder_metadata(data: bytes, source: str) -> dict[str, str]:
    _, metadata = read_safetensors(data, source)
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{source} is not an encoder written by this package")
    return metadata


def _architecture(metadata: dict[str, str], source: str) -> tuple[str, dict[str, int | str]]:
    overrides = _fact(metadata, "overrides", source)
    is_plain = isinstance(overrides, dict) and all(isinstance(value, int | str) for value in overrides.values())
    if not is_plain or "name" not in metadata:
        raise WeightsError(f"{source} does not say which model it holds; it is damaged")
    return metadata["name"], overrides


def _fact(metadata: dict[str, str], key: str, source: str) -> Any:
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError):
        raise WeightsError(f"{source} has no readable {key!r} in its metadata; it is damaged") from None


def _as_encoder(vit: nn.Module, metadata: dict[str, str], *, source: str, precision: str, device: str) -> Encoder:
    mean, std = (_fact(metadata, key, source) for key in ("mean", "std"))
    for values in (mean, std):
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
            raise WeightsError(f"{source} has no mean and deviation of three colours in its metadata; it is damaged")
    mean, std = tuple(mean), tuple(std)
    return Encoder(
        vit, mean, std=std, precision=precision, pos_embed_interpolation=metadata.get(_INTERPOLATION, "timm")
    ).to(device)


def with_interpolation(data: bytes, source: str, interpolation: str) -> bytes:
    """Record in the bytes of `dump_encoder` how positions are interpolated; return them unchanged if they say so.

    Files without this entry mean "timm".
    """
    state, metadata = read_safetensors(data, source)
    if metadata.get(_INTERPOLATION, "timm") == interpolation:
        return data
    return _save(state, metadata | {_INTERPOLATION: interpolation})


def _save(state: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return safetensors bytes with sorted metadata, since the library shuffles it: equal content gives equal bytes."""
    data = safetensors.torch.save(state, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Tensors begin at a multiple of eight.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def read_safetensors(data: bytes, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file.

    Raises:
        WeightsError: the bytes are not such a file.
    """
    try:
        return safetensors.torch.load(data), _metadata(data)
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{source} is not a readable safetensors file: {error}") from None


def read_state(data: bytes, source: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a PyTorch checkpoint in the wrappers that authors publish.

    Raises:
        WeightsError: the bytes are neither.
    """
    if _is_safetensors(data):
        return read_safetensors(data, source)[0]
    return backbone_state(read_checkpoint(data, source), source)


def hash_weights(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of all tensors, in order of name."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_encoder_file(data: bytes) -> bool:
    """Return whether the bytes of a file come from `dump_encoder`."""
    return _is_safetensors(data) and _metadata(data).get("format") == FORMAT


def _metadata(data: bytes) -> dict[str, str]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata: dict[str, str] = header.get("__metadata__", {})
    return metadata


def _is_safetensors(data: bytes) -> bool:
    # Safetensors begin with a little-endian header length, then JSON; PyTorch files with a zip or pickle signature.
    return data[8:9] == b"{"


def read_checkpoint(data: bytes, source: str) -> Any:
    """Read a PyTorch file of nothing but tensors and plain containers.

    Raises:
        WeightsError: it is not such a file, or holds other objects.
    """
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  torch raises many kinds for a file that is not a plain checkpoint
        # What torch says before and after its reason is advice on how to load objects after all.
        reason = foreign_words(error, most=4000).rpartition("WeightsUnpickler error: ")[2].partition(" Please use")[0]
        reason = reason.partition(" Check the documentation")[0][:300]
        raise WeightsError(
            f"{source} is not a checkpoint of plain tensors ({type(error).__name__}: {reason}); pickled objects are "
            "never loaded, so save its state_dict alone"
        ) from None
