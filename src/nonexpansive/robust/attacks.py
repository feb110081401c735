"""ℓ2 attacks: the smallest perturbation that was found to change a classifier's answer, from above.

An attack is given images x, their labels y and one ε for each, and proposes images x' in [0, 1] close to them. What it says of them
is not believed: the distance ‖x' - x‖ is measured in float64 and the network asked again. So an attack's weakness can only make a
network look more robust than it is, and its errors cannot make it look less.

- ``pgd``: projected gradient ascent with restarts (Madry et al. 2018, arXiv:1706.06083), every iterate tried.
- ``auto``: the ensemble of Croce & Hein 2020 (arXiv:2003.01690) as its authors publish it, package pyautoattack: APGD on the
  cross-entropy, APGD on the targeted logit ratio, FAB to each of the targets, Square; each on what the ones before it left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonexpansive.errors import BadInput
from nonexpansive.math.enclosure import column

Predict = Callable[[Tensor], Tensor]
Attack = Callable[[Predict, Tensor, Tensor, Tensor], Tensor]
"""attack(predict, x, y, ε): x (B, C, H, W) in [0, 1], y (B,), ε (B,) → proposals x' (B, C, H, W), one for each image."""

TARGETS = 9
"""How many of the likeliest wrong classes the targeted attacks try, as is the standard."""


def pgd(
    predict: Predict, x: Tensor, y: Tensor, epsilon: Tensor, *, restart: int, steps: int = 100, crossings: float = 5.0
) -> Tensor:
    """Steps along the normalised gradient, projected on the ball and on [0, 1]; the last iterate of another class, if any.

    Their lengths fall linearly and add up to ``crossings`` times the ball's diameter 2ε. ``restart`` 0 starts at x, the others at random
    points of the ball; even ones ascend the cross-entropy, odd ones the margin of the strongest rival.
    """
    ball, best = column(epsilon, x), x.clone()
    delta = _of_norm(torch.randn_like(x)) * ball * torch.rand_like(ball) if restart else torch.zeros_like(x)
    for step in range(steps + 1):
        ahead = (x + delta).clamp(0, 1).requires_grad_()
        with torch.enable_grad():
            z = predict(ahead)
            true = F.one_hot(y, z.shape[1]).bool()
            losses = (
                z.masked_fill(true, -torch.inf).amax(1) - z[true]
                if restart % 2
                else F.cross_entropy(z, y, reduction="none")
            )
            (gradient,) = torch.autograd.grad(losses.sum(), ahead)
        ahead = ahead.detach()
        best = torch.where(column(z.argmax(1) != y, x), ahead, best)
        length = 4 * crossings * ball * (1 - step / steps) / (steps + 1)
        delta = ahead - x + length * _of_norm(gradient)
        delta = delta * (ball / _norms(delta).clamp_min(1e-30)).clamp_max(1)
    return best


def apgd(predict: Predict, x: Tensor, y: Tensor, epsilon: Tensor) -> Tensor:
    """Auto-PGD, whose step size follows its progress, on the cross-entropy: 100 steps from a random start."""
    from pyautoattack.autopgd_base import APGDAttack

    return _single_run(APGDAttack, predict, x, y, epsilon, loss="ce")


def apgd_targeted(predict: Predict, x: Tensor, y: Tensor, epsilon: Tensor, *, rank: int) -> Tensor:
    """Auto-PGD towards the ``rank``-th likeliest wrong class on the targeted ratio of logits (of less than 4: the cross-entropy)."""
    from pyautoattack.autopgd_base import APGDAttack_targeted

    with torch.no_grad():
        order = predict(x).argsort(1, descending=True)
    if rank >= order.shape[1]:
        return x
    return _single_run(
        APGDAttack_targeted, predict, x, y, epsilon,
        loss="dlr-targeted" if order.shape[1] >= 4 else "ce-targeted", y_target=order[:, rank],
    )  # fmt: skip


def fab(predict: Predict, x: Tensor, y: Tensor, epsilon: Tensor, *, rank: int) -> Tensor:
    """Fast adaptive boundary, 100 steps: the nearest image of the ``rank``-th likeliest wrong class that it finds, at any distance."""
    from pyautoattack.fab_pt import FABAttack_PT

    if rank >= predict(x[:1]).shape[1]:
        return x
    attack = FABAttack_PT(predict, norm="L2", n_iter=100, targeted=True, device=x.device)
    attack.target_class = rank + 1
    return attack.attack_single_run(x, y, is_targeted=True)


def square(predict: Predict, x: Tensor, y: Tensor, epsilon: Tensor) -> Tensor:
    """Random square-shaped changes, 5000 queries, no gradients. Images must have at least 5x5 pixels."""
    from pyautoattack.square import SquareAttack

    proposals = x.clone()
    for size in epsilon.unique():
        these, seed = epsilon == size, int(torch.randint(2**31, ()))
        attack = SquareAttack(
            predict,
            norm="L2",
            n_queries=5000,
            eps=float(size),
            p_init=0.8,
            resc_schedule=False,
            seed=seed,
            device=x.device,
        )
        proposals[these] = attack.perturb(x[these], y[these]).to(x)
    return proposals


_RANKS = range(1, TARGETS + 1)
NEAREST: tuple[Attack, ...] = tuple(partial(fab, rank=k) for k in _RANKS)
"""What looks for the nearest adversary, whatever its distance: ε does not matter to it."""

ATTACKS: dict[str, tuple[Attack, ...]] = {
    "pgd": tuple(partial(pgd, restart=k) for k in range(5)),
    "auto": (apgd, *(partial(apgd_targeted, rank=k) for k in _RANKS), *NEAREST, square),
}
"""Attacks by name: their parts in turn, each on the images that the ones before it did not change within ε."""


class Found(NamedTuple):
    """The nearest adversaries found: ``image`` (N, C, H, W), in [0, 1], and its ``distance`` (N,) float64 from the original.

    The distance is 0 where the network is wrong already, and ∞ where nothing was found.
    """

    image: torch.Tensor
    distance: torch.Tensor


class Search:
    """A batch of images x of classes y, with the nearest adversaries found so far."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        like = next(model.parameters(), x)
        self.model, self.x, self.y = model, x.to(like).contiguous(), y.to(like.device)
        wrong = self._classes(self.x) != self.y
        distance = torch.full(y.shape, torch.inf, dtype=torch.float64, device=like.device).masked_fill(wrong, 0.0)
        self.found = Found(self.x.clone(), distance)

    def run(self, attacks: Sequence[Attack], epsilon: Tensor) -> None:
        """Run the attacks in turn at one ε (N,) for each image, each on the images that are not changed within it yet."""
        for attack in attacks:
            left = (self.found.distance > epsilon).nonzero()[:, 0]
            if len(left) == 0:
                return
            x, y, ball = self.x[left], self.y[left], epsilon[left]
            target = (ball * (1 - 1e-6)).to(x.dtype)  # so that what ends on the sphere is within it after rounding
            proposal = attack(self._predict, x, y, target)
            self._try(left, proposal)
            self._try(left, _pulled(x, proposal, ball))

    def bisect(self, steps: int = 30) -> None:
        """Bring each adversary to the boundary on the straight line to its image."""
        every, distance = torch.arange(len(self.x), device=self.x.device), self.found.distance
        low, high, start = torch.zeros_like(distance), torch.ones_like(distance), self.found.image.double()
        for _ in range(steps):
            middle, before = (low + high) / 2, distance.clone()
            self._try(every, self.x.double().lerp(start, column(middle, start)))
            low, high = torch.where(distance < before, low, middle), torch.where(distance < before, middle, high)

    def _predict(self, x: Tensor) -> Tensor:
        """The logits, for attacks that work in float32 and on contiguous images."""
        x = x.to(self.x.dtype)
        return self.model(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)

    @torch.no_grad()
    def _classes(self, x: Tensor) -> Tensor:
        return self._predict(x).argmax(1)

    def _try(self, rows: Tensor, proposal: Tensor) -> None:
        """Keep what is an image in [0, 1], nearer than what is known, and of another class."""
        x = proposal.detach().to(self.x.dtype)
        distance = _norms(x.double() - self.x[rows].double()).flatten()
        inside = ((x >= 0) & (x <= 1)).flatten(1).all(1)
        nearer = (inside & (distance < self.found.distance[rows])).nonzero()[:, 0]  # NaN is neither inside nor near
        if len(nearer) == 0:
            return
        hit = nearer[self._classes(x[nearer]) != self.y[rows[nearer]]]
        self.found.distance[rows[hit]], self.found.image[rows[hit]] = distance[hit], x[hit]


def search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilons: Sequence[float] | Tensor,
    attack: str | Sequence[Attack] = "auto",
    *,
    batch: int = 128,
    seed: int = 0,
    watch: Callable[[int], None] | None = None,
) -> Found:
    """The nearest adversaries that an attack finds for images x (N, C, H, W) in [0, 1] of classes y (N,).

    - ``model``: in evaluation mode; it is left as it is.
    - ``epsilons``: the radii to attack at, in rising order, each on the images that withstood so far; or a tensor (N,), one for each.
    - ``attack``: a name of ``ATTACKS``, or what to run in turn; ``seed``: of its random numbers.
    - ``watch(n)`` is called after every n images, ``batch`` or fewer.

    The network withstands at ε where ``distance`` > ε, so a success counts at all larger ε.
    Raises BadInput for an unknown attack, images outside of [0, 1], a network in training mode, or a package that is missing.
    """
    if isinstance(attack, str) and attack not in ATTACKS:
        raise BadInput(f"no attack {attack!r}; there are {', '.join(ATTACKS)}")
    _check(model, x)
    parts: list[Found] = []
    chosen = ATTACKS[attack] if isinstance(attack, str) else tuple(attack)
    with _attacking(model, x, seed, attack == "auto"):
        for start in range(0, len(x), batch):
            rows = slice(start, start + batch)
            part, attacks = Search(model, x[rows], y[rows]), chosen
            for level in [epsilons[rows]] if isinstance(epsilons, Tensor) else sorted(epsilons):
                part.run(attacks, torch.as_tensor(level).to(part.found.distance).expand(len(part.x)))
                attacks = tuple(a for a in attacks if a not in NEAREST)  # which find the same at every ε
            parts.append(part.found)
            if watch is not None:
                watch(len(part.x))
    return Found(torch.cat([part.image for part in parts]), torch.cat([part.distance for part in parts]))


def nearest(model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0) -> Found:
    """The nearest adversaries that can be found, at any distance: FAB to each target, then the boundary on the line to x."""
    _check(model, x)
    with _attacking(model, x, seed, True):
        batch = Search(model, x, y)
        batch.run(NEAREST, torch.zeros_like(batch.found.distance))
        batch.bisect()
    return batch.found


# ------------------------------------------------------------------------------------------------------------------- helpers


def _single_run(
    kind: Any, predict: Predict, x: Tensor, y: Tensor, epsilon: Tensor, loss: str, y_target: Tensor | None = None
) -> Tensor:
    """One run of Auto-PGD by the authors' class: the last iterate of another class, if there is one."""
    attack = kind(predict, n_iter=100, norm="L2", eps=column(epsilon, x), rho=0.75, device=x.device, logger=_QUIET)
    attack.init_hyperparam(x)
    attack.loss, attack.y_target = loss, y_target
    return attack.attack_single_run(x, y)[3]


def _norms(x: Tensor) -> Tensor:
    return column(x.flatten(1).norm(dim=1), x)


def _of_norm(x: Tensor) -> Tensor:
    """x/‖x‖; where x is 0, that is where a gradient vanishes, it stays."""
    return x / _norms(x).clamp_min(1e-30)


def _pulled(x: Tensor, proposal: Tensor, epsilon: Tensor) -> Tensor:
    """The proposal brought into the ball on the straight line to x, if it is outside: still in [0, 1]."""
    delta = proposal.double() - x.double()
    shrink = (column(epsilon, x) * (1 - 1e-6) / _norms(delta).clamp_min(1e-30)).clamp_max(1)
    return (x + delta * shrink).to(x.dtype)


def _check(model: nn.Module, x: Tensor) -> None:
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise BadInput("attacks take images with values in [0, 1]")
    if any(module.training for module in model.modules()):
        raise BadInput("the network is in training mode: call .eval() before attacking it")


def require_package() -> None:
    """Raises BadInput where the package of the ensemble (and of ``nearest``) is not installed."""
    try:
        import pyautoattack  # noqa: F401
    except ImportError as error:
        raise BadInput(
            "this needs the package pyautoattack (pip install 'nonexpansive[attack]'); the attack pgd does not"
        ) from error


@contextmanager
def _attacking(model: nn.Module, x: Tensor, seed: int, package: bool) -> Iterator[None]:
    """Random numbers of a seed (pyautoattack sets seeds of its own), and no gradients of the weights, which no attack needs."""
    if package:
        require_package()
    needing = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for p in needing:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in needing:
                p.requires_grad_(True)


_QUIET = logging.getLogger(f"{__name__}.pyautoattack")
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False
