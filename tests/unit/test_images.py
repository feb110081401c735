from __future__ import annotations

import io
import json
import math
import os
import stat
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from nonexpansive.app.images import read_image, write_image
from nonexpansive.app.output import check_writable, write_json
from nonexpansive.atomic import atomic
from nonexpansive.errors import BadInput

random = np.random.default_rng(0)
COLOUR16 = random.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
COLOUR8 = (COLOUR16 >> 8).astype(np.uint8)


def encoded(suffix: str, values: np.ndarray) -> bytes:
    return cv2.imencode(suffix, values[..., ::-1] if values.ndim == 3 else values)[1].tobytes()


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *, extra: bytes = b"") -> bytes:
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(
    values: np.ndarray,
    *,
    order: Literal["<", ">"] = "<",
    photometric: int | None = None,
    following: int = 0,
    turn: int = 1,
) -> bytes:
    """An uncompressed TIFF, its tags before its data."""
    height, width, samples = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [
        (256, "I", [width]), (257, "I", [height]), (258, "H", [8 * values.itemsize] * samples), (259, "H", [1]),
        (262, "H", [(1 if samples < 3 else 2) if photometric is None else photometric]), (273, "I", [0]),
        (274, "H", [turn]), (277, "H", [samples]), (278, "I", [height]), (279, "I", [len(data)]), (284, "H", [1]),
        (339, "H", [kind] * samples),
    ]  # fmt: skip
    tail_at = 8 + 2 + 12 * len(tags) + 4
    tails = [b"" if len(v) * struct.calcsize(t) <= 4 else struct.pack(f"{order}{len(v)}{t}", *v) for _, t, v in tags]
    data_at = tail_at + sum(map(len, tails))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for (tag, t, v), tail in zip(tags, tails, strict=True):
        v = [data_at] if tag == 273 else v
        body = struct.pack(f"{order}I", tail_at) if tail else struct.pack(f"{order}{len(v)}{t}", *v).ljust(4, b"\0")
        head += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[t], len(v)) + body
        tail_at += len(tail)
    return head + struct.pack(f"{order}I", following) + b"".join(tails) + data


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def read(tmp_path: Path, data: bytes, name: str = "photo") -> np.ndarray:
    """What is read, (H, W, C), in float64."""
    (tmp_path / name).write_bytes(data)
    photo = read_image(tmp_path / name)
    assert photo.tensor.dtype == torch.float32 and photo.tensor.is_contiguous()
    return photo.tensor.permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize(
    "values", [COLOUR16, COLOUR8, COLOUR16[..., :1], COLOUR8[..., :1]], ids=["c16", "c8", "g16", "g8"]
)
def test_every_depth_is_read_in_full(tmp_path: Path, suffix: str, values: np.ndarray) -> None:
    scale = np.iinfo(values.dtype).max
    path = tmp_path / "photo"
    path.write_bytes(encoded(suffix, values if values.shape[2] == 3 else values[..., 0]))
    photo = read_image(path)
    assert photo.bits == 8 * values.itemsize and photo.path == path
    np.testing.assert_array_equal((photo.tensor * scale).round().permute(1, 2, 0).numpy(), values)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str, bits: int, channels: int) -> None:
    levels = torch.arange(2**bits if bits == 8 else 65536).reshape(-1, 16, 16) / (2**bits - 1)
    picture = levels.repeat(3, 1, 1)[:channels] if bits == 8 else levels[:channels]
    write_image(tmp_path / f"a{suffix}", picture, bits)
    photo = read_image(tmp_path / f"a{suffix}")
    assert photo.bits == bits and torch.equal(photo.tensor, picture)


def test_all_16_bit_levels_survive(tmp_path: Path) -> None:
    levels = (torch.arange(65536).reshape(1, 256, 256) / 65535).float()
    write_image(tmp_path / "a.png", levels, 16)
    assert torch.equal(read_image(tmp_path / "a.png").tensor, levels)


def test_jpeg(tmp_path: Path) -> None:
    smooth = torch.linspace(0, 1, 64).expand(3, 64, 64).contiguous() * torch.tensor([1, 0.5, 0.2]).view(3, 1, 1)
    write_image(tmp_path / "a.jpg", smooth)
    photo = read_image(tmp_path / "a.jpg")
    assert photo.bits == 8 and (photo.tensor - smooth).abs().max() < 0.02
    write_image(tmp_path / "g.jpeg", smooth[:1])
    assert read_image(tmp_path / "g.jpeg").tensor.shape == (1, 64, 64)


def test_values_are_clamped_and_rounded(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", torch.tensor([[[-1.0, 2.0, 0.5 + 1e-3, 0.4999 / 255]]]))
    assert (read_image(tmp_path / "a.png").tensor * 255).tolist() == [[[0, 255, 128, 0]]]


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_of_any_byte_order_and_type(tmp_path: Path, order: Literal["<", ">"]) -> None:
    np.testing.assert_allclose(read(tmp_path, tiff(COLOUR16, order=order)) * 65535, COLOUR16, atol=0.01)
    for kind in (np.float32, np.float64):
        values = random.random((4, 6, 3)).astype(kind)
        np.testing.assert_allclose(read(tmp_path, tiff(values, order=order)), values, atol=1e-7)
        np.testing.assert_allclose(read(tmp_path, tiff(values[..., :1], order=order)), values[..., :1], atol=1e-7)


def upright(values: np.ndarray) -> np.ndarray:
    return np.rot90(values, -1)  # orientation 6: turned a quarter clockwise to be shown


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_allclose(
        read(tmp_path, saved(Image.fromarray(COLOUR8), "PNG", exif=exif)) * 255, upright(COLOUR8), atol=1e-3
    )
    grey = Image.fromarray(COLOUR16[..., 0])
    np.testing.assert_allclose(
        read(tmp_path, saved(grey, "PNG", exif=exif))[..., 0] * 65535, upright(COLOUR16[..., 0]), atol=0.01
    )
    np.testing.assert_allclose(read(tmp_path, tiff(COLOUR16, turn=6)) * 65535, upright(COLOUR16), atol=0.01)
    np.testing.assert_allclose(read(tmp_path, tiff(COLOUR8, turn=6)) * 255, upright(COLOUR8), atol=1e-3)
    assert read(tmp_path, saved(Image.fromarray(COLOUR8), "JPEG", exif=exif)).shape == (7, 5, 3)


def test_palettes_bilevel_and_shallow_grey(tmp_path: Path) -> None:
    palette = Image.fromarray(COLOUR8).quantize(16)
    np.testing.assert_allclose(
        read(tmp_path, saved(palette, "PNG")) * 255, np.asarray(palette.convert("RGB")), atol=1e-3
    )
    np.testing.assert_allclose(
        read(tmp_path, saved(palette, "TIFF")) * 255, np.asarray(palette.convert("RGB")), atol=1e-3
    )
    assert set(read(tmp_path, saved(Image.new("1", (3, 3), 1), "PNG")).flatten()) == {1.0}
    np.testing.assert_allclose(read(tmp_path, png(4, 1, 2, 0, b"\0\x1b")).flatten(), np.arange(4) / 3, atol=1e-6)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_only_opaque_alpha_is_dropped(tmp_path: Path, kind: type) -> None:
    top = np.iinfo(kind).max
    values = random.integers(0, top, (4, 5, 4), dtype=kind)
    values[..., 3] = top
    for suffix in (".png", ".tiff"):
        np.testing.assert_allclose(
            read(tmp_path, cv2.imencode(suffix, values)[1].tobytes()) * top, values[..., 2::-1], atol=0.01
        )
        transparent = values.copy()
        transparent[0, 0, 3] = top - 1
        with pytest.raises(BadInput, match="flatten"):
            read(tmp_path, cv2.imencode(suffix, transparent)[1].tobytes())


def test_grey_with_alpha(tmp_path: Path) -> None:
    opaque = png(3, 1, 16, 4, b"\0" + struct.pack(">6H", 100, 65535, 200, 65535, 300, 65535))
    np.testing.assert_allclose(read(tmp_path, opaque)[0] * 65535, [[100], [200], [300]], atol=1e-2)
    assert read(tmp_path, png(2, 1, 8, 4, b"\0\x01\xff\x02\xff")).shape == (1, 2, 1)
    with pytest.raises(BadInput, match="flatten"):
        read(tmp_path, png(2, 1, 8, 4, b"\0\x01\xff\x02\xfe"))
    key = chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))  # a colour that stands for transparency
    with pytest.raises(BadInput, match="flatten"):
        read(tmp_path, png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 1, 2, 3), extra=key))


def bomb() -> bytes:
    return png(60000, 60000, 8, 2, b"")


def tall_tiff() -> bytes:
    return tiff(COLOUR16).replace(struct.pack("<HHII", 257, 4, 1, 5), struct.pack("<HHII", 257, 4, 1, 2**31))


def animated() -> bytes:
    frame = Image.fromarray(COLOUR8)
    return saved(frame, "PNG", save_all=True, append_images=[Image.fromarray(255 - COLOUR8)])


BIG16 = random.integers(0, 65536, (60, 90, 3), dtype=np.uint16)
NAN = np.where(np.arange(15).reshape(3, 5, 1) == 7, np.nan, 0.5).astype(np.float32)
BAD = {
    "empty": (b"", "empty"),
    "text": (b"hello, I am no picture", "not a PNG"),
    "gif": (saved(Image.new("L", (4, 4)), "GIF"), "convert"),
    "bomb": (bomb(), "million pixels"),
    "bomb tiff": (tall_tiff(), "million pixels"),
    "cut png": (saved(Image.fromarray((BIG16 >> 8).astype(np.uint8)), "PNG")[:-200], "cut short"),
    "cut png 16": (encoded(".png", BIG16)[:-200], "cut short"),
    "damaged png 16": (encoded(".png", BIG16)[:600] + b"x" + encoded(".png", BIG16)[601:], "damaged"),
    "cut jpeg": (saved(Image.fromarray((BIG16 >> 8).astype(np.uint8)), "JPEG")[:-1000], "cut short"),
    "cut tiff": (tiff(BIG16)[:-100], "cut short"),
    "cut tiff 8": (tiff((BIG16 >> 8).astype(np.uint8))[:-100], "cut short"),
    "cut tiff tags": (encoded(".tiff", BIG16)[:500], "cut short"),
    "only a signature": (b"\x89PNG\r\n\x1a\n", "cut short"),
    "zero width": (png(0, 2, 8, 2, b"\0\0"), "save it anew"),
    "cmyk": (saved(Image.new("CMYK", (4, 4)), "JPEG"), "RGB"),
    "cmyk tiff": (saved(Image.new("CMYK", (4, 4)), "TIFF"), "RGB"),
    "lab": (saved(Image.new("LAB", (4, 4)), "TIFF"), "convert"),
    "two channels": (tiff(COLOUR16[..., :2]), "2 channels"),
    "pages": (tiff(COLOUR16, following=8), "pages"),
    "animated": (animated(), "frame"),
    "nan": (tiff(NAN), "NaN"),
    "bright floats": (tiff(np.full((3, 3, 1), 2.0, np.float32)), "white level"),
    "signed": (tiff(np.zeros((3, 3, 1), np.int16)), "16 bits"),
    "32 bits": (tiff(np.zeros((3, 3, 1), np.uint32)), "16 bits"),
    "white at zero": (tiff(COLOUR16[..., :1], photometric=0), "black at zero"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_a_remedy(tmp_path: Path, case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(BadInput, match=message) as caught:
        read(tmp_path, data, "bad.png")
    assert "bad.png" in str(caught.value)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(BadInput, match="not a file"):
        read_image(tmp_path)


def test_the_limit_is_the_callers(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(encoded(".png", COLOUR8))
    assert read_image(tmp_path / "a", max_pixels=35).tensor.shape == (3, 5, 7)
    with pytest.raises(BadInput, match="limit"):
        read_image(tmp_path / "a", max_pixels=34)


def test_every_prefix_of_a_file_is_refused(tmp_path: Path) -> None:
    jpeg = saved(Image.fromarray(COLOUR8), "JPEG")
    for data in (encoded(".png", COLOUR16), encoded(".tiff", COLOUR8), tiff(COLOUR16), jpeg):
        for end in range(0, len(data) - 12, 7):  # what follows is padding, or an end mark that decoders forgive
            with pytest.raises(BadInput):
                read(tmp_path, data[:end])


def test_the_colour_profile_is_kept(tmp_path: Path) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(COLOUR8), "PNG", icc_profile=icc))
    photo = read_image(tmp_path / "a.png")
    assert photo.icc == icc
    for name, bits in (("b.png", 16), ("b.jpg", 8)):
        write_image(tmp_path / name, photo.tensor, bits, photo.icc)
        assert read_image(tmp_path / name).icc == icc
    write_image(tmp_path / "grey.png", photo.tensor[:1], 8, photo.icc)  # a colour profile says nothing of grey
    assert read_image(tmp_path / "grey.png").icc is None


@pytest.mark.parametrize(
    ("name", "tensor", "bits", "message"),
    [
        ("a.bmp", torch.zeros(1, 2, 2), 8, "end in"),
        ("a.jpg", torch.zeros(1, 2, 2), 16, "16"),
        ("a.png", torch.zeros(1, 2, 2), 12, "12"),
        ("a.png", torch.zeros(2, 2, 2), 8, "shape"),
        ("a.png", torch.zeros(1, 1, 2, 2), 8, "shape"),
        ("a.png", torch.zeros(1, 0, 2), 8, "shape"),
        ("a.png", torch.tensor([[[math.nan]]]), 8, "NaN"),
        ("missing/a.png", torch.zeros(1, 2, 2), 8, "not written"),
    ],
)
def test_bad_pictures_are_not_written(tmp_path: Path, name: str, tensor: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        write_image(tmp_path / name, tensor, bits)
    assert not list(tmp_path.iterdir())


# ---- output


def test_atomic_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.parent == tmp_path and temporary.suffix == ".txt"
    assert path.stat().st_mode & 0o777 == 0o666 & ~(mask := os.umask(0)) and os.umask(mask) == 0
    path.chmod(0o640)
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text(f"half{1 / 0}")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    with atomic(path) as temporary:
        temporary.write_text("second")
    assert path.read_text() == "second" and path.stat().st_mode & 0o777 == 0o640


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, sys; from nonexpansive.atomic import atomic\n"
        "with atomic(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -9
    assert path.read_text() == "old"


def test_atomic_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_atomic_replaces_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(BadInput, match="no file"), atomic(path):
            pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_atomic_takes_every_name_that_a_file_may_have(tmp_path: Path) -> None:
    path = tmp_path / ("字" * 83 + ".png")  # 253 bytes
    with atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="full"):
        write_json(tmp_path / "a.json", 2)
    assert json.loads((tmp_path / "a.json").read_text()) == 1 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_device(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="full"), atomic(tmp_path / "a"):
        Path("/dev/full").write_bytes(b"x")
    assert not list(tmp_path.iterdir())


def test_check_writable(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"x")
    (tmp_path / "link.png").symlink_to(photo)
    (tmp_path / "hard.png").hardlink_to(photo)
    (tmp_path / "directory.png").mkdir()
    check_writable(tmp_path / "new.JPG", [photo])
    check_writable(tmp_path / "r.json", [photo], (".json",))
    for name in ("photo.png", "link.png", "hard.png", "../" + tmp_path.name + "/photo.png"):
        with pytest.raises(BadInput, match="never overwritten"):
            check_writable(tmp_path / name, ["elsewhere.png", photo])
    for name, message in (("a.gif", "end in"), ("none/a.png", "no directory"), ("directory.png", "not a file")):
        with pytest.raises(BadInput, match=message):
            check_writable(tmp_path / name)


def test_json_is_strict(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Part:
        psnr: float
        path: Path

    arrays = (math.nan, torch.ones(2), np.float64(-math.inf))
    value = {"a": [1, 2.5, None, True, "é"], "b": Part(math.inf, Path("x")), "c": arrays}
    write_json(tmp_path / "a.json", value)
    back = json.loads((tmp_path / "a.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert back == {
        "a": [1, 2.5, None, True, "é"],
        "b": {"psnr": "Infinity", "path": "x"},
        "c": ["NaN", [1.0, 1.0], "-Infinity"],
    }
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", object())
    assert not (tmp_path / "b.json").exists()
