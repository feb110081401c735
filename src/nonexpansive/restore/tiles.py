"""A denoiser on a photograph of any size, in bounded memory, with the certificate of the whole.

An output pixel of a network with finite reach depends only on inputs within that reach, so each tile is computed from itself and a
border of that width, and the tiles together are *the very map* of the whole picture, up to rounding: no seams, the same α.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput
from nonexpansive.math.certificate import Certificate, Shape, fold, rule
from nonexpansive.nn.models import Denoiser

ARRAYS = 6
"""Full-width arrays that one evaluation holds at once: state, pre-activation, activation, update, and the convolution's own."""


def bytes_per_pixel(denoiser: Denoiser) -> float:
    """About what evaluating the denoiser needs for each pixel of its input, in float32."""
    return 4 * (ARRAYS * denoiser.lifted.channels / denoiser.lifted.factor**2 + 3 * denoiser.channels)


class Tiled(nn.Module):
    """D evaluated tile by tile: the same map as D itself (B, C, H, W), σ → (B, C, H, W), in at most ``memory`` bytes for D's own arrays.

    Pictures that fit are evaluated whole. Raises BadInput if even the smallest tile, as wide as the reach, does not fit.
    """

    def __init__(self, denoiser: Denoiser, memory: float = 1e9) -> None:
        super().__init__()
        self.denoiser, self.memory = denoiser, float(memory)
        f = denoiser.lifted.factor
        self.border = -(-denoiser.reach // f) * f
        side = int((self.memory / bytes_per_pixel(denoiser)) ** 0.5) - 2 * self.border
        self.side = side - side % f
        if self.side < self.border:
            least = bytes_per_pixel(denoiser) * (3 * self.border + f) ** 2
            raise BadInput(f"memory of {self.memory / 1e6:.0f} MB is too little for this denoiser: give it at least {least / 1e6:.0f} MB")

    def whole(self, shape: Shape) -> bool:
        """Whether a picture (C, H, W) fits without tiles."""
        return shape[-2] * shape[-1] * bytes_per_pixel(self.denoiser) <= self.memory

    def forward(self, noisy: Tensor, sigma: float | Tensor) -> Tensor:
        if self.whole(tuple(noisy.shape)):
            return self.denoiser(noisy, sigma)
        out = torch.empty_like(noisy)
        height, width = noisy.shape[-2:]
        for top in range(0, height, self.side):
            for left in range(0, width, self.side):
                bottom, right = min(top + self.side, height), min(left + self.side, width)
                upper, outer = max(top - self.border, 0), max(left - self.border, 0)
                tile = noisy[..., upper : bottom + self.border, outer : right + self.border]
                inner = self.denoiser(tile, sigma)
                out[..., top:bottom, left:right] = inner[..., top - upper : bottom - upper, left - outer : right - outer]
        return out

    def extra_repr(self) -> str:
        return f"memory={self.memory / 1e6:.0f} MB, side={self.side}, border={self.border}"


@rule(Tiled)
def _tiled(module: Tiled, shape: Shape, unit: float) -> Certificate:
    inner = fold(module.denoiser, shape, unit)
    if module.whole(shape):
        return inner
    tiles = -(-shape[-2] // module.side) * -(-shape[-1] // module.side)
    name = f"Tiled: {tiles} tiles of {module.side} pixels with a border of {module.border}, the same map as whole"
    return replace(inner, rule=name, parts=(inner,))
