"""The command line as a user meets it: results, refusals, exit codes, and nothing half-written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="the command line needs the extra nonexpansive[app]")
pytest.importorskip("deepinv", reason="the forward models need the extra nonexpansive[app]")

import nonexpansive
from nonexpansive.app import cli
from nonexpansive.app.images import read_image, write_image
from nonexpansive.nn.models import build

CONFIG = {"channels": 3, "features": 12, "blocks": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    nonexpansive.save(path, build("denoiser", **CONFIG), "denoiser", CONFIG, {})
    return path


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    y, x = torch.meshgrid(torch.linspace(0, 1, 45), torch.linspace(0, 1, 53), indexing="ij")
    write_image(path, torch.stack((x, y, (6 * x).sin() ** 2)))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["nonexpansive", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_deblur_a_clean_photograph(monkeypatch, tmp_path, photo, model, capsys):
    out, figure, result = tmp_path / "o.png", tmp_path / "f.png", tmp_path / "r.json"
    arguments = ["--model", model, "--kernel", "motion:7,20", "--noise", "1%", "--degrade", "-o", out]
    assert run(monkeypatch, "deblur", photo, *arguments, "--figure", figure, "--json", result) == 0
    printed = capsys.readouterr().out
    assert printed.index("convergence is proved") < printed.index("steps at a relative residual"), "certificate first"
    values = json.loads(result.read_text())
    assert values["converged"]
    assert values["certificate"]["averaged"] < 1
    residuals = values["residuals"]
    assert len(residuals) == values["iterations"]
    assert {"blurred", "restored"} == set(values["quality"])
    assert read_image(out).tensor.shape == read_image(photo).tensor.shape
    assert figure.stat().st_size > 1000


def test_a_proximal_denoiser_is_solved_for_as_precisely_as_the_tolerance_needs(monkeypatch, tmp_path, capsys):
    grey, result = tmp_path / "grey.png", tmp_path / "r.json"
    write_image(grey, torch.linspace(0, 1, 24)[None, :, None] * torch.linspace(0, 1, 24)[None, None, :])
    arguments = [
        "--model",
        "denoiser-grey-proximal",
        "--kernel",
        "box:3",
        "--noise",
        "1%",
        "--degrade",
        "--tolerance",
        1e-4,
    ]
    assert run(monkeypatch, "deblur", grey, *arguments, "-o", tmp_path / "o.png", "--json", result) == 0
    assert "descent on an objective is proved" in capsys.readouterr().out
    values = json.loads(result.read_text())
    assert values["converged"] and values["residuals"][-1] <= 1e-4 and values["acceleration"] == "anderson"
    assert values["objective"][-1] < values["objective"][0]


def test_restore_a_blurred_photograph_of_odd_size_with_unknown_surroundings(monkeypatch, tmp_path, photo, model):
    np.save(tmp_path / "k.npy", np.ones((3, 5)))
    out = tmp_path / "o.tiff"
    arguments = ["--model", model, "--kernel", tmp_path / "k.npy", "--noise", "0.01", "-o", out, "--iterations", 5]
    assert run(monkeypatch, "deblur", photo, *arguments) == 0
    assert read_image(out).tensor.shape == (3, 45, 53)


def test_sixteen_bits_stay_sixteen(monkeypatch, tmp_path, model):
    deep = tmp_path / "deep.png"
    write_image(deep, torch.rand(3, 20, 22), bits=16)
    assert run(monkeypatch, "denoise", deep, "--noise", "5%", "--model", model, "-o", tmp_path / "o.png") == 0
    assert read_image(tmp_path / "o.png").bits == 16
    # a JPEG holds eight, which no run need end to find out
    assert run(monkeypatch, "denoise", deep, "--noise", "5%", "--model", model, "-o", tmp_path / "o.jpg") == 0
    assert read_image(tmp_path / "o.jpg").bits == 8


def test_a_picture_one_pixel_wide_is_drawn(monkeypatch, tmp_path, model):
    thin, figure = tmp_path / "thin.png", tmp_path / "f.png"
    write_image(thin, torch.rand(3, 20, 1))
    common = ("--noise", "5%", "--model", model, "-o", tmp_path / "o.png", "--figure", figure)
    assert run(monkeypatch, "denoise", thin, *common) == 0
    assert figure.stat().st_size > 1000


def test_defaults_that_depend_are_in_the_help(monkeypatch, capsys):
    for command, words in (("deblur", "by channels"), ("restore", "by method"), ("certify", "512x512")):
        assert run(monkeypatch, command, "--help") == 0
        assert words in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_tiled_run_gives_the_picture_of_a_whole_one(monkeypatch, tmp_path, model):
    wide = tmp_path / "wide.png"
    write_image(wide, torch.rand(3, 60, 400))
    common = ["denoise", wide, "--noise", "10%", "--model", model]
    assert run(monkeypatch, *common, "-o", tmp_path / "whole.png", "--json", tmp_path / "whole.json") == 0
    assert (
        run(monkeypatch, *common, "-o", tmp_path / "tiled.png", "--json", tmp_path / "tiled.json", "--memory", 1) == 0
    )
    assert json.loads((tmp_path / "tiled.json").read_text())["tiled"]
    assert not json.loads((tmp_path / "whole.json").read_text())["tiled"]
    difference = read_image(tmp_path / "whole.png").tensor - read_image(tmp_path / "tiled.png").tensor
    assert difference.abs().max() <= 1.01 / 255
    assert run(monkeypatch, *common, "-o", tmp_path / "none.png", "--memory", -5) == 2


def test_a_folder_is_denoised_file_by_file(monkeypatch, tmp_path, model, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a.png", "b.jpg"):
        write_image(source / name, torch.rand(3, 20, 24))
    (source / "c.png").write_bytes(b"not a picture")
    (source / "notes.npy").write_bytes(b"left alone")
    common = ("--noise", "10%", "--model", model, "--degrade", "--json", tmp_path / "r.json")
    assert run(monkeypatch, "denoise", source, *common, "-o", target) == 3
    said = capsys.readouterr()
    assert "denoised 2 of 3" in said.err and "c.png" in said.err and "[1/3] a.png: α ≤" in said.out
    assert sorted(path.name for path in target.iterdir()) == ["a.png", "b.jpg"]
    values = json.loads((tmp_path / "r.json").read_text())
    assert list(values["failed"]) == ["c.png"] and len(values["files"]) == 2
    assert run(monkeypatch, "denoise", source / "a.png", *common, "-o", tmp_path / "a.png") == 0
    assert json.loads((tmp_path / "r.json").read_text())["quality"] == values["files"][0]["quality"]
    assert (tmp_path / "a.png").read_bytes() == (target / "a.png").read_bytes()
    assert run(monkeypatch, "denoise", source, *common, "-o", target, "--figure", tmp_path / "f.png") == 3
    assert run(monkeypatch, "denoise", source, *common, "-o", source) == 3  # an input is never overwritten
    capsys.readouterr()
    assert run(monkeypatch, "denoise", tmp_path / "inn", *common, "-o", target) == 3
    assert "no file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"photo": "missing.png"}, 3, "missing.png"),
        ({"--kernel": "gaussian:x"}, 3, "gaussian:STD"),
        ({"--kernel": "box:201"}, 3, "larger than the picture"),
        ({"--noise": "lots"}, 3, "1%"),
        ({"--model": "denoiser-purple"}, 3, "no shipped model"),
        ({"--tau": "-1"}, 4, "τ"),
        ({"--tau": "2.5", "--method": "forward-backward"}, 4, "nearest setting"),
        ({"--method": "magic"}, 3, "half-quadratic"),
        ({"-o": "no/such/folder/o.png"}, 3, "no directory"),
        ({"-o": "o.gif"}, 3, ".png"),
        ({"--boundary": "mirror"}, 3, "circular"),
    ],
)
def test_bad_input_is_one_clear_message_and_writes_nothing(
    monkeypatch, tmp_path, photo, model, capsys, changes, code, says
):
    monkeypatch.chdir(tmp_path)
    options: dict[str, object] = {"--kernel": "box:3", "--noise": "1%", "-o": "o.png", "--model": model}
    picture = changes.pop("photo", photo) if "photo" in changes else photo
    options |= changes
    arguments = [text for pair in options.items() for text in pair]
    assert run(monkeypatch, "deblur", picture, "--degrade", *arguments) == code
    message = capsys.readouterr().err
    assert says in message
    assert "Traceback" not in message
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_is_a_usage_error(monkeypatch, photo):
    assert run(monkeypatch, "deblur", photo, "--sharpen", 3) == 2


def test_the_input_is_never_overwritten(monkeypatch, photo, model, capsys):
    before = photo.read_bytes()
    assert run(monkeypatch, "denoise", photo, "--noise", "5%", "--model", model, "-o", photo) == 3
    assert photo.read_bytes() == before


def test_certify_prints_and_writes_the_tree(monkeypatch, tmp_path, model, capsys):
    arguments = ["certify", model, "--size", "31x33", "--float32", "--json", tmp_path / "c.json"]
    assert run(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.count("GradientFlow") == 2
    values = json.loads((tmp_path / "c.json").read_text())
    assert values["arithmetic"] == "float32"
    assert values["error"]["slope"] > 0
    assert (values["command"], values["model"]) == ("certify", str(model))
    assert run(monkeypatch, "certify", model, "--size", "big") == 3


def test_it_tells_its_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert f"nonexpansive {nonexpansive.__version__}" in capsys.readouterr().out


def test_an_interruption_is_told_and_leaves_nothing(monkeypatch, tmp_path, photo, model, capsys):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "iterate", stop)
    output = tmp_path / "o.png"
    arguments = ["--model", model, "--kernel", "box:3", "--noise", "1%", "--degrade", "-o", output]
    assert run(monkeypatch, "deblur", photo, *arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not output.exists()


def test_models_lists_the_shipped_ones(monkeypatch, capsys):
    assert run(monkeypatch, "models") == 0
    listed = capsys.readouterr().out
    for name in nonexpansive.models():
        weights = sum(p.numel() for p in nonexpansive.load(name).parameters())
        assert re.search(rf"{name}: .*, {weights:,} parameters", listed)


def test_deblur_names_the_methods_that_it_has(monkeypatch, tmp_path, photo, capsys):
    arguments = ("--kernel", "box:3", "--noise", "1%", "-o", tmp_path / "o.png", "--method", "douglas-rachford")
    assert run(monkeypatch, "deblur", photo, *arguments) == 3
    assert "half-quadratic and forward-backward" in capsys.readouterr().err


def test_without_what_the_command_line_itself_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "nonexpansive.app.cli")
    monkeypatch.delattr("nonexpansive.app.cli")
    with pytest.raises(SystemExit) as stopped:
        nonexpansive.app.main()
    assert stopped.value.code == 3 and "pip install 'nonexpansive[app" in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_named(monkeypatch, capsys) -> None:
    def missing(**_: object) -> None:
        raise ModuleNotFoundError("No module named 'lightning_fabric'", name="lightning_fabric")

    monkeypatch.setattr(cli, "app", missing)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == cli.EXIT[cli.BadInput]
    assert "lightning_fabric" in capsys.readouterr().err
