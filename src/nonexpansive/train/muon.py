"""Muon: momentum whose matrices are made orthogonal before each step (Jordan et al. 2024; Bernstein & Newhouse 2024, arXiv:2409.20325).

PyTorch has it for parameters of two axes alone; here a convolution's weight counts as the matrix (outputs, inputs·k²). A flow of
the maximal step is the same for every multiple of its weights, so what matters is the *relative* change of a matrix: that is
what ``lr`` sets.

``FourierMuon`` takes a convolution for what it is, one matrix (outputs, inputs) at each frequency: its operator norm is the largest
of theirs, and the steepest descent in that norm makes each of them orthogonal.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)
"""p(s) = as + bs³ + cs⁵ takes all s in (0, 1] near 1 when applied five times; the coefficients are those of Jordan et al."""


WIDEST = 128
"""FourierMuon takes kernels of more outputs *and* inputs for one matrix: its cost grows with the square of the fewer at each frequency."""


class Muon(torch.optim.Optimizer):
    """W ← W - lr·(‖W‖/‖O‖)·O, brought back to ‖W‖, for each of ``matrices``, O the nearest orthogonal matrix to their momentum.

    Frobenius norms, and so the scale beside biases, stay what they were. Left alone they would grow by up to lr a step: the
    gradient of a scale-invariant function is orthogonal to W, but O is not.

    ``others`` (biases, the last layer) take steps of Adam with the rate lr/10 and the decays (β, β₂) = (``momentum``, ``beta2``).
    Weights of more than two axes count as matrices with their first axis as rows.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter] = (),
        lr: float = 0.05,
        momentum: float = 0.95,
        beta2: float = 0.99,
    ) -> None:
        kinds = {True: list(matrices), False: list(others)}
        groups = [{"params": params, "orthogonal": kind} for kind, params in kinds.items() if params]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, beta, rate = self.state[p], group["momentum"], group["lr"]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                    if not group["orthogonal"]:
                        state |= {"square": torch.zeros_like(p), "step": torch.zeros((), dtype=torch.float64)}
                average = state["momentum"].lerp_(p.grad, 1 - beta)
                if not group["orthogonal"]:
                    p.sub_(_adam(average, p.grad, state, group), alpha=rate / 10)
                    continue
                ahead = p.grad.lerp(average, beta)  # Nesterov's momentum
                direction = self.direction(ahead)
                size, tiny = p.norm(), torch.finfo(p.dtype).tiny
                p.sub_(direction * (rate * size / direction.norm().clamp_min(tiny)))
                p.mul_(size / p.norm().clamp_min(tiny))

    def direction(self, momentum: Tensor) -> Tensor:
        """O."""
        return orthogonalised(momentum.flatten(1)).view(momentum.shape)


class FourierMuon(Muon):
    """Muon with O orthogonal at each frequency of the discrete Fourier transform over a kernel's own k^d taps.

    The circular convolution by O of images as large as the kernel has all its singular values near 1. Weights of two axes, kernels of
    one tap and those wider than ``WIDEST`` go as in Muon.
    """

    def direction(self, momentum: Tensor) -> Tensor:
        taps = momentum.shape[2:]
        if taps.numel() == 1 or min(momentum.shape[:2]) > WIDEST:
            return super().direction(momentum)
        axes = tuple(range(-len(taps), 0))
        symbol = torch.fft.rfftn(momentum, dim=axes)
        matrices = orthogonalised_spectrum(symbol.flatten(2).permute(2, 0, 1).contiguous())
        symbol = matrices.permute(1, 2, 0).reshape(symbol.shape)
        return torch.fft.irfftn(symbol, s=taps, dim=axes)


def _adam(average: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, float]) -> Tensor:
    beta, beta2 = group["momentum"], group["beta2"]
    square, count = state["square"].lerp_(gradient.square(), 1 - beta2), state["step"].add_(1)
    unbiased = (square / (1 - beta2 ** float(count))).sqrt_().add_(1e-8)
    return average / (1 - beta ** float(count)) / unbiased


def orthogonalised(matrix: Tensor) -> Tensor:
    """About UVᵀ for the matrix USVᵀ (m, n), its singular values between 0.6 and 1.2: five steps of Newton and Schulz.

    X ← p(X) = P(XXᵀ)X with P(G) = aI + bG + cG². All the P's are polynomials of the first G, so only matrices of the smaller
    side are multiplied until the last product, in bfloat16. G is followed in the matrix's own type: what is rounded in it grows by a²
    a step in the directions that the matrix hardly has.
    """
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = _normalised(matrix.T if tall else matrix)
    gram, product = x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(5):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product, gram = factor @ product, factor @ gram @ factor
    x = (product.bfloat16() @ x.bfloat16()).to(matrix.dtype)
    return x.T if tall else x


def orthogonalised_spectrum(matrices: Tensor) -> Tensor:
    """The same for each of the complex matrices (F, m, n). They are about square, so that X itself is followed in fewer products."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = _normalised(matrices.mH if tall else matrices)
    for _ in range(5):
        gram = x @ x.mH
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mH if tall else x


def _normalised(matrices: Tensor) -> Tensor:
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    return matrices / norms.clamp_min(torch.finfo(matrices.dtype).tiny)
