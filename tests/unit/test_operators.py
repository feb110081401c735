from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nonexpansive.errors import BadInput, Refused
from nonexpansive.restore.operators import MODELS, Operator, forward_model, nonnegative_norm, settings
from nonexpansive.restore.steps import DataTerm

pytest.importorskip("deepinv")

GENERATOR = torch.Generator().manual_seed(0)
POSITIVE = torch.rand(4, 3, generator=GENERATOR)
SIGNED = torch.randn(3, 4, generator=GENERATOR)
WEIGHTS = torch.rand(8, 6, generator=GENERATOR)

# name, image shape, settings, the factor above ‖A‖ that the norm may have
CASES: list[tuple[str, tuple[int, int, int], dict[str, Any], float]] = [
    ("blur", (2, 9, 7), {"kernel": "gaussian:0.8", "boundary": "circular"}, 1 + 1e-12),
    ("blur", (1, 9, 8), {"kernel": "box:3", "boundary": "valid"}, 1.2),
    ("blur", (2, 9, 7), {"kernel": "gaussian:0.8", "boundary": "reflect"}, 1.002),
    ("blur", (1, 8, 8), {"kernel": "box:5", "boundary": "replicate"}, 1.002),
    ("blur", (1, 9, 7), {"kernel": POSITIVE, "boundary": "replicate"}, 1.01),
    ("blur", (1, 8, 7), {"kernel": POSITIVE, "boundary": "reflect"}, 1.01),
    ("blur", (1, 9, 8), {"kernel": SIGNED, "boundary": "reflect"}, 3),
    ("blur", (1, 8, 9), {"kernel": "motion:5,0", "boundary": "reflect"}, 1.01),
    ("downsample", (1, 8, 12), {"factor": 2}, 1 + 1e-11),
    ("downsample", (2, 9, 12), {"factor": 3, "kernel": POSITIVE}, 1 + 1e-11),
    ("downsample", (1, 9, 12), {"factor": 3, "kernel": SIGNED}, 1 + 1e-11),
    ("downsample", (1, 8, 8), {"factor": 4, "kernel": "box:1"}, 1 + 1e-11),
    ("downsample", (2, 9, 11), {"factor": 2, "kernel": "gaussian:1"}, 1.01),
    ("downsample", (1, 9, 11), {"factor": 2, "kernel": SIGNED}, 3),
    ("downsample", (1, 9, 11), {"factor": 3, "kernel": "gaussian:1", "boundary": "replicate"}, 1.01),
    ("downsample", (1, 9, 8), {"factor": 2, "kernel": POSITIVE, "boundary": "reflect"}, 1.01),
    ("downsample", (1, 11, 9), {"factor": 2, "kernel": POSITIVE, "boundary": "valid"}, 1.01),
    ("inpaint", (3, 5, 4), {"keep": 0.4, "seed": 3}, 1),
    ("inpaint", (1, 8, 6), {"mask": WEIGHTS - 0.9}, 1),
    ("mri", (2, 8, 7), {"acceleration": 2, "centre": 0.2}, 1 + 1e-14),
    ("mri", (2, 8, 6), {"mask": WEIGHTS}, 1 + 1e-14),
    ("mri", (1, 7, 9), {"acceleration": 3, "centre": 0.1, "seed": 2}, 1 + 1e-14),
    ("mri", (1, 8, 6), {"mask": WEIGHTS}, 1 + 1e-14),
    ("tomography", (1, 9, 9), {"angles": 7}, 1.001),
    ("tomography", (2, 8, 8), {"angles": 5, "circle": True}, 1.001),
    ("tomography", (1, 2, 2), {"angles": 1}, 1.001),
]


def name_of(case: Any) -> str:
    name, shape, given, _ = case
    return f"{name}-{shape}-" + "-".join(str(v) if not isinstance(v, Tensor) else "given" for v in given.values())


cases = pytest.mark.parametrize("case", CASES, ids=name_of)


def build(case: tuple[str, tuple[int, int, int], dict[str, Any], float], dtype: torch.dtype) -> DataTerm:
    name, shape, given, _ = case
    given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in given.items()}
    return forward_model(name, shape, dtype=dtype, **given)


def dense(operator: DataTerm, dtype: torch.dtype) -> Tensor:
    """The matrix of A, from its values on the standard basis, in one batch."""
    n = math.prod(operator.image_shape)
    return operator.A(torch.eye(n, dtype=dtype).view(n, *operator.image_shape)).flatten(1).T.double()


def norm_holds(operator: DataTerm, dtype: torch.dtype) -> bool:
    """The law: the largest singular value of the dense matrix is at most the norm, within the rounding of that matrix."""
    slack = 1e-13 if dtype == torch.float64 else 1e-6
    return float(torch.linalg.svdvals(dense(operator, dtype))[0]) <= operator.norm * (1 + slack)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_norm_is_a_bound_and_as_tight_as_stated(case: Any, dtype: torch.dtype) -> None:
    operator = build(case, dtype)
    assert norm_holds(operator, dtype)
    assert operator.lipschitz >= operator.norm**2
    if dtype == torch.float64:
        assert operator.norm <= case[3] * (1 + 1e-13) * float(torch.linalg.svdvals(dense(operator, dtype))[0])


def test_an_understated_norm_breaks_the_law() -> None:
    operator = forward_model("downsample", (1, 8, 12), dtype=torch.float64)
    assert isinstance(operator, Operator)
    operator.norm *= 1 - 1e-6
    assert not norm_holds(operator, torch.float64)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_adjoint_is_the_transposed_matrix(case: Any, dtype: torch.dtype) -> None:
    operator = build(case, dtype)
    matrix, m = dense(operator, dtype), math.prod(operator.data_shape)
    back = operator.A_adjoint(torch.eye(m, dtype=dtype).view(m, *operator.data_shape))
    assert tuple(back.shape) == (m, *operator.image_shape) and back.dtype == dtype
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(back.flatten(1).double(), matrix, atol=tolerance * operator.norm, rtol=0)


@cases
@pytest.mark.parametrize("tau", [1e-2, 0.7, 50.0])
def test_the_proximal_map_is_the_dense_solution_or_refused(case: Any, tau: float) -> None:
    operator = build(case, torch.float64)
    z = torch.randn(3, *operator.image_shape, dtype=torch.float64)
    y = torch.randn(3, *operator.data_shape, dtype=torch.float64)
    name, shape, given, _ = case
    circular = given.get("boundary", "circular") == "circular"
    closed = name in ("inpaint", "mri") or (circular and name == "blur")
    closed = closed or (name == "downsample" and circular and not any(n % given["factor"] for n in shape[1:]))
    if not closed:
        with pytest.raises(Refused, match="forward-backward"):
            operator.prox(z, y, tau)
        return
    matrix = dense(operator, torch.float64)
    left = matrix.T @ matrix + torch.eye(matrix.shape[1], dtype=torch.float64) / tau
    right = matrix.T @ y.flatten(1).T + z.flatten(1).T / tau
    solved = torch.linalg.solve(left, right).T.view_as(z)
    torch.testing.assert_close(operator.prox(z, y, tau), solved, atol=1e-10, rtol=1e-10)


@cases
def test_each_sample_of_a_batch_by_itself_and_a_start(case: Any) -> None:
    operator = build(case, torch.float64)
    x = torch.rand(3, *operator.image_shape, dtype=torch.float64)
    y = operator.A(x)
    torch.testing.assert_close(y[1:2], operator.A(x[1:2]))
    torch.testing.assert_close(operator.A_adjoint(y)[1:2], operator.A_adjoint(y[1:2]))
    start = operator.start(y)
    assert start.shape == x.shape and bool(torch.isfinite(start).all())
    for wrong in (x[0], x[..., :-1], x[:, :0]):
        with pytest.raises(BadInput, match="expected"):
            operator.A(wrong)
    with pytest.raises(BadInput, match="expected"):
        operator.A_adjoint(y[..., :-1])


@cases
def test_gradients_flow_and_inference_mode_works(case: Any) -> None:
    operator = build(case, torch.float64)
    x = torch.rand(1, *operator.image_shape, dtype=torch.float64, requires_grad=True)
    (operator.A(x).square().sum() / 2).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, operator.A_adjoint(operator.A(x.detach())), atol=1e-10, rtol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(operator.A_adjoint(operator.A(x.detach())), x.grad, atol=1e-10, rtol=1e-10)


def test_masks_are_those_asked_for(tmp_path: Path) -> None:
    half = forward_model("inpaint", (3, 40, 40), keep=0.3, seed=1)
    mask = half.A(torch.ones(1, 3, 40, 40))[0]
    assert abs(float(mask.mean()) - 0.3) < 0.05 and torch.equal(mask[0], mask[2])
    assert torch.equal(mask, forward_model("inpaint", (3, 40, 40), keep=0.3, seed=1).A(torch.ones(1, 3, 40, 40))[0])
    assert not torch.equal(mask, forward_model("inpaint", (3, 40, 40), keep=0.3, seed=2).A(torch.ones(1, 3, 40, 40))[0])
    known = (torch.rand(6, 5, generator=GENERATOR) > 0.5).numpy()
    np.save(tmp_path / "m.npy", known)
    Image.fromarray(known.astype(np.uint8) * 255).save(tmp_path / "m.png")
    for file in ("m.npy", "m.png"):
        operator = forward_model("inpaint", (2, 6, 5), mask=str(tmp_path / file))
        assert torch.equal(operator.A(torch.ones(1, 2, 6, 5))[0, 1] != 0, torch.from_numpy(known))
    mri = forward_model("mri", (2, 8, 64), acceleration=4, centre=0.125)
    assert isinstance(mri, Operator) and mri.measured is not None
    columns = mri.measured[0, 0]
    assert int(columns.sum()) == 16 and bool(columns[28:36].all()) and torch.equal(columns, mri.measured[1, 5])
    start = forward_model("inpaint", (1, 6, 5), mask=str(tmp_path / "m.npy")).start(torch.full((1, 1, 6, 5), 0.25))
    torch.testing.assert_close(start, torch.full_like(start, 0.25))


@pytest.mark.parametrize("side", [(1, 2), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("boundary", ["circular", "reflect", "replicate"])
def test_kernels_of_one_and_two_pixels_are_what_they_say(side: tuple[int, int], boundary: str) -> None:
    """With zeros about them, which move nothing: y(p) = Σ k(q) x(p + c - q), c = (h//2, w//2)."""
    k = torch.rand(side, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    x = torch.rand(1, 1, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = forward_model("downsample", (1, 6, 7), factor=1, kernel=k, boundary=boundary, dtype=torch.float64).A(x)
    expected = sum(
        k[a, b] * x.roll((a - side[0] // 2, b - side[1] // 2), (-2, -1)) for a in range(side[0]) for b in range(side[1])
    )
    inner = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(y[inner], expected[inner])  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "shape", "given", "message"),
    [
        ("blurr", (1, 8, 8), {}, "did you mean 'blur'"),
        ("blur", (1, 8, 8), {}, "needs kernel"),
        ("blur", (1, 8, 8), {"kernel": "box:3", "factor": 2}, "takes no factor"),
        ("blur", (1, 8, 8), {"kernel": "box:3", "boundary": "zeros"}, "boundary"),
        ("blur", (1, 8, 8), {"kernel": "box:9", "boundary": "reflect"}, "larger than the picture"),
        ("blur", (1, 8, 8), {"kernel": torch.zeros(3, 3), "boundary": "reflect"}, "finite"),
        ("blur", (8, 8), {"kernel": "box:3"}, "C, H, W"),
        ("blur", (1, 0, 8), {"kernel": "box:3"}, "from 1"),
        ("blur", (1, 8, 8), {"kernel": "box:3", "dtype": torch.float16}, "float32"),
        ("downsample", (1, 8, 8), {"factor": 0}, "factor"),
        ("downsample", (1, 8, 8), {"factor": 1.5}, "factor"),
        ("downsample", (1, 8, 8), {"factor": 3}, "larger than the picture"),
        ("inpaint", (1, 8, 8), {"keep": 1.5}, "between 0 and 1"),
        ("inpaint", (1, 8, 8), {"keep": 0.5, "mask": torch.ones(8, 8)}, "not both"),
        ("inpaint", (1, 8, 8), {"mask": torch.zeros(8, 8)}, "zero everywhere"),
        ("inpaint", (1, 8, 8), {"mask": torch.ones(8, 7)}, "mask of shape"),
        ("inpaint", (1, 8, 8), {"mask": torch.full((8, 8), math.nan)}, "finite"),
        ("inpaint", (1, 8, 8), {"mask": "missing.png"}, "no mask file"),
        ("mri", (3, 8, 8), {}, "real pictures"),
        ("mri", (1, 8, 8), {"acceleration": 9}, "acceleration"),
        ("mri", (1, 8, 8), {"acceleration": 4, "centre": 0.5}, "lower either"),
        ("tomography", (1, 8, 9), {}, "square"),
        ("tomography", (1, 8, 8), {"angles": 0}, "angles"),
        ("tomography", (1, 96, 96), {"angles": 2_000_000}, "275 GiB .* 151 sample"),
        ("tomography", (1, 2, 2), {"circle": True}, "side 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, shape: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        forward_model(name, shape, **given)


def test_damaged_mask_files_are_refused(tmp_path: Path) -> None:
    for name, values in (("a.npy", np.array([[{}]])), ("b.npy", np.ones((8, 8), complex))):
        np.save(tmp_path / name, values, allow_pickle=True)
    (tmp_path / "c.png").write_bytes(b"nonsense")
    Image.new("RGB", (8, 8)).save(tmp_path / "d.png")
    for name, message in (("a.npy", "read"), ("b.npy", "real"), ("c.png", "read"), ("d.png", "grey")):
        with pytest.raises(BadInput, match=message):
            forward_model("inpaint", (1, 8, 8), mask=str(tmp_path / name))


def test_every_model_states_its_settings_and_its_norm() -> None:
    for name, build in MODELS.items():
        documented = f"{build.__doc__}"
        assert "‖A‖" in documented or "Norm" in documented
        assert "dtype" in settings(name)
        for key in set(settings(name)) - {"dtype"}:
            assert f"``{key}``" in documented, f"{name} does not say what {key} is"


# ---- a user's own


def matrix_operator(matrix: Tensor, **given: Any) -> Operator:
    return Operator(lambda x: x @ matrix.T, (matrix.shape[1],), (matrix.shape[0],), dtype=torch.float64, **given)


MATRIX = torch.randn(5, 7, generator=GENERATOR, dtype=torch.float64)
NORM = float(torch.linalg.svdvals(MATRIX)[0]) * (1 + 1e-12)


def test_a_users_own_operator_has_the_adjoint_by_differentiation() -> None:
    operator = matrix_operator(MATRIX, norm=NORM)
    y = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(operator.A_adjoint(y), y @ MATRIX)
    torch.testing.assert_close(operator.start(y), y @ MATRIX / operator.lipschitz)
    assert "stated" in repr(operator)
    with pytest.raises(Refused, match="closed form"):
        operator.prox(torch.zeros(4, 7, dtype=torch.float64), y, 1.0)
    given = matrix_operator(MATRIX, norm=NORM, adjoint=lambda y: y @ MATRIX)
    assert torch.equal(given.A_adjoint(y), y @ MATRIX)


def prox_of(scale: float) -> Callable[[Tensor, Tensor, float], Tensor]:
    eye = torch.eye(7, dtype=torch.float64)
    return lambda z, y, tau: (
        torch.linalg.solve(MATRIX.T @ MATRIX + scale * eye / tau, (y @ MATRIX + z / tau).T).T  # right for scale 1
    )


def test_a_users_own_proximal_map_is_tried() -> None:
    operator = matrix_operator(MATRIX, norm=NORM, prox=prox_of(1.0))
    z, y = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    x = operator.prox(z, y, 0.3)
    torch.testing.assert_close(0.3 * (x @ MATRIX.T - y) @ MATRIX + x - z, torch.zeros_like(x), atol=1e-12, rtol=0)
    with pytest.raises(BadInput, match="positive"):
        operator.prox(z, y, 0.0)
    with pytest.raises(BadInput, match="prox"):
        matrix_operator(MATRIX, norm=NORM, prox=prox_of(1.001))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"norm": NORM * 0.98}, "no bound"),
        ({"norm": math.inf}, "norm is a finite number"),
        ({"norm": math.nan}, "norm is a finite number"),
        ({"norm": -1.0}, "norm is a finite number"),
        ({"norm": None}, "norm is a finite number"),
        ({"norm": NORM, "adjoint": lambda y: y @ MATRIX * 1.0001}, "not the adjoint"),
        ({"norm": NORM, "adjoint": lambda y: y @ MATRIX[:, :6]}, "adjoint gives"),
    ],
)
def test_false_statements_are_refuted(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        matrix_operator(MATRIX, **given)


@pytest.mark.parametrize(
    ("map", "message"),
    [
        (lambda x: x + 1, "not linear"),
        (lambda x: x.relu(), "not linear"),
        (lambda x: x - x.mean(0), "batch"),
        (lambda x: x[:, :3], "stated"),
        (lambda x: x.float(), "float32"),
        (lambda x: x / 0, "infinite"),
        (lambda x: x.view(1), "fails"),
        (lambda x: torch.from_numpy(x.detach().numpy().copy()), "adjoint"),  # torch cannot see through it
    ],
)
def test_maps_that_are_not_linear_are_refused(map: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Operator(map, (4,), (4,), 3.0, dtype=torch.float64)


def test_the_norm_of_a_non_negative_map_from_above() -> None:
    for rows, columns in ((6, 4), (3, 8)):
        matrix = torch.rand(rows, columns, generator=GENERATOR, dtype=torch.float64)
        matrix[:, 0] = 0  # an entry that is not seen
        bound = nonnegative_norm(lambda x, m=matrix: x @ m.T, lambda y, m=matrix: y @ m, (columns,), (rows,))
        true = float(torch.linalg.svdvals(matrix)[0])
        assert true <= bound <= true * 1.002
    with pytest.raises(AssertionError, match="negative"):
        nonnegative_norm(lambda x: -x, lambda y: y, (3,), (3,))


def test_deepinvs_back_projection_is_not_the_adjoint() -> None:
    """Why tomography takes it by differentiation; if deepinv mends this, the docstring is to be changed."""
    from deepinv.physics import Tomography

    physics = Tomography(
        [180 * i / 7 for i in range(7)], 9, normalize=False, adjoint_via_backprop=False, dtype=torch.float32
    )
    shape = (1, 13, 7)
    with pytest.raises(BadInput, match="not the adjoint"):
        Operator(physics.A, (1, 9, 9), shape, 8.0, physics.A_adjoint)
