"""Models on disk: safetensors with a JSON header. What can be derived is derived again on load; nothing in a file is trusted.

The header holds the architecture's name and config, how the weights were made, the certificate claimed when they were saved, and a
SHA-256 digest of all of that and of the tensors. A truncated file, one with a byte changed, one of another architecture and one that
claims more than its weights prove are each refused. No pickle is ever read.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nonexpansive import sealed
from nonexpansive.errors import BadCheckpoint, BadInput, Refused
from nonexpansive.math.certificate import certify
from nonexpansive.nn.classifier import Classifier
from nonexpansive.nn.models import build

FORMAT = "nonexpansive model 1"
_SHIPPED = resources.files("nonexpansive") / "weights"
DEFAULTS = {"denoise": "denoiser-colour", "denoise-grey": "denoiser-grey", "classify": "classifier-cifar10"}
"""The shipped model that each task takes unless told otherwise."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself: how to build the model, and for information how it was trained and what it proved.

    Raises ValueError where a field is not of its kind.
    """

    architecture: str
    config: dict[str, Any]
    training: dict[str, Any]
    claimed: dict[str, float | None]

    def __post_init__(self) -> None:
        if (
            not isinstance(self.architecture, str)
            or not isinstance(self.config, dict)
            or not isinstance(self.training, dict)
        ):
            raise ValueError("a name of the architecture, a config and an account of the training are expected")
        if not isinstance(self.claimed, dict) or set(self.claimed) != {"lipschitz", "averaged"}:
            raise ValueError("claims of 'lipschitz' and 'averaged' are expected")
        for key, value in self.claimed.items():
            if value is not None and not (type(value) in (int, float) and 0 <= value < 1e300):
                raise ValueError(f"the claim {key} is {value!r}, not a number")


def save(
    path: str | os.PathLike[str], model: nn.Module, architecture: str, config: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write a model, whole or not at all; its certificate, for a denoiser on a 32x32 sample, is recorded as claimed.

    A copy of the model in float16, ``copy.deepcopy(model).half()``, makes a file of half the size. What is loaded from it are the same
    numbers in float32, and it is of these that the certificate is.

    Raises BadInput if ``model`` is not what ``build(architecture, **config)`` makes, if ``training`` has no form in JSON, or if
    the file cannot be written; Refused if the model has no certificate.
    """
    model = copy.deepcopy(model).eval()  # the model that is being trained stays in training mode
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (model, build(architecture, **config))]
    if shapes[0] != shapes[1]:
        raise BadInput(f"this model is not what the architecture {architecture!r} makes with the settings {config}")
    tensors = model.state_dict()
    header = Header(architecture, config, training, _claim(model.to(_computed_in(tensors))))
    sealed.write(Path(path), FORMAT, tensors, vars(header))


def _computed_in(tensors: dict[str, Tensor]) -> torch.dtype:
    """The type in which a model of these weights is run: their own, or float32 if that is wider."""
    types = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(types) != 1 or not types <= {torch.float64, torch.float32, torch.float16, torch.bfloat16}:
        raise BadInput(f"the weights of a model are to be of one type of 16 to 64 bits, not {sorted(map(str, types))}")
    return torch.promote_types(types.pop(), torch.float32)


def _claim(model: nn.Module) -> dict[str, float | None]:
    shape = model.shape if isinstance(model, Classifier) else (getattr(model, "channels", 3), 32, 32)
    certificate = certify(model, shape)
    return {"lipschitz": certificate.lipschitz, "averaged": certificate.averaged}


def read(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors of a checkpoint, its digest verified. Raises BadInput or BadCheckpoint."""
    tensors, fields = sealed.read(Path(path), FORMAT)
    try:
        return Header(**fields), tensors
    except (TypeError, ValueError) as error:
        raise BadCheckpoint(f"{path}: the header is not one of a model ({error})") from error


def load(name_or_path: str | os.PathLike[str]) -> nn.Module:
    """A model in eval mode, by the name of a shipped one (see ``models()``) or from a file written by ``save``.

    Its steps are chosen anew from its weights, and the certificate that the file claims is checked against what they prove.
    Raises BadInput for an unknown name, BadCheckpoint for a file that is damaged, changed, or claims more than it proves.
    """
    path = path_of(name_or_path)
    header, tensors = read(path)
    try:
        model = build(header.architecture, **header.config)
        model.to(_computed_in(tensors)).load_state_dict(tensors)
        proved = _claim(model.eval())
    except Refused as refusal:
        raise BadCheckpoint(f"{path}: no certificate can be given for these weights ({refusal})") from refusal
    except Exception as error:  # whatever the constructors make of a config that is not theirs
        raise BadCheckpoint(
            f"{path}: the weights do not fit the architecture {header.architecture!r} ({error})"
        ) from error
    for key, value in header.claimed.items():
        bound = proved[key]
        if value is not None and (bound is None or bound > value * (1 + 1e-9)):
            raise BadCheckpoint(f"{path}: the file claims {key} {value}, but its weights prove only {bound}")
    return model.to(memory_format=torch.channels_last)  # the faster layout for convolutions on a CPU


def path_of(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a shipped model, by its name, or the path as given. Raises BadInput for a name that is not shipped."""
    text = os.fspath(name_or_path)
    if text in models():
        return Path(str(_SHIPPED / f"{text}.safetensors"))
    if os.sep in text or text.endswith(".safetensors"):
        return Path(text)
    shipped = ", ".join(models()) or "none in this installation"
    raise BadInput(f"no shipped model is called {text!r} (there are: {shipped}), and it is not a .safetensors file")


def models() -> list[str]:
    """The names of the shipped models."""
    if not _SHIPPED.is_dir():
        return []
    return sorted(
        entry.name.removesuffix(".safetensors") for entry in _SHIPPED.iterdir() if entry.name.endswith(".safetensors")
    )
