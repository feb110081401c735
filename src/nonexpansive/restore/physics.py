"""How a photograph was spoilt: blur kernels, the blurring map A, and noise. Convolutions and noise are deepinv's.

A picture is a tensor (B, C, H, W) with values in [0, 1]; a kernel k is (h, w), non-negative, of sum 1, and is
*convolved*, so that the blurred image of a single bright point is k itself, its centre k[h//2, w//2] upon the point.
deepinv is imported where it is used, so that the package works without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.rounding import up
from nonexpansive.restore.likelihood import Likelihood, likelihood_of

Boundary = Literal["circular", "valid"]

MAX_KERNEL_SIDE = 1001
KERNEL_FORMS = """\
  gaussian:STD             a Gaussian of standard deviation STD pixels, e.g. gaussian:1.6
  disk:RADIUS              a disk (out of focus) of RADIUS pixels, e.g. disk:3.5
  box:SIDE                 a uniform square, SIDE pixels (odd), e.g. box:9
  motion:LENGTH,ANGLE      a straight motion of LENGTH pixels, at ANGLE degrees anticlockwise, e.g. motion:15,30
  shake:SIDE,seed=SEED     a random camera shake within SIDE pixels (odd), e.g. shake:27,seed=3
  FILE                     .npy or .csv (a matrix of numbers), .png or .tiff (grey)"""


# ---- kernels


def kernel(spec: str) -> Tensor:
    """The blur kernel that ``spec`` describes: float32 (h, w), non-negative, normalised to sum 1 in float64.

    ``spec`` is one of ``gaussian:STD``, ``disk:RADIUS``, ``box:SIDE``, ``motion:LENGTH,ANGLE``,
    ``shake:SIDE,seed=SEED``, or the name of a file: ``.npy``, ``.csv``, ``.png``, ``.tiff``. Raises ``BadInput``, with
    the accepted forms, for anything else, and for kernels that are negative, not finite, all zero, not two-dimensional
    or above 1001 pixels a side.
    """
    name, colon, text = spec.partition(":")
    if colon and name in _SHAPES:
        make, *names = _SHAPES[name]
        values = make(*_numbers(spec, text, names))
    elif Path(spec).suffix.lower() in _FILES:
        values = _from_file(Path(spec))
    else:
        raise BadInput(f"no kernel is called {spec!r}. Accepted:\n{KERNEL_FORMS}")
    return _normalised(values, spec)


def _numbers(spec: str, text: str, names: list[str]) -> list[float]:
    """The numbers of ``a,b`` or ``a,name=b``, in the order of ``names``."""
    parts = [part.strip().removeprefix(f"{name}=") for part, name in zip(text.split(","), names, strict=False)]
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != len(names) or len(text.split(",")) != len(names) or not all(map(math.isfinite, numbers)):
        raise BadInput(f"kernel {spec!r}: {' and '.join(names)} expected after the colon. Accepted:\n{KERNEL_FORMS}")
    return numbers


def _within(what: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise BadInput(f"a kernel's {what} must lie in [{low:g}, {high:g}], got {value:g}")
    return value


def _odd(what: str, value: float) -> int:
    side = int(_within(what, value, 1, MAX_KERNEL_SIDE))
    if side != value or side % 2 == 0:
        raise BadInput(f"a kernel's {what} must be odd and whole, so that the picture is not shifted; got {value:g}")
    return side


def _gaussian(std: float) -> np.ndarray:
    radius = math.ceil(3 * _within("standard deviation", std, 1e-2, 150))
    line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
    return np.outer(line, line)


def _disk(radius: float) -> np.ndarray:
    """The share of each pixel that the disk covers, by 16 x 16 samples."""
    reach = math.ceil(_within("radius", radius, 1e-2, 400) - 0.5)
    samples = (np.arange((2 * reach + 1) * 16) + 0.5) / 16 - (reach + 0.5)
    inside = samples[:, None] ** 2 + samples[None] ** 2 <= radius**2
    if not inside.any():  # a disk smaller than a sample blurs nothing
        return np.ones((1, 1))
    return inside.reshape(2 * reach + 1, 16, 2 * reach + 1, 16).mean((1, 3))


def _box(side: float) -> np.ndarray:
    return np.ones((_odd("side", side),) * 2)


def _motion(length: float, angle: float) -> np.ndarray:
    """A point moving evenly on a straight segment about the centre, each position shared bilinearly by four pixels."""
    _within("length", length, 0, MAX_KERNEL_SIDE - 3)
    along = length * ((np.arange(n := 64 * math.ceil(length + 1)) + 0.5) / n - 0.5)
    x, y = along * math.cos(math.radians(angle)), -along * math.sin(math.radians(angle))

    def shares(position: np.ndarray) -> np.ndarray:
        reach = math.ceil(abs(position).max() - 1e-9)
        return np.maximum(0, 1 - abs(np.arange(-reach, reach + 1)[:, None] - position))

    return shares(y) @ shares(x).T


def _shake(side: float, seed: float) -> np.ndarray:
    from deepinv.physics.generator import MotionBlurGenerator

    if seed != int(seed) or not 0 <= seed < 2**63:
        raise BadInput(f"the seed of a shake kernel must be a whole number from 0, got {seed:g}")
    side = _odd("side", side)
    generator = MotionBlurGenerator((side, side), rng=torch.Generator().manual_seed(int(seed)))
    return generator.step()["filter"][0, 0].numpy()


_SHAPES: dict[str, tuple[Any, ...]] = {
    "gaussian": (_gaussian, "std"),
    "disk": (_disk, "radius"),
    "box": (_box, "side"),
    "motion": (_motion, "length", "angle"),
    "shake": (_shake, "side", "seed"),
}


def _grey(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path, formats=("PNG", "TIFF")) as picture:
        if max(picture.size) > MAX_KERNEL_SIDE:
            raise BadInput(f"kernel {str(path)!r} is {picture.size[0]} x {picture.size[1]}: {_TOO_LARGE}")
        if picture.mode not in ("1", "L", "I;16", "I;16B", "I", "F"):
            raise BadInput(f"kernel {str(path)!r} is a picture of mode {picture.mode}: save it as grey, without alpha")
        return np.asarray(picture, dtype=np.float64)


_TOO_LARGE = f"a kernel may have at most {MAX_KERNEL_SIDE} pixels a side"
_FILES: dict[str, Callable[[Path], np.ndarray]] = {
    ".npy": lambda path: np.load(path, allow_pickle=False),
    ".csv": lambda path: np.loadtxt(path, delimiter=",", ndmin=2),
    ".png": _grey,
    ".tif": _grey,
    ".tiff": _grey,
}


def _from_file(path: Path) -> np.ndarray:
    if not path.is_file():
        raise BadInput(f"there is no kernel file {str(path)!r}. Accepted:\n{KERNEL_FORMS}")
    if path.stat().st_size > 64 * 2**20:
        raise BadInput(f"kernel {str(path)!r} is above 64 MiB: {_TOO_LARGE}")
    try:
        values = _FILES[path.suffix.lower()](path)
    except BadInput:
        raise
    except Exception as error:  # whatever a decoder says of a bad file
        raise BadInput(f"kernel {str(path)!r} cannot be read: {error}") from error
    return values


def _normalised(values: np.ndarray, spec: str) -> Tensor:
    if not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)):
        raise BadInput(f"kernel {spec!r} holds {values.dtype}, not real numbers")
    if values.ndim != 2 or 0 in values.shape:
        raise BadInput(f"kernel {spec!r} has shape {values.shape}: a matrix (h, w) is expected")
    if max(values.shape) > MAX_KERNEL_SIDE:
        raise BadInput(f"kernel {spec!r} has shape {values.shape}: {_TOO_LARGE}")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise BadInput(f"kernel {spec!r} holds NaN or infinity")
    if (values < 0).any():
        raise BadInput(f"kernel {spec!r} has negative entries: a blur averages, so clip them to zero first")
    if values.max() == 0:
        raise BadInput(f"kernel {spec!r} is zero everywhere")
    values = values / values.max()  # so that the sum cannot overflow
    return torch.from_numpy(values / values.sum()).float()


# ---- the blurring map


@dataclass(frozen=True, eq=False)
class Blurring:
    """The linear map A: x ↦ k ∗ x, each channel alike, from pictures (B, C, H, W) to data. Made by ``blur``.

    ``boundary`` "circular": the picture continues periodically, data and picture have one size. "valid": only the data
    whose kernel lies wholly within the picture are kept, (H - h + 1, W - w + 1): the true model of a photograph, whose
    unseen surroundings are part of the unknown. ``norm`` ≥ ‖A‖ in exact arithmetic (see ``blur``).
    """

    physics: Any  # deepinv.physics.BlurFFT; "valid" is its crop, exactly, at a third of the cost of deepinv's own
    kernel: Tensor
    boundary: Boundary
    image_shape: tuple[int, int, int]
    data_shape: tuple[int, int, int]
    norm: float

    @property
    def lipschitz(self) -> float:
        """norm², rounded up: bounds the Lipschitz constant of the gradient Aᵀ(Ax - y) of ½‖Ax - y‖²."""
        return up(self.norm * self.norm)

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Rows and columns (left, right, top, bottom) of the picture that lie outside the data's frame."""
        if self.boundary == "circular":
            return 0, 0, 0, 0
        h, w = self.kernel.shape
        return w - 1 - w // 2, w // 2, h - 1 - h // 2, h // 2

    def A(self, x: Tensor) -> Tensor:
        """k ∗ x: (B, *image_shape) to (B, *data_shape)."""
        check(x, self.image_shape, "a picture")
        return self.crop(self.physics.A(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Aᵀy: (B, *data_shape) to (B, *image_shape)."""
        check(y, self.data_shape, "data")
        return self.physics.A_adjoint(torch.nn.functional.pad(y, self.margins))

    def crop(self, x: Tensor) -> Tensor:
        """The part of a picture that the data show, pixel upon pixel: to compare x with y, or with the truth."""
        left, right, top, bottom = self.margins
        return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]

    def start(self, y: Tensor) -> Tensor:
        """A picture to start from: the data, continued by their border values where "valid" leaves them unknown."""
        check(y, self.data_shape, "data")
        return torch.nn.functional.pad(y, self.margins, mode="replicate")

    def prox(self, z: Tensor, y: Tensor, tau: float) -> Tensor:
        """argmin_x ½‖Ax - y‖² + ‖x - z‖²/(2τ), in closed form. "valid" has none: raises ``Refused``."""
        if self.boundary != "circular":
            raise Refused(
                "the proximal map of a 'valid' blur has no closed form, and a truncated solver would be outside the "
                "certificate: use a method that takes gradients (forward-backward), or the boundary 'circular'"
            )
        if not tau > 0:
            raise ValueError(f"tau must be positive, got {tau}")
        check(z, self.image_shape, "a picture")
        check(y, self.data_shape, "data")
        return self.physics.prox_l2(z, y, gamma=tau)

    def symbol(self) -> Tensor:
        """k̂ on the picture's frequencies, (H, W//2 + 1), complex, as of ``torch.fft.rfft2``; computed in float64."""
        from deepinv.physics.functional import filter_fft

        symbol = filter_fft(self.kernel.double(), self.image_shape[1:], dims=(-2, -1))
        return symbol if self.kernel.dtype == torch.float64 else symbol.to(torch.complex64)


def blur(kernel: Tensor, shape: tuple[int, int, int], boundary: Boundary = "circular") -> Blurring:
    """The blurring by ``kernel`` (h, w) of pictures of ``shape`` (C, H, W), in the kernel's dtype and on its device.

    Its ``norm`` is ‖k‖₁ rounded up, by Young's inequality ‖k ∗ x‖ ≤ ‖k‖₁‖x‖; for a non-negative kernel this is max|k̂|
    itself, taken at frequency zero. The symbol that is stored in the working precision counts too, where it is larger.

    Raises ``BadInput`` if the kernel is not a finite, non-negative, non-zero matrix, or is larger than the picture.
    """
    from deepinv.physics import BlurFFT

    if boundary not in ("circular", "valid"):
        raise BadInput(f"the boundary must be 'circular' or 'valid', got {boundary!r}")
    if kernel.ndim != 2 or not kernel.is_floating_point():
        raise BadInput(f"a kernel is a floating-point matrix (h, w), got {kernel.dtype} of shape {tuple(kernel.shape)}")
    if not bool(torch.isfinite(kernel).all()) or bool((kernel < 0).any()) or not bool((kernel > 0).any()):
        raise BadInput("a kernel must be finite, non-negative and not zero everywhere")
    channels, height, width = shape
    h, w = kernel.shape
    if h > height or w > width:
        raise BadInput(
            f"the kernel ({h} x {w}) is larger than the picture ({height} x {width}): "
            "take a smaller kernel or a larger picture"
        )
    physics: Any = BlurFFT(img_size=shape, filter=kernel[None, None], device=kernel.device)
    stored = (physics.mask.double()[..., 0] * physics.angle.to(torch.complex128).abs()).max().item()
    norm = up(max(math.fsum(kernel.double().flatten().tolist()), up(stored)))
    data_shape = shape if boundary == "circular" else (channels, height - h + 1, width - w + 1)
    return Blurring(physics, kernel, boundary, shape, data_shape, norm)


def image_shape(data_shape: tuple[int, int, int], kernel: Tensor, boundary: Boundary) -> tuple[int, int, int]:
    """The shape of the unknown picture behind data of ``data_shape``: ``blur(kernel, image_shape(...), boundary)``."""
    channels, height, width = data_shape
    if boundary == "circular":
        return data_shape
    return channels, height + kernel.shape[0] - 1, width + kernel.shape[1] - 1


def check(x: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Raises BadInput unless x is (B, *shape)."""
    if tuple(x.shape[1:]) != shape:
        raise BadInput(f"{what} of shape (B, {', '.join(map(str, shape))}) is expected, got {tuple(x.shape)}")


# ---- noise


def noise_level(text: str, most: float = 1.0) -> float:
    """A noise level up to ``most``, in the unit of [0, 1] pictures, from ``1%``, ``0.01`` or ``2.55/255``. Raises ``BadInput``."""
    number, slash, scale = text.strip().partition("/")
    try:
        level = float(number[:-1]) / 100 if number.endswith("%") and not slash else float(number)
        level = level / float(scale) if slash else level
    except (ValueError, ZeroDivisionError):
        level = math.nan
    if not 0 <= level <= most:
        limits = "between 0 and 1 (white)" if most == 1 else f"between 0 and {most:g} (1: white)"
        raise BadInput(
            f"noise level {text!r}: a standard deviation {limits} is expected, "
            "as a share (0.01), in percent (1%) or on a scale (2.55/255)"
        )
    return level


class Forward(Protocol):
    """What noise is added to: a map A, of whose data the mask ``measured``, where there is one, says which entries are measured."""

    def A(self, x: Tensor) -> Tensor: ...


def degrade(x: Tensor, data: Forward, noise: float | Likelihood, seed: int = 0) -> Tensor:
    """Data y of the picture x, (B, *image_shape) to (B, *data_shape), not clipped: Ax and noise of a likelihood, or Gaussian noise of
    standard deviation ``noise``, drawn on the CPU from ``seed``, so that it is the same on every device. Entries that the forward
    model does not measure get none. Raises ``BadInput`` for a level that is negative or not finite."""
    likelihood = likelihood_of(noise)
    u = data.A(x)
    y = likelihood.sample(u, torch.Generator().manual_seed(seed))
    measured = getattr(data, "measured", None)
    return y if measured is None else torch.where(measured.to(u.device) != 0, y, u)
