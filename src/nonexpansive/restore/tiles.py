"""A denoiser on a photograph of any size, in bounded memory, with the certificate of the whole.

An output pixel of a network with finite reach depends only on inputs within that reach, so each tile is computed from itself and a
border of that width, and the tiles together are *the very map* of the whole picture, up to rounding: no seams, the same α. A proximal
denoiser minimises over the whole picture: its reach is not finite, and it is evaluated whole.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput
from nonexpansive.math.certificate import Certificate, Shape, fold, rule
from nonexpansive.math.enclosure import Affine
from nonexpansive.math.rounding import root, times
from nonexpansive.nn.models import Denoiser, ImageDenoiser, ProximalDenoiser

ARRAYS = 6
"""Full-width arrays that one evaluation holds at once: state, pre-activation, activation, update, and the convolution's own."""


def bytes_per_pixel(denoiser: ImageDenoiser) -> float:
    """About what evaluating the denoiser needs for each pixel of its input, in float32."""
    return 4 * (ARRAYS * denoiser.width + 3 * denoiser.channels)


class Tiled(nn.Module):
    """D evaluated tile by tile: the same map as D itself (B, C, H, W), σ → (B, C, H, W), in at most ``memory`` bytes for D's own arrays.
    What the C library keeps between them comes on top, at most about as much again (``benchmarks/speed.py`` measures the sum).

    Pictures that fit are evaluated whole, a batch one by one where it does not fit together. Raises BadInput if even the smallest tile,
    as wide as the reach, does not fit, and for tiles in training mode, where D's reach is not settled. A :class:`ProximalDenoiser` takes
    what it needs, about ``bytes_per_pixel``.
    """

    def __init__(self, denoiser: ImageDenoiser, memory: float = 5e8) -> None:
        super().__init__()
        if not memory > 0:
            raise BadInput(f"memory is a number of bytes above 0, not {memory}")
        self.denoiser, self.memory = denoiser, float(memory)
        if isinstance(denoiser, Denoiser):
            self.layout()

    def whole(self, shape: Shape) -> bool:
        """Whether a picture (C, H, W) fits without tiles."""
        fits = shape[-2] * shape[-1] * bytes_per_pixel(self.denoiser) <= self.memory
        return fits or isinstance(self.denoiser, ProximalDenoiser)

    @property
    def solved(self) -> bool:
        """Whether D is solved for, and takes a picture to begin from."""
        return isinstance(self.denoiser, ProximalDenoiser)

    def regulariser(self, x: Tensor, sigma: float | Tensor) -> Tensor | None:
        """R of D = prox_R, where D can tell."""
        return self.denoiser.regulariser(x, sigma) if isinstance(self.denoiser, ProximalDenoiser) else None

    def layout(self) -> tuple[int, int]:
        """(side, border): each tile is a square of ``side`` pixels and what is within ``border`` of it. Both are multiples of D's
        factor, so that tiles are unshuffled as the whole picture is."""
        assert isinstance(self.denoiser, Denoiser)
        f = self.denoiser.alignment
        border = -(-self.denoiser.reach // f) * f
        side = int(min(self.memory / bytes_per_pixel(self.denoiser), 2.0**60) ** 0.5) - 2 * border
        side -= side % f
        if side < border:
            least = bytes_per_pixel(self.denoiser) * (3 * border + f) ** 2
            raise BadInput(
                f"memory of {self.memory / 1e6:.0f} MB is too little for this denoiser: give it at least {least / 1e6:.0f} MB"
            )
        return side, border

    def forward(self, noisy: Tensor, sigma: float | Tensor, near: Tensor | None = None) -> Tensor:
        """``near``: as for a :class:`ProximalDenoiser`, and for one only."""
        whole = self.whole(tuple(noisy.shape))
        if len(noisy) > 1 and not (
            whole and len(noisy) * noisy[0, 0].numel() * bytes_per_pixel(self.denoiser) <= self.memory
        ):
            levels = sigma.reshape(-1).expand(len(noisy)) if isinstance(sigma, Tensor) else [sigma] * len(noisy)
            begin = [None] * len(noisy) if near is None else near[:, None]
            return torch.cat([self(x[None], level, at) for x, level, at in zip(noisy, levels, begin, strict=True)])
        if whole:
            return self.denoiser(noisy, sigma) if near is None else self.denoiser(noisy, sigma, near)
        if self.denoiser.training:
            raise BadInput("a picture is evaluated in tiles in evaluation mode only: call .eval()")
        out = torch.empty_like(noisy)
        height, width = noisy.shape[-2:]
        side, border = self.layout()
        for top in range(0, height, side):
            for left in range(0, width, side):
                bottom, right = min(top + side, height), min(left + side, width)
                upper, outer = max(top - border, 0), max(left - border, 0)
                tile = noisy[..., upper : bottom + border, outer : right + border]
                inner = self.denoiser(tile, sigma)
                out[..., top:bottom, left:right] = inner[
                    ..., top - upper : bottom - upper, left - outer : right - outer
                ]
        return out

    def extra_repr(self) -> str:
        return f"memory={self.memory / 1e6:.0f} MB"


@rule(Tiled)
def _tiled(module: Tiled, shape: Shape, unit: float) -> Certificate:
    inner = fold(module.denoiser, shape, unit)
    if module.whole(shape):
        return inner
    side, border = module.layout()
    rows, columns = -(-shape[-2] // side), -(-shape[-1] // side)
    # the errors of the tiles add up as squares; a pixel is in at most ``shared`` tiles, whose own squares sum to that many ‖x‖²
    tile = fold(module.denoiser, (shape[0], *(min(n, side + 2 * border) for n in shape[1:])), unit)
    shared = min(rows, 2 * -(-border // side) + 1) * min(columns, 2 * -(-border // side) + 1)
    return replace(
        inner,
        error=Affine(times(tile.error.slope, root(shared)), times(tile.error.constant, root(rows * columns))),
        rule=f"Tiled: {rows * columns} tiles of {side} pixels with a border of {border}, the same map as whole",
        parts=(inner,),
    )
