from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nonexpansive import certify, load
from nonexpansive.errors import BadInput, Refused
from nonexpansive.nn.models import Denoiser
from nonexpansive.restore import fixed_point, splitting
from nonexpansive.restore.adapters import Uncertified, from_deepinv, from_physics, to_deepinv
from nonexpansive.restore.operators import MODELS, settings
from nonexpansive.restore.physics import blur, degrade, kernel
from nonexpansive.restore.steps import AtLevel
from nonexpansive.restore.tiles import Tiled

pytest.importorskip("deepinv")

SIGMA, NOISE = 0.05, 0.02


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    model = load("denoiser-grey")
    assert isinstance(model, Denoiser)
    return model


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """48 x 48 pixels of the face in the photograph that ships, grey."""
    with files("nonexpansive").joinpath("photographs/astronaut.png").open("rb") as file:
        grey = np.asarray(Image.open(file).convert("L"), dtype=np.float32) / 255
    return torch.from_numpy(grey[80:128, 200:248].copy())[None, None]


def uncertified() -> Any:
    from deepinv.models import DnCNN

    torch.manual_seed(0)
    return DnCNN(in_channels=1, out_channels=1, depth=3, nf=4, pretrained=None).eval()


# ---- ours in deepinv


@torch.no_grad()
def test_our_denoiser_as_deepinv_calls_it(denoiser: Denoiser) -> None:
    from deepinv.models import Denoiser as Base

    wrapped = to_deepinv(denoiser)
    assert isinstance(wrapped, Base)
    x, levels = torch.rand(2, 1, 16, 17), torch.tensor([0.05, 0.2])
    expected = torch.cat([denoiser(x[:1], 0.05), denoiser(x[1:], 0.2)])
    for form in (levels, levels.double(), levels.view(2, 1, 1, 1)):
        torch.testing.assert_close(wrapped(x, form, physics=None), expected)
    for form in (0.05, torch.tensor(0.05), torch.tensor([0.05]), levels[:1].view(1, 1, 1, 1)):
        torch.testing.assert_close(wrapped(x, form), denoiser(x, 0.05))
    with pytest.raises(BadInput, match="2 samples"):
        wrapped(x, torch.ones(3))
    assert from_deepinv(wrapped) is denoiser
    torch.testing.assert_close(to_deepinv(Tiled(denoiser))(x, 0.05), denoiser(x, 0.05))
    with pytest.raises(BadInput, match="Denoiser of this library"):
        to_deepinv(torch.nn.Identity())  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def test_deepinvs_plug_and_play_gets_our_fixed_points(denoiser: Denoiser, photograph: Tensor) -> None:
    """deepinv's L2(s) is ‖Ax - y‖²/(2s²), so its step γ is our τ = γ/s²."""
    from deepinv.loss.metric import PSNR
    from deepinv.optim import DRS, HQS, L2, PGD, PnP
    from deepinv.physics import BlurFFT

    blurring = blur(kernel("gaussian:1.2"), (1, 48, 48))
    y, s = degrade(photograph, blurring, NOISE, seed=0), 0.1
    tau = 1.9 / blurring.lipschitz
    physics: Any = BlurFFT(img_size=(1, 48, 48), filter=blurring.kernel[None, None])
    # Douglas-Rachford needs α ≤ 1/2, so both take the relaxed denoiser, and apply it first
    methods: list[Any] = [("forward-backward", PGD), ("half-quadratic", HQS), ("douglas-rachford", DRS)]
    for method, optimiser in methods:
        relaxed = method == "douglas-rachford"
        iteration: Any = splitting(method, denoiser, blurring, y, sigma=SIGMA, tau=tau, relax=relaxed)
        certificate = certify(iteration, (1, 48, 48))
        ours = fixed_point(iteration, blurring.start(y), certificate=certificate, tolerance=1e-6, iterations=1000)
        assert ours.converged
        theirs = optimiser(
            data_fidelity=L2(sigma=s),
            prior=PnP((lambda x, _, T=iteration: T.denoiser(x)) if relaxed else to_deepinv(denoiser)),
            stepsize=tau * s**2,
            sigma_denoiser=SIGMA,
            g_first=relaxed,
            max_iter=1000,
            early_stop=True,
            thres_conv=1e-6,
        )
        x = theirs(y, physics)
        # the starts differ: theirs is Aᵀy
        assert float((x - ours.image).norm() / ours.image.norm()) < 1e-5, method
        assert float(PSNR()(x, photograph)) > float(PSNR()(y, photograph)) + 1


def test_deepinvs_trainer_trains_our_denoiser_and_it_stays_certified(tmp_path: Path) -> None:
    from deepinv import Trainer
    from deepinv.loss import SupLoss
    from deepinv.loss.metric import PSNR
    from deepinv.models import ArtifactRemoval
    from deepinv.physics import Denoising, GaussianNoise

    torch.manual_seed(0)
    ours = Denoiser(channels=1, features=8, blocks=2, alpha=0.5)
    before = [parameter.detach().clone() for parameter in ours.parameters()]
    model = ArtifactRemoval(to_deepinv(ours), mode="direct")  # pyright: ignore[reportArgumentType]
    pictures = [(torch.rand(1, 16, 16),) for _ in range(4)]
    trainer = Trainer(
        model=model,
        physics=Denoising(GaussianNoise(0.1)),
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
        train_dataloader=torch.utils.data.DataLoader([x for (x,) in pictures], batch_size=2),  # pyright: ignore
        online_measurements=True,
        losses=SupLoss(),
        metrics=PSNR(),
        epochs=1,
        device="cpu",
        save_path=str(tmp_path),
        verbose=False,
        show_progress_bar=False,
    )
    trainer.train()
    moved = [not torch.equal(old, new) for old, new in zip(before, ours.parameters(), strict=True)]
    assert all(moved) and len(moved) >= 4
    certificate = certify(AtLevel(ours.eval(), 0.1), (1, 16, 16))
    assert certificate.averaged is not None and certificate.averaged <= 0.5 * (1 + 1e-6)


# ---- deepinv's in ours


@torch.no_grad()
def test_deepinvs_denoisers_run_and_are_refused_a_certificate(photograph: Tensor) -> None:
    theirs = uncertified()
    ours = from_deepinv(theirs)
    assert isinstance(ours, Uncertified)
    torch.testing.assert_close(ours(photograph, 0.1), theirs(photograph, 0.1))
    blurring = blur(kernel("gaussian:1.2"), (1, 48, 48))
    iteration = splitting("forward-backward", ours, blurring, photograph, sigma=0.1, tau=1.0)
    with pytest.raises(Refused, match="DnCNN is not certified"):
        certify(iteration, (1, 48, 48))
    report = fixed_point(iteration, photograph, certificate=None, iterations=3)
    assert report.iterations <= 3 and report.certificate is None
    with pytest.raises(BadInput, match=r"deepinv\.models\.Denoiser"):
        from_deepinv(torch.nn.Identity())


def test_deepinvs_physics_with_a_stated_norm() -> None:
    from deepinv.physics import BlurFFT, Denoising, Downsampling, Haze, Tomography

    k = kernel("gaussian:1")
    physics = BlurFFT(img_size=(1, 12, 10), filter=k[None, None])
    operator = from_physics(physics, (1, 12, 10), (1, 12, 10), 1.001)
    ours = blur(k, (1, 12, 10))
    x, y = torch.rand(2, 2, 1, 12, 10)
    torch.testing.assert_close(operator.A(x), ours.A(x))
    torch.testing.assert_close(operator.prox(x, y, 0.7), ours.prox(x, y, 0.7))
    physics.update(filter=torch.ones(1, 1, 1, 1) * 5)  # changes the physics, not what was certified
    torch.testing.assert_close(operator.A(x), ours.A(x))
    iteration = splitting("forward-backward", uncertified(), operator, y, sigma=0.1, tau=1.0)
    assert certify(iteration[0], (1, 12, 10)).averaged == pytest.approx(1.001**2 / 2)  # pyright: ignore
    with pytest.raises(Refused, match="power methods"):
        from_physics(physics, (1, 12, 10), (1, 12, 10))
    with pytest.raises(BadInput, match="no bound"):
        from_physics(Denoising(), (1, 4, 4), (1, 4, 4), 0.9)
    with pytest.raises(BadInput, match="LinearPhysics"):
        from_physics(Haze(), (1, 4, 4), (1, 4, 4), 1.0)
    with pytest.raises(BadInput, match="are stated"):
        from_physics(Downsampling((1, 8, 8), filter="bicubic", factor=2), (1, 8, 8), (1, 8, 8), 1.0)
    angles: Any = torch.arange(5) * 36.0
    inexact = Tomography(angles, 8, normalize=False, adjoint_via_backprop=False)
    detectors = inexact.A(torch.zeros(1, 1, 8, 8)).shape[2]
    with pytest.raises(BadInput, match="not the adjoint"):
        from_physics(inexact, (1, 8, 8), (1, detectors, 5), 20.0)
    truncated = from_physics(Downsampling((1, 9, 9), filter="bilinear", padding="reflect"), (1, 9, 9), (1, 5, 5), 1.1)
    with pytest.raises(Refused, match="closed form"):
        truncated.prox(torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, 5, 5), 1.0)


def test_deepinvs_own_norm_is_from_below() -> None:
    """The reason why it is refused: ask it early and it is no bound."""
    from deepinv.physics import BlurFFT

    physics = BlurFFT(img_size=(1, 32, 32), filter=kernel("gaussian:2")[None, None])
    estimate = physics.compute_norm(
        torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)), max_iter=5, verbose=False, squared=False
    )
    assert float(estimate) < 0.999
    with pytest.raises(BadInput, match="no bound"):
        from_physics(physics, (1, 32, 32), (1, 32, 32), 0.5 * float(estimate))


DOCUMENT = Path(__file__).parents[2] / "docs" / "deepinv.md"


@pytest.mark.parametrize("number", [0, 1])
def test_what_the_document_shows_runs(number: int) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) == 2
    torch.manual_seed(0)
    shown: dict[str, Any] = {}
    with torch.no_grad():
        exec(blocks[number], shown)
    result = shown["report"].image if number == 0 else shown["restored"]
    assert bool(torch.isfinite(result).all()) and (number or shown["report"].converged)


def test_the_document_names_every_forward_model() -> None:
    for name in MODELS:
        row = next(line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| `{name}` |"))
        assert all(f"`{key}`" in row for key in settings(name) if key != "dtype")
