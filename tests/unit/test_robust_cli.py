"""`certify` on images, `attack` and `classify`: what they print and write, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("typer", reason="needs the extra nonexpansive[app]")
pytest.importorskip("sklearn", reason="needs the extra nonexpansive[train]")

from typer.testing import CliRunner

from nonexpansive import checkpoint
from nonexpansive.app import robust
from nonexpansive.app.cli import app
from nonexpansive.app.images import read_image, write_image
from nonexpansive.app.robust import fitted
from nonexpansive.errors import BadInput
from nonexpansive.nn.descent import STEPS
from nonexpansive.nn.models import build
from nonexpansive.robust import certify_classifier
from nonexpansive.train import load_images

DIGITS = tuple(map(str, range(10)))
CONFIG = {"shape": [1, 8, 8], "classes": list(DIGITS), "stages": [{"unshuffle": 2, "channels": 8, "kernels": [3]}]}


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose last layer was fitted to the digits by least squares."""
    torch.manual_seed(0)
    model, images = build("flow_classifier", **CONFIG).eval(), load_images("digits", "train")
    with torch.no_grad():
        features = model.features(images.images / 255)
        targets = torch.nn.functional.one_hot(images.labels, 10).float() - 0.1
        model.head.weight = torch.linalg.lstsq(features, targets, driver="gelsd").solution.T
        model.head.bias.zero_()
    path = tmp_path_factory.mktemp("robust") / "digits.safetensors"
    checkpoint.save(path, model, "flow_classifier", CONFIG, {"run": {"data": {"source": "digits"}}})
    return path


@pytest.mark.parametrize("near", [[], ["--local-bounds"], ["--local-bounds", "--steps", "0"]], ids=" ".join)
def test_certified_accuracy_on_images(near: list[str], weights: Path, tmp_path: Path) -> None:
    local, steps = bool(near), 0 if "0" in near else STEPS
    options = ("--limit", 50, "--report", tmp_path / "r", "--json", tmp_path / "j.json", *near)
    text = run("certify", weights, "--data", tmp_path, *options)
    result = json.loads((tmp_path / "j.json").read_text())
    images, model = load_images("digits", "test")[:50], checkpoint.load(weights).double()
    x: Tensor = images.images.float() / 255
    made = certify_classifier(model, (1, 8, 8), arithmetic=torch.float64)
    prediction, radius = made.radii(x, 32, local=local, steps=steps)
    right = prediction == images.labels
    assert result["clean"]["accuracy"] == [right.double().mean().item()]
    for epsilon, accuracy in zip(result["certified"]["epsilons"], result["certified"]["accuracy"], strict=True):
        assert accuracy == (right & (radius > epsilon)).double().mean().item()
    assert ("by_lipschitz_constant" in result) == local
    if local:
        coarse = result["by_lipschitz_constant"]["accuracy"]
        assert all(fine >= c for fine, c in zip(result["certified"]["accuracy"], coarse, strict=True))
        assert sum(result["certified"]["accuracy"]) > sum(coarse) and "by the Lipschitz constant" in text
    assert (
        "certified at 36/255" in text
        and ("near the image" in text) == ("near the image" in result["statement"]) == local
    )
    assert result["arithmetic"] == "float64"
    assert {file.name for file in (tmp_path / "r").iterdir()} == {"report.md", "curves.png", "result.json"}


def test_a_killed_certification_goes_on_from_what_it_noted(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first of two batches, where model, images and settings are the same; else, and from a damaged file, from the start."""
    work, near, dying = robust.evaluate, list[int](), [True]
    header, same = checkpoint.read(weights)[0], checkpoint.load(weights).state_dict()
    other = tmp_path / "other.safetensors"  # the same weights, in a network of another kind
    leaky = header.config | {"activation": "leaky_relu"}
    model = build("flow_classifier", **leaky)
    model.load_state_dict(same)
    checkpoint.save(other, model, "flow_classifier", leaky, header.training)

    def counted(made: object, images: Tensor, labels: Tensor, **settings: object) -> object:
        if settings.get("local"):
            near.append(len(images))
            if dying and len(near) == 2:
                raise KeyboardInterrupt
        return work(made, images, labels, **settings)  # type: ignore[arg-type]

    def certify(steps: int, name: str, model: Path = weights) -> tuple[list[int], dict[str, object] | None]:
        near.clear()
        options = ("--limit", "50", "--local-bounds", "--steps", str(steps), "--report", str(tmp_path / name))
        CliRunner().invoke(app, ["certify", str(model), "--data", str(tmp_path), *options])
        result = tmp_path / name / "result.json"
        return list(near), json.loads(result.read_text()) if result.exists() else None

    monkeypatch.setattr(robust, "evaluate", counted)
    assert certify(1, "r") == certify(1, "damaged") == ([32, 18], None)
    dying.clear()
    (file,) = (tmp_path / "damaged").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    whole = certify(1, "new")
    assert whole[0] == [32, 18] == certify(0, "r")[0] == certify(1, "r", other)[0]
    assert certify(1, "r") == ([18], whole[1])
    assert certify(1, "r") == whole == certify(1, "damaged")  # of what is finished nothing is taken up
    with monkeypatch.context() as patch:  # what cannot be drawn is not lost
        from nonexpansive.app import curves

        patch.setattr(curves, "accuracies", lambda *_: 1 / 0)
        assert certify(1, "full") == ([32, 18], None)
    assert certify(1, "full") == ([], whole[1])
    assert {file.name for file in (tmp_path / "r").iterdir()} == {"report.md", "curves.png", "result.json"}


def test_a_report_goes_into_a_folder(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["certify", str(weights), "--data", str(tmp_path), "--report", str(tmp_path / "file")]
    with pytest.raises(BadInput, match="this folder cannot be made"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_under_attack_it_is_at_least_the_certified_accuracy(weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    text = run("attack", weights, "--data", tmp_path, "--limit", 8, "--epsilon", 0.4, "--json", file)
    result = json.loads(file.read_text())
    assert "no attack succeeded within a certified radius" in text
    robust, certified = result["robust"]["accuracy"], result["certified"]["accuracy"]
    assert len(robust) == 2 and robust[0] == certified[0]
    assert all(r >= c for r, c in zip(robust, certified, strict=True)) and robust[1] < robust[0]


def test_a_radius_may_be_a_fraction(weights: Path, tmp_path: Path) -> None:
    text = run("attack", weights, "--data", tmp_path, "--limit", 2, "--epsilon", "1/255", "--epsilon", 0.005)
    assert "ε = 0.0039 (1/255)" in text and "ε = 0.0050 (1.275/255)" in text


@pytest.mark.parametrize("epsilon", [0.1, 1e-6])
def test_what_is_certain_need_not_be_attacked(weights: Path, tmp_path: Path, epsilon: float) -> None:
    """The accuracy is the same, of fewer attacks; at the small ε nothing but what is wrong is left."""
    results = []
    for more in ((), ("--undecided",)):
        file = tmp_path / "a.json"
        common = ("--data", tmp_path, "--limit", 24, "--epsilon", epsilon, "--json", file)
        text = run("attack", weights, *common, *more)
        results.append(json.loads(file.read_text()))
    every, some = results
    assert every["robust"] == some["robust"] and every["certified"] == some["certified"]
    right, certain = (round(24 * share) for share in some["certified"]["accuracy"])
    assert every["attacked"] == right and some["attacked"] == right - certain < right
    assert f"on the {some['attacked']} left undecided" in text


def test_a_photograph_is_classified(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyautoattack", reason="needs the extra nonexpansive[attack]")
    image = load_images("digits", "test").images[0].float() / 255
    write_image(tmp_path / "digit.png", image.repeat_interleave(3, 1).repeat_interleave(3, 2))
    figure, file = tmp_path / "f.png", tmp_path / "c.json"
    text = run("classify", tmp_path / "digit.png", "--model", weights, "--figure", figure, "--json", file)
    result = json.loads(file.read_text())
    model = checkpoint.load(weights).double()
    x = fitted(read_image(tmp_path / "digit.png").tensor, (1, 8, 8))[None]
    prediction, radius = certify_classifier(model, (1, 8, 8), arithmetic=torch.float64).radii(x, local=True)
    assert result["class"] == DIGITS[int(prediction)] and result["radius"] == pytest.approx(float(radius), rel=1e-6)
    assert result["adversary"] != result["class"] and result["distance"] > result["radius"] > 0
    assert figure.stat().st_size > 0 and "brought to 8x8" in text
    shown = {key: float(re.search(rf"{key} ([\d.]+)", text)[1]) for key in ("certain within", "at")}  # type: ignore[index]
    assert shown["certain within"] <= result["radius"] < shown["certain within"] + 1e-4
    assert shown["at"] >= result["distance"] > shown["at"] - 1e-3


def test_what_needs_a_package_says_so_first(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setattr(robust, "_made", lambda *_: 1 / 0)
    write_image(tmp_path / "x.png", torch.rand(1, 8, 8))
    for arguments in (
        ["classify", tmp_path / "x.png", "--model", weights, "--figure", tmp_path / "f.png"],
        ["attack", weights, "--data", tmp_path, "--attack", "auto"],
    ):
        with pytest.raises(BadInput, match="pip install"):
            CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def test_a_picture_is_brought_to_the_size_of_the_network() -> None:
    picture = torch.rand(1, 9, 16)
    assert torch.equal(fitted(picture, (3, 9, 16)), picture.expand(3, -1, -1))
    assert torch.equal(fitted(picture, (1, 9, 9)), picture[:, :, 3:12])
    assert fitted(picture, (1, 30, 20)).shape == (1, 30, 20)
    with pytest.raises(BadInput, match=r"takes 1 channel\(s\), the photograph has 3"):
        fitted(torch.rand(3, 4, 4), (1, 4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("certify", "MODEL", "--report", "r"), "give --data"),
        (("certify", "MODEL", "--local-bounds"), "give --data"),
        (("certify", "MODEL", "--data", ".", "--steps", "3"), "give --local-bounds too"),
        (("attack", "MODEL", "--data", ".", "--steps", "3"), "give --local-bounds too"),
        (("certify", "MODEL", "--size", "9x9"), "takes pictures of 8x8"),
        (("certify", "MODEL", "--data", ".", "--size", "8x8"), "--size is for denoisers"),
        (("attack", "MODEL", "--data", ".", "--attack", "fgsm"), "there are pgd, auto"),
        (("attack", "MODEL", "--data", ".", "--epsilon", "inf"), "finite"),
        (("attack", "MODEL", "--data", ".", "--epsilon", "3/0"), "36/255"),
        (("certify", "MODEL", "--data", "no-such-folder", "--source", "mnist"), "there is no folder"),
        (("attack", "denoiser-grey", "--data", "."), "not a classifier"),
        (("certify", "MODEL", "--data", ".", "--source", "nothing"), "no data set of that name"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, weights: Path) -> None:
    with pytest.raises(BadInput, match=message):
        CliRunner().invoke(app, [a.replace("MODEL", str(weights)) for a in arguments], catch_exceptions=False)


def test_two_processes_agree_with_one(weights: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    run("certify", weights, "--data", tmp_path, "--limit", 21, "--local-bounds", "--json", one)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nonexpansive.app.cli")
    command = ("certify", weights, "--data", tmp_path, "--limit", "21", "--local-bounds", "--json", two)
    subprocess.run([sys.executable, *launch, *map(str, command)], env=environment, check=True, timeout=120)
    assert json.loads(one.read_text()) == json.loads(two.read_text())
    two.unlink()
    options = ("--data", tmp_path, "--limit", "5", "--epsilon", "0.3")
    command = ("attack", weights, *options, "--json", two)
    subprocess.run([sys.executable, *launch, *map(str, command)], env=environment, check=True, timeout=120)
    run("attack", weights, *options, "--json", one)
    first, second = (json.loads(path.read_text()) for path in (one, two))
    assert first["certified"] == second["certified"] and first["robust"]["images"] == second["robust"]["images"]
    assert first["robust"]["accuracy"][0] == second["robust"]["accuracy"][0]
