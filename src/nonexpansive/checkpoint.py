"""Models on disk: safetensors with a JSON header. What can be derived is derived again on load; nothing in a file is trusted.

The header holds the architecture's name and config, how the weights were made, the certificate claimed when they were saved, and a
SHA-256 digest of all of that and of the tensors. A truncated file, one with a byte changed, one of another architecture and one that
claims more than its weights prove are each refused. No pickle is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from nonexpansive.errors import BadCheckpoint, BadInput, Refused
from nonexpansive.math.certificate import certify
from nonexpansive.nn.models import build

FORMAT = "nonexpansive-1"
_SHIPPED = resources.files("nonexpansive") / "weights"
DEFAULTS = {"denoise": "denoiser-colour", "denoise-grey": "denoiser-grey"}
"""The shipped model that each task takes unless told otherwise."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself: how to build the model, and for information how it was trained and what it proved."""

    architecture: str
    config: dict[str, Any]
    training: dict[str, Any]
    claimed: dict[str, float | None]


def save(path: str | os.PathLike[str], model: nn.Module, architecture: str, config: dict[str, Any], training: dict[str, Any]) -> None:
    """Write a model whole or not at all: to a temporary file beside ``path``, which then takes its place.

    ``model`` must be what ``build(architecture, **config)`` makes; its certificate on a 3 or 1x32x32 sample is recorded as claimed.
    """
    path = Path(path)
    model = model.eval()
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    header = Header(architecture, config, training, _claim(model, config))
    text = json.dumps(vars(header), sort_keys=True, allow_nan=False)
    data = to_bytes(tensors, {"format": FORMAT, "header": text, "sha256": _digest(text, tensors)})
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _claim(model: nn.Module, config: dict[str, Any]) -> dict[str, float | None]:
    certificate = certify(model, (config.get("channels", 3), 32, 32))
    return {"lipschitz": certificate.lipschitz, "averaged": certificate.averaged}


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name}:{t.dtype}:{tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors of a checkpoint, its digest verified. Raises BadCheckpoint or BadInput."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BadCheckpoint(f"{path}: not a whole safetensors file ({error}); fetch or train it again") from error
    if set(metadata) != {"format", "header", "sha256"} or metadata["format"] != FORMAT:
        raise BadCheckpoint(f"{path}: a safetensors file, but not a model saved by nonexpansive ({FORMAT})")
    if _digest(metadata["header"], tensors) != metadata["sha256"]:
        raise BadCheckpoint(f"{path}: the content does not match its digest: the file was changed or damaged")
    try:
        header = Header(**json.loads(metadata["header"]))
    except (TypeError, ValueError) as error:
        raise BadCheckpoint(f"{path}: the header is not one of a model ({error})") from error
    return header, tensors


def load(name_or_path: str | os.PathLike[str]) -> nn.Module:
    """A model in eval mode, by the name of a shipped one (see ``models()``) or from a file written by ``save``.

    Its steps are chosen anew from its weights, and the certificate that the file claims is checked against what they prove.
    Raises BadInput for an unknown name, BadCheckpoint for a file that is damaged, changed, or claims more than it proves.
    """
    path = path_of(name_or_path)
    header, tensors = read(path)
    try:
        model = build(header.architecture, **header.config)
        model.load_state_dict(tensors)
    except (BadInput, Refused, RuntimeError, TypeError) as error:
        raise BadCheckpoint(f"{path}: the weights do not fit the architecture {header.architecture!r} ({error})") from error
    try:
        proved = _claim(model.eval(), header.config)
    except Refused as refusal:
        raise BadCheckpoint(f"{path}: no certificate can be given for these weights ({refusal})") from refusal
    for key, value in header.claimed.items():
        bound = proved.get(key)
        if value is not None and (bound is None or bound > value * (1 + 1e-9)):
            raise BadCheckpoint(f"{path}: the file claims {key} {value}, but its weights prove only {bound}")
    return model


def path_of(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a shipped model, by its name, or the path as given. Raises BadInput for a name that is not shipped."""
    text = os.fspath(name_or_path)
    if text in models():
        return Path(str(_SHIPPED / f"{text}.safetensors"))
    if os.sep in text or text.endswith(".safetensors"):
        return Path(text)
    raise BadInput(f"no shipped model is called {text!r} (there are {', '.join(models())}), and it is not a .safetensors file")


def models() -> list[str]:
    """The names of the shipped models."""
    if not _SHIPPED.is_dir():
        return []
    return sorted(entry.name.removesuffix(".safetensors") for entry in _SHIPPED.iterdir() if entry.name.endswith(".safetensors"))
