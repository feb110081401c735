"""Running a certified iteration to its fixed point, with what was proved checked as it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput, Diverging, Refused
from nonexpansive.math.certificate import Certificate, Shape, certify
from nonexpansive.math.enclosure import Affine, column
from nonexpansive.math.rounding import above, below

NOT_CERTIFIED = "NOT CERTIFIED: convergence is not proved"
Acceleration = Literal["anderson"]


class Iteration:
    """What a module T may say of itself as an iteration, beside its map. The defaults are those of a T on pictures."""

    method = "iteration"
    anchored = False
    """Whether it is to be run by Halpern's scheme."""

    def begin(self, x: Tensor) -> Tensor:
        """The state to begin from, given a picture (B, *shape)."""
        return x

    def picture(self, state: Tensor) -> Tensor:
        """The picture that belongs to a state."""
        return state

    def state_shape(self, shape: Shape) -> Shape:
        """The shape of one state for pictures of ``shape``."""
        return shape

    def norm(self, state: Tensor) -> Tensor:
        """(B,): the norm in which T is proved averaged."""
        return state.flatten(1).norm(dim=1)

    def distance(self, state: Tensor) -> Tensor | None:
        """(B,): a bound on the distance from any fixed point, where one is known beforehand."""
        return None

    def objective(self, state: Tensor) -> Tensor | None:
        """(B,), float64: the function that the iteration descends on, where it is one that can be evaluated."""
        return None

    def inexact(self, state: Tensor, certificate: Certificate) -> Tensor:
        """(B,): a bound on how far the computed T(state) is from the exact one, where that has a certificate."""
        size = state.flatten(1).norm(dim=1, dtype=torch.float64)
        return certificate.error.slope * size + certificate.error.constant


_PLAIN = Iteration()


@dataclass(frozen=True)
class Renormed(Certificate):
    """A certificate of a map that is α-averaged in another norm than the Euclidean one: ``renormed``, α in the inner product that
    ``metric`` describes. All other fields are Euclidean, as in any certificate, so what is composed of it takes nothing wrong over.
    ``fixed_point`` runs it in the norm that the :class:`Iteration` itself gives.
    """

    renormed: float = 1.0
    metric: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()}\naveraged in a norm of its own: α ≤ {above(self.renormed)} in {self.metric}"

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "averaged_in_metric": self.renormed, "metric": self.metric}


@dataclass(frozen=True)
class Descent(Certificate):
    """A certificate of an iteration T that descends on an objective F which is bounded below, though it need not be averaged:

        F(Tx) ≤ F(x) - ``decrease``·‖Tx - x‖²,  ``decrease`` = c > 0.

    So Σ‖x_{k+1} - x_k‖² ≤ (F(x_0) - inf F)/c: the residuals tend to 0, the smallest of the first k is at most √((F(x_0) - inf F)/(ck)),
    and every cluster point is a fixed point of T, which is a stationary point of F. Residuals may grow on the way.
    """

    decrease: float = 0.0

    def __str__(self) -> str:
        return f"{super().__str__()}\ndescends: F(Tx) ≤ F(x) - {below(self.decrease)}·‖Tx - x‖²"

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "decrease": self.decrease}


def averagedness(iteration: nn.Module, certificate: Certificate) -> float | None:
    """α of the iteration, in the Euclidean norm or in its own; None where none is proved."""
    if certificate.averaged is None and isinstance(certificate, Renormed) and isinstance(iteration, Iteration):
        return certificate.renormed if certificate.renormed < 1 else None
    return certificate.averaged


@dataclass(frozen=True)
class Report:
    """What a run did.

    - ``image`` (B, C, H, W); ``residuals``: the largest relative residual ‖T(x_k) - x_k‖/‖T(x_k)‖ of the batch at each evaluation of
      T; ``steps``: the evaluations after which each sample was finished. A proposal of an acceleration that was not taken counts as an
      evaluation and repeats the residual of the point that was gone back to.
    - ``objective``: F(x_k) of a run that is proved to descend, summed over the batch, where it can be evaluated.
    - ``movements``: the largest ‖T(x_k) - x_k‖ itself; ``proved``: bounds on it that were known before the run, √(α/((1-α)(k+1)))·d,
      or 2d/(k+1) if anchored, where d, a bound on the distance to any fixed point, is known (a box) and no acceleration is used.
    - ``error``: a bound on the distance of ``image`` from the fixed point, (q·‖T(x) - x‖ + e)/(1-q), where L ≤ q < 1 is proved and T(x)
      is computed to within e.
    - ``certificate``: None if convergence was not proved; ``acceleration``: its name.
    """

    image: Tensor
    residuals: list[float]
    converged: bool
    seconds: float
    certificate: Certificate | None
    steps: list[int] = field(default_factory=list)
    movements: list[float] = field(default_factory=list)
    objective: list[float] | None = None
    proved: list[float] | None = None
    error: float | None = None
    acceleration: str | None = None

    @property
    def iterations(self) -> int:
        return len(self.residuals)

    @property
    def certified(self) -> bool:
        return self.certificate is not None

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values, the picture left out."""
        return {
            "certified": self.certified,
            **({} if self.certified else {"warning": NOT_CERTIFIED}),
            "iterations": self.iterations,
            "converged": self.converged,
            "steps": self.steps,
            "residuals": self.residuals,
            "movements": self.movements,
            "objective": self.objective,
            "proved": self.proved,
            "error": self.error,
            "acceleration": self.acceleration,
            "seconds": self.seconds,
            "certificate": None if self.certificate is None else self.certificate.to_json(),
        }


# ---------------------------------------------------------------------------------------------------------------- acceleration


BUDGET, DECAY = 1e3, 1.01
"""The n-th proposal that is taken may lie ``BUDGET``·‖T(x₀) - x₀‖/n^``DECAY`` away from the plain step: summable, as DECAY > 1."""

MEMORY = 6
"""How many differences the acceleration remembers: two states each."""

STATES = 2 * MEMORY + 8
"""How many states the acceleration keeps: the differences, and eight on the way to a proposal (float64 counts twice)."""


class Anderson:
    """Type-II Anderson acceleration of x ↦ T(x), T averaged, sample by sample, with a safeguard that keeps the proof.

    After T is evaluated at p_k, with residual g_k = T(p_k) - p_k, the plain next point is T(p_k); proposed is T(p_k) - ΔT·γ, with γ the
    least-squares solution of ΔG·γ ≈ g_k over the last m differences of g and of T. A proposal is *tried* if it lies within
    e_n = C‖g_0‖/n^1.01 of the plain point, n - 1 proposals having been taken before, and *taken* if the residual found there is no larger
    than ‖g_k‖; otherwise one goes back to the plain point and forgets the differences. Trials and retreats cost an evaluation each.

    **Why it converges.** The points that are taken obey p_{k+1} = T(p_k) + r_k, with r_k = 0 or ‖r_k‖ ≤ e_n, so Σ‖r_k‖ ≤ Σe_n < ∞. For
    a fixed point x*, ‖p_{k+1} - x*‖ ≤ ‖p_k - x*‖ + ‖r_k‖: the distances are bounded and converge. By averagedness
    ‖T(p_k) - x*‖² ≤ ‖p_k - x*‖² - ((1-α)/α)‖g_k‖², hence Σ‖g_k‖² < ∞ and g_k → 0; every cluster point of p_k is then a fixed point,
    and a sequence with converging distances to all fixed points and one of them as a cluster point converges to it. Nothing was used of
    how a proposal was made. (Quasi-Fejér sequences: Combettes 2001; the summable safeguard: Zhang, O'Donoghue & Boyd 2018.) And no
    residual increases: of plain steps because T is non-expansive, of others by the rule that takes them.

    ``ahead``, ``residual``, ``moved`` are T(p), T(p) - p and its norm, (B, *shape) and (B,), at the point that was evaluated last; the
    object is made at the first one. ``trial`` (B,): whether the point to be evaluated next is a proposal, not the plain one.
    """

    def __init__(self, norm: Callable[[Tensor], Tensor], ahead: Tensor, residual: Tensor, moved: Tensor) -> None:
        self.norm, self.first = norm, moved.double()
        self.ahead, self.residual, self.moved = ahead, residual, moved  # at the point that was taken last
        self.trial = torch.zeros_like(moved, dtype=torch.bool)
        self.taken = torch.zeros_like(self.first)
        self.differences: list[tuple[Tensor, Tensor]] = []  # (ΔG, ΔT), oldest first

    def advance(self, ahead: Tensor, residual: Tensor, moved: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
        """Where to evaluate T next (B, *shape), and (B,) which samples' last point was not taken."""
        refused = self.trial & ~(moved <= self.moved)  # NaN is never smaller
        self.taken += (self.trial & ~refused).double()
        keep = column(refused, ahead)
        change = residual - self.residual, ahead - self.ahead
        self.differences = [*self.differences, change][-MEMORY:]
        for difference in self.differences:
            for part in difference:
                part.masked_fill_(keep, 0)
        self.ahead, self.residual = torch.where(keep, self.ahead, ahead), torch.where(keep, self.residual, residual)
        self.moved = torch.where(refused, self.moved, moved)
        proposal = propose(self.ahead, self.residual, self.differences)
        off = self.norm(proposal - self.ahead)
        near = off <= BUDGET * self.first / (self.taken + 1) ** DECAY
        self.trial = near & (off > slack) & ~refused  # after a retreat the plain step is due
        return torch.where(column(self.trial, ahead), proposal, self.ahead), refused


class AndersonDescent:
    """Anderson acceleration of an x ↦ T(x) that descends on F (:class:`Descent`): the proposal of :class:`Anderson` is the next point
    where F is no larger there than at T(x), else T(x) is, sample by sample.

    **Why it keeps the proof.** F(x_{k+1}) ≤ F(T(x_k)) ≤ F(x_k) - c‖T(x_k) - x_k‖², so Σ‖T(x_k) - x_k‖² ≤ (F(x_0) - inf F)/c: the
    residuals tend to 0, and every cluster point of x_k is a fixed point of T. Nothing was used of how a proposal was made. A proposal
    costs an evaluation of F, none of T.
    """

    def __init__(self, ahead: Tensor, residual: Tensor) -> None:
        self.ahead, self.residual = ahead, residual
        self.differences: list[tuple[Tensor, Tensor]] = []  # (ΔG, ΔT), oldest first

    def advance(
        self, ahead: Tensor, residual: Tensor, value: Tensor, objective: Callable[[Tensor], Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Where to evaluate T next (B, *shape), and F there (B,); ``value`` is F(T(x))."""
        self.differences = [*self.differences, (residual - self.residual, ahead - self.ahead)][-MEMORY:]
        self.ahead, self.residual = ahead, residual
        proposal = propose(ahead, residual, self.differences)
        there = objective(proposal)
        assert there is not None
        lower = there <= value  # NaN never is
        return torch.where(column(lower, ahead), proposal, ahead), torch.where(lower, there, value)


def propose(point: Tensor, residual: Tensor, differences: list[tuple[Tensor, Tensor]]) -> Tensor:
    """T(p) - ΔT·γ, γ = argmin ‖g - ΔG·γ‖, each sample by itself; the small system in float64, regularised by what float32 resolves."""
    wide = [g.flatten(1) for g, _ in [*differences, (residual, None)]]
    m = len(differences)
    gram = residual.new_zeros((len(residual), m, m + 1), dtype=torch.float64)  # with the right-hand side beside it
    for i in range(m):
        row = wide[i].double()
        for j in range(i, m + 1):
            gram[:, i, j] = (row * wide[j]).sum(1)
    right, gram = gram[..., m], gram[..., :m].triu() + gram[..., :m].triu(1).mT
    scale = gram.diagonal(dim1=1, dim2=2)
    weight = scale.rsqrt().nan_to_num(posinf=0.0)  # of columns brought to norm 1; those that were forgotten stay out
    gram = gram * weight[:, :, None] * weight[:, None, :]
    right = right * weight
    ridge = 1e-10 if point.dtype == torch.float32 else 1e-14
    eye = torch.eye(m, dtype=gram.dtype, device=gram.device)
    gamma = torch.linalg.solve_ex(gram + ridge * eye, right[..., None]).result[..., 0] * weight
    out = point.clone()
    for j, (_, t) in enumerate(differences):
        out -= column(gamma[:, j].to(out), out) * t
    return out


# ----------------------------------------------------------------------------------------------------------------- the iteration


@torch.no_grad()
def fixed_point(
    iteration: nn.Module,
    start: Tensor,
    *,
    certificate: Certificate | None,
    tolerance: float = 3e-4,
    iterations: int = 500,
    acceleration: Acceleration | None = None,
    watch: Callable[[int, float, Tensor], None] | None = None,
) -> Report:
    """Iterate x ↦ T(x) from the picture ``start`` until ‖T(x) - x‖ ≤ tolerance·‖T(x)‖, each sample until its own residual is small
    enough, or for ``iterations`` evaluations of T.

    ``certificate`` must prove T averaged on the shape of one sample (an anchored T: non-expansive), or that it descends
    (:class:`Descent`); None runs an uncertified iteration, which the report says. ``acceleration`` "anderson": see :class:`Anderson`, and
    :class:`AndersonDescent` for a T that descends, whose objective must be one that can be evaluated.

    An averaged T cannot let ‖T(x_k) - x_k‖ increase: with a certificate each sample's residual, in the norm of the certificate, is
    checked at each plain step against the one before it, within what the type of x can resolve and the certificate's own error. Of a
    T that descends the objective is checked instead, where it can be evaluated. What such a T solves for it solves to a tolerance
    relative to max(‖x - ½‖, 1), so of a picture near black the last digits of a residual are the solver's.
    ``watch(k, residual, state)`` is called after each evaluation; ``state`` is a picture unless the iteration says otherwise.

    Raises Refused for a certificate that proves too little, Diverging if the run contradicts the certificate or meets NaN.
    """
    overwrites = any(getattr(module, "inplace", False) for module in iteration.modules())
    step: Callable[[Tensor], Tensor] = (lambda x: iteration(x.clone())) if overwrites else iteration
    scheme = iteration if isinstance(iteration, Iteration) else _PLAIN
    if acceleration not in (None, *get_args(Acceleration)):
        raise BadInput(f"no acceleration {acceleration!r}: there is {', '.join(get_args(Acceleration))}, or None")
    if acceleration and scheme.anchored:
        raise BadInput("an anchored (Halpern) iteration has weights of its own: run it without acceleration")
    x = scheme.begin(start)
    alpha = None if certificate is None else averagedness(iteration, certificate)
    if certificate is not None and not _enough(iteration, scheme, certificate):
        raise Refused(f"the certificate does not prove the iteration averaged, so it may not converge:\n{certificate}")
    if certificate is not None and certificate.domain != tuple(x.shape[1:]):
        raise Refused(f"the certificate is for samples of shape {certificate.domain}, not {tuple(x.shape[1:])}")
    began = time.perf_counter()
    noise, error = 64 * torch.finfo(x.dtype).eps, Affine() if certificate is None else certificate.error
    half = noise * 0.5 * math.prod(x.shape[1:]) ** 0.5  # what denoisers round, which work on x - ½, whatever ‖T(x)‖ is
    away = None if certificate is None or acceleration else scheme.distance(x)
    image, anchor = x, x
    accelerate: Anderson | None = None
    falling: AndersonDescent | None = None
    active = torch.ones(len(x), dtype=torch.bool, device=x.device)
    plain, steps, relative = active, [0] * len(x), x.new_zeros(len(x))
    descent = certificate if isinstance(certificate, Descent) and alpha is None else None
    if descent is not None and 4 * error.slope > tolerance:
        raise BadInput(
            f"to descend until the relative residual is {tolerance:g} the denoiser must be solved for to a tolerance of "
            f"{tolerance / 4:g}, not {error.slope:g}: set its tolerance, or stop at a residual of {4 * error.slope:g}"
        )
    value = scheme.objective(x) if descent is not None else None
    if descent is not None and acceleration and value is None:
        raise BadInput(
            "the objective that this iteration descends on cannot be evaluated here: run it without acceleration"
        )
    objective: list[float] = []
    before: Tensor | None = None  # ‖T(p) - p‖ at the point p that was taken last, of each sample
    missed: Tensor | None = None  # how far T(p) is from the exact one, at most
    residuals: list[float] = []
    movements: list[float] = []
    for k in range(1, iterations + 1):
        ahead = step(x)
        residual = ahead - x
        moved, least = scheme.norm(residual), torch.finfo(x.dtype)
        # of T(x) = 0 too, the residual is to be a number
        size = scheme.norm(ahead).clamp_min(least.tiny).maximum(least.eps * moved)
        slack = noise * size
        if not bool(torch.isfinite(moved / size)[active & plain].all()):
            raise Diverging(f"step {k} gave numbers that are not finite{'' if certificate else f' ({NOT_CERTIFIED})'}")
        if alpha is not None and before is not None and not scheme.anchored:
            inexact = slack.clamp_min(half) + 2 * (error.slope * (size + moved + before) + error.constant)
            grown = (
                moved > before * (1 + 1e-4) + 2**0.5 * inexact
            )  # √2: between the Euclidean norm and that of the scheme
            if bool((grown & active & plain).any()):
                raise Diverging(
                    f"step {k}: the residual grew from {float(before[active].max()):.4g} to {float(moved[active].max()):.4g}, which its "
                    "certificate excludes. This is a defect: please report it with the model and the settings."
                )
        reached: Tensor | None = None  # F at the next point
        if descent is not None and value is not None:
            objective.append(float(value.sum()))
            after = scheme.objective(ahead)
            assert after is not None
            # T(x) minimises a 1/L-strongly convex G, up to e, where ‖∇G‖ ≤ e/L (a Resolvent's way to stop): so G is at most e²/(2L)
            # above its minimum, and ‖x - argmin G‖ at least ‖T(x) - x‖ - e: F falls by (e‖T(x) - x‖ + e²/2)/L less than c‖T(x) - x‖²
            inexact = scheme.inexact(x, descent) + slack
            spare = inexact * (moved + inexact / 2) * max(1.0, 1 / (descent.lipschitz or 1.0))
            allowed = value - descent.decrease * moved.double() ** 2 + spare
            grown = after > allowed + noise * after.abs()
            if bool((grown & active).any()):
                raise Diverging(
                    f"step {k}: the objective went from {float(value[active].sum()):.8g} to {float(after[active].sum()):.8g}, which its "
                    "certificate excludes. This is a defect: please report it with the model and the settings."
                )
            reached = after
        taken, following = active, ahead
        if scheme.anchored:
            following = ahead + (anchor - ahead) / (k + 1)
        elif falling is not None and reached is not None:
            following, reached = falling.advance(ahead, residual, reached, scheme.objective)
        elif acceleration and descent is not None:
            falling = AndersonDescent(ahead, residual)
        elif accelerate is not None:
            following, refused = accelerate.advance(ahead, residual, moved, slack)
            taken, plain = active & ~refused, ~accelerate.trial
        elif acceleration:
            accelerate = Anderson(scheme.norm, ahead, residual, moved)
        before = moved if before is None else torch.where(taken, moved, before)
        off = error.slope * (size + moved) + error.constant + slack
        missed = off if missed is None else torch.where(taken, off, missed)
        relative = torch.where(taken, moved / size, relative)
        image = torch.where(column(taken, x), ahead, image)
        residuals.append(float(relative.max()))
        movements.append(float(before.max()))
        steps = [k if running else done for running, done in zip(active.tolist(), steps, strict=True)]
        active = active & ~(taken & (relative <= tolerance))
        x = torch.where(column(active, x), following, x)
        if value is not None and reached is not None:
            value = torch.where(active, reached, value)
        if watch:
            watch(k, residuals[-1], image)
        if not bool(active.any()):
            break
    proved = None
    if away is not None:
        d, averaged = float(away.max()), alpha or 0.0
        proved = [d * (2 / (k + 1) if scheme.anchored else (averaged / (1 - averaged) / (k + 1)) ** 0.5)
                  for k in range(len(residuals))]  # fmt: skip
    q = 1.0 if certificate is None else certificate.lipschitz
    distance = None if before is None or missed is None or q >= 1 else float((q * before + missed).max()) / (1 - q)
    return Report(
        scheme.picture(image),
        residuals,
        not bool(active.any()),
        time.perf_counter() - began,
        certificate,
        steps,
        movements,
        objective or None,
        proved,
        distance,
        acceleration,
    )


def _enough(iteration: nn.Module, scheme: Iteration, certificate: Certificate) -> bool:
    """Whether the certificate proves what the iteration's scheme needs."""
    if isinstance(certificate, Descent) and certificate.decrease > 0 and not scheme.anchored:
        return True
    return averagedness(iteration, certificate) is not None or (scheme.anchored and certificate.nonexpansive)


def prove(iteration: nn.Module, shape: tuple[int, ...]) -> Certificate:
    """The certificate of an iteration on pictures of ``shape``; Refused unless it proves what its scheme needs: averaged, or that it
    descends, or, for an anchored one, non-expansive.

    An averaged T converges to a fixed point if it has one. It has, if it is a contraction (Banach) or ends in a box (Brouwer); else that is
    among the certificate's assumptions."""
    scheme = iteration if isinstance(iteration, Iteration) else _PLAIN
    certificate = certify(iteration, scheme.state_shape(tuple(shape)))
    if not _enough(iteration, scheme, certificate):
        raise Refused(f"the iteration is not proved to be averaged:\n{certificate}")
    bounded = scheme.distance(torch.zeros(1, *certificate.domain)) is not None
    if isinstance(certificate, Descent) or certificate.lipschitz < 1 or bounded:
        return certificate
    return replace(certificate, assumptions=tuple(dict.fromkeys((*certificate.assumptions, "a fixed point exists"))))


__all__ = [
    "NOT_CERTIFIED",
    "Acceleration",
    "Anderson",
    "AndersonDescent",
    "Descent",
    "Iteration",
    "Renormed",
    "Report",
    "averagedness",
    "fixed_point",
    "prove",
]
