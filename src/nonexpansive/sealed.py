"""Tensors and a JSON header in one safetensors file, sealed by a digest of both: whatever is changed or missing is noticed.

No pickle is ever read. The seal protects against damage, not against an author who seals something else: what a file *claims* is for
its reader to prove again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from nonexpansive.atomic import atomic
from nonexpansive.errors import BadCheckpoint, BadInput


def write(path: Path, format: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and header, whole or not at all. Raises BadInput where the file cannot be written, or the header as JSON."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: its header cannot be written as JSON ({error})") from error
    content = to_bytes(plain, {"format": format, "header": text, "sha256": digest(plain, text)})
    try:
        with atomic(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror or error})") from error


def read(path: Path, format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that ``write`` made in that format. Raises BadInput or BadCheckpoint."""
    if not path.is_file():
        raise BadInput(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except Exception as error:  # whatever the reader makes of a damaged file
        raise BadCheckpoint(f"{path}: damaged, or no safetensors file ({error}); fetch or make it again") from error
    if set(metadata) != {"format", "header", "sha256"} or metadata["format"] != format:
        raise BadCheckpoint(f"{path}: a safetensors file, but not a {format}")
    if digest(tensors, metadata["header"]) != metadata["sha256"]:
        raise BadCheckpoint(f"{path}: damaged or changed, its content does not match its digest")
    try:
        header = json.loads(metadata["header"])
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path}: the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise BadCheckpoint(f"{path}: the header is not that of a {format}")
    return tensors, header


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of the tensors, on a CPU and contiguous, with their names, types and shapes, and of the text."""
    hashed = hashlib.sha256(text.encode())
    for name, t in sorted(tensors.items()):
        hashed.update(f"{name}:{t.dtype}:{tuple(t.shape)}".encode())
        hashed.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
