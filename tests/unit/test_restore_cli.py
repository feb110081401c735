"""`nonexpansive restore` as a user meets it: every forward model, files and folders, refusals, and runs that are not certified."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("typer", reason="the command line needs the extra nonexpansive[app]")
pytest.importorskip("deepinv", reason="the forward models need the extra nonexpansive[app]")

import nonexpansive
from nonexpansive.app import cli
from nonexpansive.app.images import read_image, write_image
from nonexpansive.app.runs import captions
from nonexpansive.nn.models import build
from nonexpansive.restore.iterate import NOT_CERTIFIED
from nonexpansive.restore.operators import Operator, forward_model
from nonexpansive.restore.restoration import LEVEL, STRENGTH, kind_of, plan


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    paths = {}
    for channels in (1, 3):
        config = {"channels": channels, "features": 12, "blocks": 2}
        paths[channels] = folder / f"{channels}.safetensors"
        nonexpansive.save(paths[channels], build("denoiser", **config), "denoiser", config, {})
    return paths


def scene(channels: int, rows: int = 24, columns: int = 24) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, rows), torch.linspace(0, 1, columns), indexing="ij")
    return torch.stack((x, y, (6 * x).sin() ** 2))[:channels]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("photos")
    for channels in (1, 3):
        write_image(folder / f"{channels}.png", scene(channels))
    return {channels: folder / f"{channels}.png" for channels in (1, 3)}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object, command: str = "restore") -> int:
    monkeypatch.setattr(sys, "argv", ["nonexpansive", command, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


BLUR = ("-p", "blur", "--set", "kernel=box:3", "-s", "1%")


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (3, BLUR),
        (3, ("-p", "blur", "--set", "kernel=gaussian:1", "--set", "boundary=valid", "-s", "1%")),
        (3, ("-p", "downsample", "--set", "factor=2", "-s", "1%")),
        (3, ("-p", "inpaint", "--set", "keep=0.6", "-s", "1%")),
        (1, ("-p", "mri", "--set", "acceleration=2", "-s", "1%")),
        (1, ("-p", "tomography", "--set", "angles=12", "-s", "5%")),
        (3, ("-p", "blur", "--set", "kernel=box:3", "--poisson", "0.01", "-s", "1%", "--acceleration", "anderson")),
        (3, (*BLUR, "--method", "douglas-rachford", "--relax")),
        (3, (*BLUR, "--method", "red")),
        (3, (*BLUR, "--method", "forward-backward", "--relaxation", "1.01", "--strength", "0.7", "--box", "-0.1,1.1")),
        (3, (*BLUR, "--method", "forward-backward", "--anchored")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_every_forward_model_and_method(monkeypatch, tmp_path, models, photos, capsys, channels, options):
    out, result, figure = tmp_path / "o.png", tmp_path / "r.json", tmp_path / "f.png"
    common = ("-o", out, "--json", result, "--figure", figure, "--model", models[channels], "--iterations", 40)
    assert run(monkeypatch, photos[channels], *options, "--degrade", *common) == 0
    printed = capsys.readouterr().out
    assert printed.index("convergence is proved") < printed.index("steps at a relative residual")
    values = json.loads(result.read_text())
    assert values["certified"] and values["refusal"] is None and "warning" not in values
    assert len(values["residuals"]) == values["iterations"]
    assert {"start", "restored"} == set(values["quality"])
    assert values["acceleration"] == (None if "--anchored" in options else "anderson")
    if "--anchored" not in options:
        assert 0 < values["averaged"] < 1
    assert figure.stat().st_size > 1000
    expected = (20, 20) if "boundary=valid" in options else (24, 24)
    assert read_image(out).tensor.shape[0] == channels
    assert abs(read_image(out).tensor.shape[1] - expected[0]) <= 4


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("blur", {"kernel": "box:5", "boundary": "valid"}, ()),
        ("blur", {"kernel": "box:5", "boundary": "reflect"}, ()),
        ("downsample", {"factor": 3}, ()),
        ("mri", {"acceleration": 2, "seed": 0}, ()),
        ("tomography", {"angles": 10}, ("--size", "24x24")),
        ("tomography", {"angles": 10, "circle": True}, ()),
    ],
    ids=["blur", "blur, reflected", "downsample", "mri", "tomography", "tomography in a circle"],
)
@pytest.mark.parametrize("kind", [".npy", ".pt"])
def test_measurements_from_arrays(monkeypatch, tmp_path, models, name, settings, options, kind):
    clean = scene(1)[None]
    y = forward_model(name, (1, 24, 24), **settings).A(clean)
    source, out = tmp_path / f"y{kind}", tmp_path / "x.npy"
    if kind == ".npy":
        np.save(source, y[0].numpy())
    else:
        torch.save(y, source)
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    common = ("--model", models[1], "-s", "1%", "-o", out, "--iterations", 30)
    assert run(monkeypatch, source, "-p", name, *given, *options, *common) == 0
    assert np.load(out).shape == ((1, 20, 20) if settings.get("boundary") == "valid" else (1, 24, 24))


@pytest.mark.parametrize("method", ["red", "primal-dual", "forward-backward"])
def test_the_level_is_in_the_unit_of_the_picture(method: str) -> None:
    """Data of c·A with noise of c·ν say as much as those of A with ν; and where ‖A‖ is above 1 the level is one of pictures."""
    denoiser = build("denoiser", channels=1, features=12, blocks=2).eval()
    A = forward_model("tomography", (1, 48, 48), angles=15)
    assert kind_of(A, torch.zeros(1)) == "diffuse"
    job = plan(A.A(scene(1, 48, 48)[None]), A, denoiser, 0.9, method=method, relax=True)
    rule = STRENGTH[method]["diffuse"]  # type: ignore[index]
    shorter = min(1.0, 1.99**0.5 / (rule.trust * rule.factor))  # as a step on the gradient of forward-backward may be
    shorter = shorter if method == "forward-backward" else 1.0
    assert A.norm > 5
    assert job.sigma == pytest.approx(LEVEL * (shorter * rule.factor * 0.9 / A.norm / LEVEL) ** rule.power)
    loud = Operator(lambda x: 3 * A.A(x), A.image_shape, A.data_shape, 3 * A.norm)
    other = plan(3 * A.A(scene(1, 48, 48)[None]), loud, denoiser, 2.7, method=method, relax=True)
    assert other.sigma == pytest.approx(job.sigma)
    assert other.tau * loud.lipschitz == pytest.approx(job.tau * A.lipschitz)


@pytest.mark.parametrize(
    ("name", "settings", "kind"),
    [
        ("inpaint", {"keep": 0.05}, "sharp"),
        ("downsample", {"factor": 3}, "sharp"),
        ("mri", {"acceleration": 4}, "sharp"),
        ("blur", {"kernel": "motion:9,30"}, "blur"),
        ("blur", {"kernel": "gaussian:1.6", "boundary": "valid"}, "blur"),
        ("blur", {"kernel": "shake:17,seed=4"}, "blur"),
        ("blur", {"kernel": "shake:27,seed=3"}, "blur"),
        ("blur", {"kernel": "motion:9,0"}, "blur"),
        ("blur", {"kernel": "motion:21,90", "boundary": "valid"}, "blur"),
        ("tomography", {"angles": 15}, "diffuse"),
    ],
)
def test_the_kind_of_a_forward_model_decides_the_strength(name: str, settings: dict[str, Any], kind: str) -> None:
    A = forward_model(name, (1, 48, 48), **settings)
    assert kind_of(A, torch.zeros(1)) == kind
    if name == "mri":
        return  # of a small picture's, white noise does not tell it from a straight motion
    users = Operator(lambda x: 3 * A.A(x), A.image_shape, A.data_shape, 3 * A.norm)
    assert kind_of(users, torch.zeros(1)) == kind  # by what it does to white noise, whatever its unit


def test_whole_numbers_are_grey_values_and_gradients_no_hindrance(monkeypatch, tmp_path, models):
    """The same picture as floats, as 8 and 16 bits, and as a parameter: restored alike, and drawn."""
    grey = (scene(1) * 255).round()
    np.save(tmp_path / "a.npy", grey.numpy() / 255 * np.float32(1.00001))  # rounded elsewhere
    np.save(tmp_path / "b.npy", grey.numpy().astype(np.uint8))
    np.save(tmp_path / "c.npy", grey.numpy().astype(np.uint16) * 257)
    torch.save(torch.nn.Parameter(grey / 255), tmp_path / "d.pt")
    restored = []
    for source in ("a.npy", "b.npy", "c.npy", "d.pt"):
        out, figure = tmp_path / f"{source}.npy", tmp_path / f"{source}.png"
        common = ("--degrade", "--model", models[1], "-o", out, "--figure", figure, "--iterations", 5)
        assert run(monkeypatch, tmp_path / source, *BLUR, *common) == 0
        assert figure.stat().st_size > 1000
        restored.append(torch.from_numpy(np.load(out)))
    for other in restored[1:]:
        torch.testing.assert_close(other, restored[0], atol=1e-4, rtol=0)


def test_names_are_shown_as_they_are(monkeypatch, tmp_path, models, photos, capsys):
    source = tmp_path / "a{b}"
    source.mkdir()
    (source / "[red]{x}.png").write_bytes(photos[3].read_bytes())
    common = (*BLUR, "--model", models[3], "--iterations", 5)
    assert run(monkeypatch, source, *common, "-o", tmp_path / "[red]") == 0
    shown = capsys.readouterr().out
    assert "[red]{x}.png: " in shown and "into" in shown and "/[red] (" in shown
    assert run(monkeypatch, photos[3], *common, "-o", tmp_path / "[red]o.png") == 0
    assert "[red]o.png" in capsys.readouterr().out


def test_one_file_that_breaks_a_library_does_not_stop_the_others(monkeypatch, tmp_path, models, photos, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a.png", "b.png"):
        (source / name).write_bytes(photos[3].read_bytes())
    from nonexpansive.app import restore

    def write(path, image, picture):
        if path.name == "a.png":
            raise RuntimeError("no ink")
        return original(path, image, picture)

    original = restore._write
    monkeypatch.setattr(restore, "_write", write)
    common = (*BLUR, "--model", models[3], "-o", tmp_path / "out", "--iterations", 5, "--json", tmp_path / "r.json")
    assert run(monkeypatch, source, *common) == 3
    assert json.loads((tmp_path / "r.json").read_text())["failed"] == {"a.png": "RuntimeError: no ink"}
    assert (tmp_path / "out" / "b.png").exists()


@pytest.mark.parametrize("more", [("--acceleration", "none"), ("--memory", "0.1")])
def test_plain_steps_on_request_and_where_memory_is_short(monkeypatch, tmp_path, models, photos, more):
    """24x24 pixels of 3 channels are 7 kB, of which the acceleration would keep twenty."""
    result = tmp_path / "r.json"
    common = ("-o", tmp_path / "o.png", "--json", result, "--model", models[3], "--iterations", 5)
    assert run(monkeypatch, photos[3], *BLUR, "--degrade", *common, *more) == 0
    values = json.loads(result.read_text())
    assert values["acceleration"] is None and values["certified"]
    assert len(values["proved"]) == 5  # a rate is known beforehand of plain steps alone


@pytest.mark.parametrize(("command", "blurring"), [("restore", BLUR), ("deblur", ("-k", "box:3", "-s", "1%"))])
def test_an_uncertified_run_says_so_everywhere(monkeypatch, tmp_path, models, photos, capsys, command, blurring):
    from PIL import Image

    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, text, **style: titles.append(text))
    out, result = tmp_path / "o.png", tmp_path / "r.json"
    common = (*blurring, "--degrade", "--model", models[3], "-o", out)
    diverging = (*common, "--method", "forward-backward", "--tau", 2.5)
    assert run(monkeypatch, photos[3], *diverging, command=command) == 4
    assert "nearest setting" in capsys.readouterr().err
    assert not out.exists()
    more = ("--uncertified", "--json", result, "--figure", tmp_path / "f.svg", "--iterations", 20)
    assert run(monkeypatch, photos[3], *diverging, *more, command=command) == 0
    printed = capsys.readouterr().out
    assert printed.count(NOT_CERTIFIED) == 2 and "τ < 2/L_f" in printed and "is proved:" in printed
    assert "convergence is proved" not in printed.replace("convergence is not proved", "")
    values = json.loads(result.read_text())
    assert values["warning"] == NOT_CERTIFIED and not values["certified"] and values["certificate"] is None
    assert "τ < 2/L_f" in values["refusal"]
    assert Image.open(out).text["Comment"] == NOT_CERTIFIED  # type: ignore[attr-defined]
    assert titles == [NOT_CERTIFIED] and (tmp_path / "f.svg").stat().st_size > 1000
    # permission alone does not make a proved run uncertified
    assert run(monkeypatch, photos[3], *common, "--uncertified", command=command) == 0
    assert NOT_CERTIFIED not in capsys.readouterr().out
    assert "Comment" not in Image.open(out).text  # type: ignore[attr-defined]


def test_a_measured_blur_has_borders_and_a_simulated_one_continues(monkeypatch, tmp_path, models, photos):
    """Else a photograph's opposite borders would be blurred into each other, which no camera does."""
    file = tmp_path / "r.json"
    common = (*BLUR, "--model", models[3], "-o", tmp_path / "o.png", "--json", file, "--iterations", 3)
    for more, shape in (
        ((), [3, 26, 26]),
        (("--degrade",), [3, 24, 24]),
        (("--set", "boundary=circular"), [3, 24, 24]),
    ):
        assert run(monkeypatch, photos[3], *common, *more) == 0
        assert json.loads(file.read_text())["physics"]["image"] == shape


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("deblur", ("-k", "k.png")),
        ("restore", ("-p", "blur", "--set", "kernel=k.png")),
        ("restore", ("-p", "inpaint", "--set", "mask=k.png")),
    ],
)
def test_a_kernel_or_mask_is_never_overwritten(monkeypatch, tmp_path, models, photos, capsys, command, words):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "k.png", torch.ones(1, 3, 3))
    before = (tmp_path / "k.png").read_bytes()
    common = (*words, "-s", "1%", "--degrade", "--model", models[3])
    assert run(monkeypatch, photos[3], *common, "-o", "k.png", command=command) == 3
    assert "never overwritten" in capsys.readouterr().err and (tmp_path / "k.png").read_bytes() == before
    assert run(monkeypatch, photos[3], *common, "-o", "o.png", "--json", "o.png", command=command) == 3
    assert "is the output itself" in capsys.readouterr().err


def test_a_figure_claims_of_the_residual_what_is_proved_of_it():
    """An averaged iteration cannot let it grow; an anchored one, a descent, and one of which nothing is known can."""
    proved = [captions(SimpleNamespace(averaged=a, certificate=c), anchored)["note"] for a, c, anchored in  # type: ignore[arg-type]
              ((0.9, "T", False), (0.9, "T", True), (None, "descent", False), (None, None, False))]  # fmt: skip
    assert "never increases" in proved[0] and proved[1:] == ["", "", ""]


def test_a_folder_is_restored_file_by_file(monkeypatch, tmp_path, models, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a.png", "b.tif"):
        write_image(source / name, scene(3))
    np.save(source / "c.npy", scene(3).numpy())
    (source / "d.png").write_bytes(b"not a picture")
    (source / "notes.txt").write_text("left alone")
    common = (*BLUR, "--model", models[3], "-o", target, "--iterations", 10, "--json", tmp_path / "r.json")
    assert run(monkeypatch, source, *common) == 3
    error = capsys.readouterr().err
    assert "restored 3 of 4" in error and "d.png" in error
    assert sorted(path.name for path in target.iterdir()) == ["a.png", "b.tif", "c.npy"]
    restored = np.load(target / "c.npy")
    assert restored.dtype == np.float32 and restored.shape == scene(3).shape
    assert np.abs(restored * 255 - np.round(restored * 255)).max() > 0.1  # not rounded to 8 bit on the way
    values = json.loads((tmp_path / "r.json").read_text())
    assert len(values["files"]) == 3 and all(entry["certified"] for entry in values["files"])
    assert list(values["failed"]) == ["d.png"]
    (source / "d.png").unlink()
    assert run(monkeypatch, source, *common) == 0
    torch.save(scene(3), source / "c.pt")
    assert run(monkeypatch, source, *common) == 3
    assert "several inputs" in capsys.readouterr().err
    (source / "c.pt").unlink()
    assert run(monkeypatch, source, *common, "--method", "forward-backward", "--tau", 3) == 4


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"--physics": "blurr"}, 3, "did you mean 'blur'"),
        ({"--set": "kernal=box:3"}, 3, "kernel"),
        ({"--set": "kernel"}, 3, "KEY=VALUE"),
        ({"--physics": "downsample", "--set": "kernel=box:3", "--boundary": ""}, 2, "--boundary"),
        ({"--method": "magic"}, 3, "forward-backward"),
        ({"--method": "douglas-rachford", "--degrade": None}, 4, "--relax"),
        ({"--method": "half-quadratic"}, 4, "no closed form"),
        ({"--degrade": None, "--size": "24x24"}, 3, "leave it out"),
        ({"source": "bright.npy"}, 3, "divide by the white level"),
        ({"--method": "primal-dual"}, 4, "α ≤ 1/2"),
        ({"--tau": "2.5", "--method": "forward-backward"}, 4, "nearest setting"),
        ({"--relaxation": "9"}, 4, "λ <"),
        ({"--strength": "3"}, 4, "not averaged"),
        ({"--poisson": "0.1", "--noise": "0", "--method": "forward-backward"}, 4, "background"),
        ({"--poisson": "-1"}, 3, "gain"),
        ({"--background": "0.1"}, 3, "--poisson"),
        ({"--poisson": "0.1", "--method": "half-quadratic"}, 3, "Gaussian noise only"),
        ({"--box": "1"}, 3, "LOW,HIGH"),
        ({"--size": "big"}, 3, "HxW"),
        ({"--acceleration": "warp"}, 3, "anderson"),
        ({"-o": "no/such/o.png"}, 3, "no directory"),
        ({"-o": "o.gif"}, 3, ".npy"),
        ({"source": "missing.npy"}, 3, "missing.npy"),
        ({"source": "code.pt"}, 3, "without running code"),
        ({"source": "nan.npy"}, 3, "NaN"),
        ({"source": "flat.npy"}, 3, "(C, H, W)"),
        ({"source": "objects.npy"}, 3, "without running code"),
        ({"source": "counts.npy"}, 3, "white is 1"),
        ({"source": "sparse.pt"}, 3, "to_dense"),
        ({"source": "bright.npy", "--degrade": None}, 3, "white level"),
        ({"--physics": "inpaint", "--set": "keep=abc"}, 3, "a number"),
        ({"--physics": "inpaint", "--set": "keep=nan"}, 3, "a number"),
        ({"--physics": "inpaint", "--set": "seed=1.5"}, 3, "a whole number"),
        ({"--physics": "inpaint", "--set": f"seed={2**64}"}, 3, "whole number from 0"),
        ({"--physics": "tomography", "--set": "circle=maybe"}, 3, "true or false"),
        ({"--physics": "inpaint", "--set": "keep=0.5"}, 3, "mask=FILE"),
        (
            {"--physics": "mri", "--set": "seed=0", "--poisson": "0.1", "--degrade": None, "source": "1.png"},
            3,
            "not negative",
        ),
        ({"--strength": "1.2"}, 4, "1.11"),
        ({"--poisson": "0.1", "--noise": "0", "--box": "0,1"}, 4, "without a box"),
        ({"--level": "0"}, 3, "a level above 0"),
        ({"--noise": "25"}, 3, "between 0 and 1"),
        ({"--physics": "tomography", "--set": "angles=9", "--noise": "1e200"}, 3, "1e+06"),
        ({"--seed": 2**64}, 2, "--seed"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_clear_message_and_writes_nothing(
    monkeypatch, tmp_path, models, photos, capsys, changes, code, says
):
    inputs, work = tmp_path / "in", tmp_path / "work"
    inputs.mkdir()
    work.mkdir()
    torch.save({"data": torch.nn.Linear(2, 2)}, inputs / "code.pt")
    np.save(inputs / "nan.npy", np.full((3, 24, 24), np.nan))
    np.save(inputs / "flat.npy", np.zeros(5))
    np.save(inputs / "objects.npy", np.array([{"a": 1}], dtype=object))
    np.save(inputs / "counts.npy", np.ones((3, 24, 24), np.int64))
    np.save(inputs / "bright.npy", np.full((3, 24, 24), 255.0))
    torch.save(torch.ones(3, 24, 24).to_sparse(), inputs / "sparse.pt")
    (inputs / "1.png").write_bytes(photos[1].read_bytes())
    monkeypatch.chdir(work)
    options = {"--physics": "blur", "--set": "kernel=box:3", "--noise": "1%", "-o": "o.png", "--model": models[3]}
    source = inputs / changes["source"] if "source" in changes else photos[3]
    options |= {key: value for key, value in changes.items() if key != "source"}
    if "1.png" in changes.values():
        options["--model"] = models[1]
    words = (word for pair in options.items() for word in pair if word is not None)
    assert run(monkeypatch, source, *words) == code
    message = capsys.readouterr().err
    assert says in message and "Traceback" not in message
    assert not list(work.iterdir())
