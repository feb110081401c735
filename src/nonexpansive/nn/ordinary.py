"""The ordinary denoiser, beside which those with a certificate are shown."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.certificate import Certificate, Shape, chain, fold, require_out_of_place, rule
from nonexpansive.math.rules import linear
from nonexpansive.nn.control import sound_norm
from nonexpansive.nn.resize import Residual, residual


class DnCNN(nn.Module):
    """The denoiser of Zhang et al. (IEEE TIP 2017): y ↦ y + F(y), F trained to be minus the noise.

    F is ``layers`` 3x3 convolutions of ``features`` channels, ReLU between them, batch-norm behind all but the first and the last:
    670,531 parameters as given. ``model(noisy, sigma)`` takes images (B, ``channels``, H, W) in [0, 1]; it knows the one noise level that
    it was trained at, so σ, which every denoiser here is given, does not enter. Nothing holds its Lipschitz constant: what is proved,
    in evaluation mode, is 1 plus the product of its layers' norms, and that is astronomically large.
    """

    def __init__(self, channels: int = 3, features: int = 64, layers: int = 20) -> None:
        super().__init__()
        if channels not in (1, 3) or features < 1 or layers < 2:
            raise BadInput(
                f"a DnCNN has 1 or 3 channels, at least 1 feature and 2 layers, not {channels}, {features} and {layers}"
            )
        self.channels = channels
        hidden: list[nn.Module] = []
        for _ in range(layers - 2):
            convolution = nn.Conv2d(features, features, 3, padding=1)
            # near the identity: the noise is lost in many random layers, and hundreds of steps go by before it is found again
            with torch.no_grad():
                convolution.weight += nn.init.dirac_(torch.empty_like(convolution.weight))
            hidden += [convolution, nn.BatchNorm2d(features), nn.ReLU()]
        first, last = nn.Conv2d(channels, features, 3, padding=1), nn.Conv2d(features, channels, 3, padding=1)
        self.residual = Residual(nn.Sequential(first, nn.ReLU(), *hidden, last))

    def forward(self, noisy: Tensor, sigma: float | Tensor) -> Tensor:
        if noisy.ndim != 4 or noisy.shape[1] != self.channels:
            raise BadInput(f"this denoiser takes images (B, {self.channels}, H, W), not {tuple(noisy.shape)}")
        return self.residual(noisy)


@rule(DnCNN)
def _dncnn(module: DnCNN, shape: Shape, unit: float) -> Certificate:
    if len(shape) != 3 or shape[0] != module.channels:
        raise Refused(f"this denoiser takes images of shape ({module.channels}, H, W), not {shape}")
    require_out_of_place(module, "which DnCNN uses again")
    inner = getattr(module.residual, "inner", None)
    if type(module.residual) is not Residual or type(inner) is not nn.Sequential:
        raise Refused("a part of this DnCNN was replaced by another type, which its rule does not know")
    parts: list[Certificate] = []
    for layer in inner:  # each norm bounded for every size of image at once, and remembered
        domain = parts[-1].codomain if parts else shape
        plain = type(layer) is nn.Conv2d
        parts.append(linear(layer, domain, unit, sound_norm(layer)) if plain else fold(layer, domain, unit))
    name = "DnCNN: L ≤ 1 + the product of the norms of its layers"
    return replace(residual(chain(*parts, rule="the residual of DnCNN"), unit), rule=name)
