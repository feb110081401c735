"""Photographs in and out: PNG, JPEG and TIFF, grey or colour, 8 or 16 bits a channel.

Pillow reads the headers and all 8-bit files. It would cut 16-bit colour to 8 bits, so OpenCV decodes what is deeper.
Values are taken as stored, between 0 (black) and 1 (white): no gamma, no colour conversion; the profile is kept beside.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin
from torch import Tensor

from nonexpansive.app.output import IMAGE_SUFFIXES
from nonexpansive.atomic import atomic
from nonexpansive.errors import BadInput

MAX_PIXELS = 200_000_000


@dataclass(frozen=True, eq=False)
class Photograph:
    """``tensor`` float32 (C, H, W) in [0, 1], C = 1 (grey) or 3 (red, green, blue), upright; ``bits`` a channel, 8 or
    16; ``icc``: the file's colour profile, if it has one, to be handed to ``write_image``."""

    tensor: Tensor
    bits: int
    path: Path
    icc: bytes | None = None


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Photograph:
    """Reads a PNG, JPEG or TIFF file; the content decides, not the name. Its EXIF orientation is applied.

    Integer files of up to 8 or of 16 bits, and floating-point TIFFs within [0, 1] (``bits`` is then 16). An alpha
    channel that is opaque everywhere is dropped; transparency is refused, as what lies behind it is not in the file.

    Raises ``BadInput``, which names the remedy, for anything else: no such file, empty, damaged or cut short, another
    format, more than ``max_pixels`` (judged by the header, before decoding), several pages or frames, other numbers of
    channels, CMYK, NaN.
    """
    path = Path(path)
    data = _contents(path)
    decode = next((decode for signature, decode in _FORMATS.items() if data.startswith(signature)), None)
    if decode is None:
        raise BadInput(f"{str(path)!r} is not a PNG, JPEG or TIFF file: convert it to one of these")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            values, bits, icc = decode(data, max_pixels)
    except BadInput as error:
        raise BadInput(f"{str(path)!r}: {error}") from error.__cause__
    except MemoryError as error:
        raise BadInput(f"{str(path)!r} does not fit into memory: reduce or crop it") from error
    except Exception as error:  # decoders raise what they please on a bad file
        raise BadInput(f"{str(path)!r} is damaged, cut short or unsupported ({error}): save it anew") from error
    scale = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}.get(values.dtype, 1)
    planes = np.moveaxis(values[..., None] if values.ndim == 2 else values, -1, 0)
    tensor = torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32)).div_(scale)
    return Photograph(tensor, bits, path, icc)


def write_image(path: str | os.PathLike[str], tensor: Tensor, bits: int = 8, icc: bytes | None = None) -> None:
    """Writes a picture (C, H, W), C = 1 or 3, clamped to [0, 1] and rounded to ``bits``, whole or not at all; PNG, JPEG
    (8 bits, quality 95, full colour resolution) or TIFF by the name's ending. A TIFF carries no profile ``icc``.

    Raises ``BadInput`` for other endings or shapes, NaN or infinity, 16 bits in a JPEG, a full disk.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise BadInput(f"{str(path)!r}: a picture's name must end in one of {', '.join(IMAGE_SUFFIXES)}")
    if bits not in (8, 16) or (bits == 16 and suffix in (".jpg", ".jpeg")):
        raise BadInput(f"{bits} bits a channel cannot be written to {suffix}: take 8, or for 16 a PNG or TIFF")
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or 0 in tensor.shape:
        raise BadInput(f"a picture (C, H, W) with C = 1 or 3 is expected, got shape {tuple(tensor.shape)}")
    tensor = tensor.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(tensor).all()):
        raise BadInput(f"{str(path)!r} was not written: the picture holds NaN or infinity")
    values = tensor.clamp(0, 1).mul_(2**bits - 1).round_().permute(1, 2, 0).numpy()
    values = np.ascontiguousarray(values[..., ::-1], dtype=np.uint8 if bits == 8 else np.uint16)
    space = b"GRAY" if tensor.shape[0] == 1 else b"RGB "
    profile = [np.frombuffer(icc, np.uint8)] if icc and icc[16:20] == space and suffix not in (".tif", ".tiff") else []
    settings = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    settings = settings if suffix in (".jpg", ".jpeg") else []
    try:
        written, code = cv2.imencodeWithMetadata(
            suffix, values, [cv2.IMAGE_METADATA_ICCP] * len(profile), profile, settings
        )
    except cv2.error as error:
        raise BadInput(f"{str(path)!r} cannot be encoded: {error}") from error
    if not written:
        raise BadInput(f"{str(path)!r}: a picture of shape {tuple(tensor.shape)} cannot be encoded as {suffix}")
    with atomic(Path(path)) as temporary:
        temporary.write_bytes(code.tobytes())


def write_like(path: str | os.PathLike[str], tensor: Tensor, picture: Photograph | None) -> None:
    """``write_image`` with the depth (but for a JPEG, which has 8 bits) and the colour profile of the ``picture`` that was read."""
    bits = 8 if picture is None or Path(path).suffix.lower() in (".jpg", ".jpeg") else picture.bits
    write_image(path, tensor, bits=bits, icc=None if picture is None else picture.icc)


# ---- decoding: bytes to (values (H, W) or (H, W, 3) in RGB order, bits, colour profile)

_Decoded = tuple[np.ndarray, int, bytes | None]


def _contents(path: Path) -> bytes:
    if not path.exists():
        raise BadInput(f"there is no file {str(path)!r}")
    if not path.is_file():
        raise BadInput(f"{str(path)!r} is not a file: give the name of one PNG, JPEG or TIFF file")
    try:
        with path.open("rb") as file:
            start = file.read(16)
            if not start:
                raise BadInput(f"{str(path)!r} is empty")
            return start + file.read() if start.startswith(tuple(_FORMATS)) else start
    except OSError as error:
        raise BadInput(f"{str(path)!r} cannot be read: {error.strerror}") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadInput(f"the picture is empty ({width} x {height})")
    if width * height > max_pixels:
        raise BadInput(
            f"{width} x {height} is {width * height / 1e6:.0f} million pixels, above the limit of {max_pixels / 1e6:g} "
            "million: reduce or crop it, or raise the limit"
        )


def _png(data: bytes, max_pixels: int) -> _Decoded:
    image = PngImagePlugin.PngImageFile(io.BytesIO(data))
    _check_size(*image.size, max_pixels)
    if image.is_animated:
        raise BadInput("an animated PNG: save one frame as a picture of its own")
    depth, colour_type = data[24], data[25]
    if depth < 16:
        return _shallow(image)
    PngImagePlugin.PngImageFile(io.BytesIO(data)).verify()  # the checksums and the end, which OpenCV does not insist on
    return _deep(data, grey=colour_type in (0, 4)), 16, image.info.get("icc_profile")


def _jpeg(data: bytes, max_pixels: int) -> _Decoded:
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    _check_size(*image.size, max_pixels)
    return _shallow(image)


def _tiff(data: bytes, max_pixels: int) -> _Decoded:
    """By its tags, as Pillow does not open a floating-point colour TIFF."""
    tags, pages = _tiff_tags(data)
    if 256 not in tags or 257 not in tags:
        raise BadInput("the file is cut short")
    _check_size(tags[256], tags[257], max_pixels)
    if pages > 1:
        raise BadInput("the TIFF holds several pages: save one as a file of its own")
    samples, photometric = tags.get(277, 1), tags.get(262)
    bits, kinds = set(tags.get(258, (1,))), set(tags.get(339, (1,)))
    if photometric == 5:
        raise BadInput(_CMYK)
    if samples not in (1, 3, 4):
        raise BadInput(f"the TIFF has {samples} channels: 1 (grey) or 3 (red, green, blue) are expected")
    if max(bits) <= 8 and kinds == {1}:
        return _shallow(TiffImagePlugin.TiffImageFile(io.BytesIO(data)))
    if len(bits) > 1 or (*bits, *kinds) not in ((16, 1), (32, 3), (64, 3)):
        raise BadInput("the TIFF's values are neither 8 nor 16-bit whole numbers nor floats: convert it to 16 bits")
    if photometric != (1 if samples == 1 else 2):
        raise BadInput("a TIFF deeper than 8 bits must be grey, black at zero, or red, green, blue: convert it")
    if tags.get(284, 1) != 1 and samples > 1:
        raise BadInput("the TIFF stores its channels apart: save it interleaved")
    starts, counts = (tags.get(324), tags.get(325)) if 324 in tags else (tags.get(273, ()), tags.get(279, ()))
    if any(start + count > len(data) for start, count in zip(starts, counts, strict=True)):
        raise BadInput("the file is cut short")
    return _deep(data, grey=samples == 1), 16, tags.get(34675)


def _tiff_tags(data: bytes) -> tuple[Any, int]:
    """The tags of the first page, and the number of pages (counted up to 2)."""
    file = io.BytesIO(data)
    header = file.read(16 if data[2:3] == b"+" or data[3:4] == b"+" else 8)  # "+" is 43, BigTIFF
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    return tags, 1 if tags.next == 0 else 2


_FORMATS = {
    b"\x89PNG\r\n\x1a\n": _png,
    b"\xff\xd8\xff": _jpeg,
    b"II*\x00": _tiff,
    b"MM\x00*": _tiff,
    b"II+\x00": _tiff,
    b"MM\x00+": _tiff,
}
_CMYK = "its colours are CMYK, which mean nothing without their printer: convert it to RGB"
_TRANSPARENT = "the picture is transparent in places: flatten it upon a background first"
_MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB", "YCbCr": "RGB"}


def _shallow(image: Image.Image) -> _Decoded:
    """At most 8 bits a channel."""
    if image.mode not in _MODES:
        raise BadInput(_CMYK if image.mode == "CMYK" else f"its colours are of mode {image.mode}: convert it to RGB")
    icc = image.info.get("icc_profile")
    mode = _MODES[image.mode]
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise BadInput(_TRANSPARENT)
    return np.asarray(image.convert(mode)), 8, icc


def _deep(data: bytes, grey: bool) -> np.ndarray:
    """16-bit whole numbers or floats."""
    code = np.frombuffer(data, np.uint8)
    with _quiet():
        raw = cv2.imdecode(code, cv2.IMREAD_UNCHANGED)
        opaque = 65535 if raw is not None and raw.dtype == np.uint16 else 1
        if raw is not None and raw.ndim == 3 and raw.shape[2] == 4 and raw[..., 3].min() < opaque:
            raise BadInput(_TRANSPARENT)
        values = cv2.imdecode(code, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR)  # drops alpha, turns upright
    if values is None:
        raise BadInput("the file is damaged or cut short")
    if values.dtype != np.uint16:
        if not np.isfinite(values).all():
            raise BadInput("the picture holds NaN or infinity: repair those pixels")
        if values.min() < 0 or values.max() > 1:
            raise BadInput(
                f"floating-point values must lie in [0, 1], these lie in [{values.min():g}, {values.max():g}]: "
                "subtract the black level and divide by the white level"
            )
    if values.ndim == 3:
        values = values[..., 0] if grey else values[..., ::-1]
    return values


@contextmanager
def _quiet() -> Iterator[None]:
    """Without OpenCV's remarks on stderr: what matters is raised."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
