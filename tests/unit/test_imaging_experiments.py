"""The imaging experiments, whole and small: what is measured bounds what is proved, what is done is not done twice, what diverges shows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_experiments import run
from torch import nn

from nonexpansive import certify, checkpoint
from nonexpansive.errors import BadInput, Diverging, Refused
from nonexpansive.experiments import denoising, listed, plug_and_play, shipped, training
from nonexpansive.experiments.denoising import Denoising
from nonexpansive.experiments.plug_and_play import PlugAndPlay
from nonexpansive.experiments.settings import Ledger, wanted
from nonexpansive.experiments.stability import Amplified, jacobian_norm, require_settling, stretch, trace
from nonexpansive.nn.models import build
from nonexpansive.nn.resize import Scale
from nonexpansive.restore import blur, kernel, prove, splitting
from nonexpansive.train import Run
from nonexpansive.train.config import load_toml

torch.set_num_threads(1)
KINDS = {"denoising": Denoising, "plug-and-play": PlugAndPlay}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Photographs of 32x40 pixels, smooth with an edge, in train/, val/ and test/."""
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for index in range(3):
            slope = random.uniform(-1, 1, (3, 2))
            down, right = np.mgrid[-1:1:32j, -1:1:40j]
            values = 0.5 + 0.2 * (slope[:, :1, None] * down + slope[:, 1:, None] * right) + 0.2 * (down > slope[0, 0])
            pixels = (255 * values.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)
            Image.fromarray(pixels).save(tmp_path / "data" / split / f"{index}.png")
    return tmp_path / "data"


TRAININGS = {
    "ours": 'name = "denoiser"\nfeatures = 4\nblocks = 2\nfactor = 1\nactivation = "leaky_relu"\nalpha = 0.5',
    "ordinary": 'name = "dncnn"\nfeatures = 4\nlayers = 3',
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A denoising experiment of two tiny networks."""
    rows = []
    for name, model in TRAININGS.items():
        text = f'task = "denoise"\n[model]\nchannels = 3\n{model}\n[data]\npatch = 16\nvalidation_images = 1\n[train]\nbatch = 2\nsteps = 2'
        (tmp_path / f"{name}.toml").write_text(text)
        rows.append(f'[[runs]]\nname = "the {name} one"\nconfig = "{tmp_path / name}.toml"')
    head = (
        'kind = "denoising"\ntitle = "toy"\nsigma = 0.15\nminutes = 0.0\nshown = 2\ntuned = 1\ncrop = 24\nprobe = 16\n'
        'repeated = 20\nunstable = "the ours one"\namplification = 1.5\n'
    )
    (tmp_path / "toy.toml").write_text(head + "\n".join(rows))
    return tmp_path / "toy.toml"


# ------------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", listed("comparisons"))
def test_every_shipped_imaging_experiment_reads_and_builds(name: str) -> None:
    path = shipped(name, "comparisons")
    kind = load_toml(path).get("kind", "classification")
    if kind not in KINDS:
        pytest.skip("a comparison of classifiers: see test_experiments.py")
    known = KINDS[kind].from_toml(path)
    if isinstance(known, Denoising):
        runs = [known.settings(entry) for entry in known.runs]
        assert all(run.data == runs[0].data for run in runs)
        assert runs[0].data.sigma == pytest.approx((255 * known.sigma,) * 2)
        for run in runs:
            assert isinstance(build(run.model, **run.kwargs), nn.Module)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("sigma=0", "noise level"),
        ("minutes=-1", "at least 0"),
        ("probe=4", "at least 16 pixels"),
        ("sigmas=1", "Did you mean"),
        ("runs=[]", "one or more"),
        ("unstable=ours", "not the name of a run"),
        ("amplification=1.0", "would be stable"),
        ("repeated=1", "at least 2"),
        ('runs=[{name="total variation", config="dncnn-bsds500"}]', "call the run otherwise"),
    ],
)
def test_what_is_no_denoising_experiment_is_refused(change: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Denoising.from_toml(shipped("bsds500", "comparisons"), [change])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("kernels=[]", "one or more"),
        ("noise=[0.0]", "levels in"),
        ("tau=2.0", "tau between 0 and 2"),
        ("amplification=1.0", "would be stable"),
        ("iterations=1", "at least 2"),
        ("kernel=3", "Did you mean"),
    ],
)
def test_what_is_no_plug_and_play_experiment_is_refused(change: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        PlugAndPlay.from_toml(shipped("plug-and-play", "comparisons"), [change])


def test_a_kind_that_there_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "odd.toml").write_text('kind = "denoise"')
    assert run(monkeypatch, "experiment", tmp_path / "odd.toml", "-o", tmp_path / "out") == 3
    assert "Did you mean denoising" in capsys.readouterr().err


def test_a_ledger_keeps_whole_lines_of_what_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "of" / "it.jsonl"
    ledger = Ledger(path, {"a": 1})
    ledger.add("x", [1.5, None])
    with path.open("a") as file:
        file.write('["y", [1')  # killed while it wrote
    again = Ledger(path, {"a": 1})
    assert "x" in again and again["x"] == [1.5, None] and "y" not in again
    again.add("y", 2)
    assert Ledger(path, {"a": 1})["y"] == 2
    assert "x" not in Ledger(path, {"a": 2})


def test_names_come_in_the_order_of_the_experiment() -> None:
    assert wanted(["c", "a"], ["a", "b", "c"]) == ["a", "c"] and wanted([], ["a", "b"]) == ["a", "b"]
    with pytest.raises(BadInput, match="there are a, b"):
        wanted(["d"], ["a", "b"])


# --------------------------------------------------------------------------------------------------------------- measurements


def test_the_jacobian_norm_of_a_linear_map_is_found_from_below() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5).double().requires_grad_(False)
    norm = float(torch.linalg.matrix_norm(linear.weight, 2))
    assert norm * 0.999 <= jacobian_norm(linear, torch.randn(1, 6, dtype=torch.float64), 60) <= norm * (1 + 1e-12)


def test_a_stretch_is_seen_from_below_and_at_its_distance() -> None:
    torch.manual_seed(0)
    half = torch.randn(6, 6, dtype=torch.float64)
    symmetric = half @ half.T
    norm, x = float(torch.linalg.matrix_norm(symmetric, 2)), torch.randn(1, 6, dtype=torch.float64)
    assert norm * 0.999 <= stretch(lambda y: y @ symmetric, x, 0.1, 100) <= norm * (1 + 1e-9)
    # a step is steep for those who compare near to it
    assert stretch(lambda y: y.clamp(0, 0.1), torch.zeros(1, 1), 10.0) <= 0.011


def test_an_averaged_iteration_whose_residual_grows_is_a_defect() -> None:
    require_settling(1.0, 0.5)
    require_settling(2.0, None)
    with pytest.raises(Diverging, match="report"):
        require_settling(1.01, 0.5)


def test_the_amplified_denoiser_is_certified_as_what_it_is_and_refused_in_the_iteration() -> None:
    ours = build("denoiser", features=4, blocks=2, factor=1, activation="leaky_relu", alpha=0.5)
    unstable = Amplified(ours, 1.25).eval().requires_grad_(False)
    certificate = certify(unstable, (3, 16, 16))
    assert certificate.lipschitz == pytest.approx(1.25) and certificate.averaged is None
    blurring = blur(kernel("gaussian:1"), (3, 16, 16))
    y = torch.rand(1, 3, 16, 16)
    with pytest.raises(Refused, match="Amplified"):
        prove(splitting("forward-backward", unstable, blurring, y, sigma=0.1, tau=1.0), (3, 16, 16))
    assert prove(splitting("forward-backward", unstable.denoiser, blurring, y, sigma=0.1, tau=1.0), (3, 16, 16))


def test_a_trace_shows_growth_gives_up_what_is_lost_and_goes_on_with_the_rest() -> None:
    x = torch.stack([torch.full((1, 4, 4), 1e15), torch.full((1, 4, 4), 0.5)])
    psnr, residual, growth = trace(Scale(4.0), x, torch.zeros_like(x), 12)
    assert growth == pytest.approx(4, rel=1e-4)
    assert residual[0].isinf().any() and psnr[0, -1].isnan()
    assert residual[1].isfinite().all() and torch.allclose(residual[1, 1:] / residual[1, :-1], torch.tensor(4.0))
    assert residual[1, 0] == pytest.approx(1.5)  # root mean square of 2.0 - 0.5
    _, residual, growth = trace(Scale(0.5), x[1:], torch.zeros_like(x[1:]), 12)
    assert growth <= 0.5 + 1e-6 and torch.all(residual[:, 1:] < residual[:, :-1])


def test_steps_fill_the_time_and_are_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, data: Path, toy: Path, tmp_path: Path
) -> None:
    known = Denoising.from_toml(toy)
    settings = known.settings(known.runs[0])
    measured = training.pace(settings, data, accelerator="cpu")
    assert 0 < measured < 10
    monkeypatch.setattr(training, "pace", lambda *_, **__: 0.5)
    assert training.within(settings, data, tmp_path / "a", 1.0).train.steps == 120
    monkeypatch.setattr(training, "pace", lambda *_, **__: pytest.fail("measured again"))
    assert training.within(settings, data, tmp_path / "a", 2.0).train.steps == 240
    assert isinstance(training.within(settings, data, tmp_path / "a", 1e-9), Run)


# ------------------------------------------------------------------------------------------------------------------ as a whole


def test_denoisers_are_trained_measured_and_reported_once(
    monkeypatch: pytest.MonkeyPatch, data: Path, toy: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    command = ("experiment", toy, "--data", data, "-o", out, "--accelerator", "cpu", "--set", "minutes=0.001")
    monkeypatch.setattr(denoising, "ACCURACY", 5e-4)  # a tenth of the time
    seen: list[str] = []
    quality = denoising.Photographs.pair

    def killed(self: Any, name: str) -> Any:
        seen.append(name)
        if len(seen) == 7:  # the second photograph of the second denoiser
            raise KeyboardInterrupt
        return quality(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(denoising.Photographs, "pair", killed)
        assert run(patch, *command) == 130
    assert not (out / "result.json").exists()
    kept = (out / "the-ours-one" / "photographs.jsonl").read_text()
    assert run(monkeypatch, *command) == 0
    assert (out / "the-ours-one" / "photographs.jsonl").read_text().startswith(kept)

    result = json.loads((out / "result.json").read_text())
    tv, ours, unstable, ordinary = result["denoisers"]
    assert [d["name"] for d in result["denoisers"]] == [
        "total variation",
        "the ours one",
        "unstable",
        "the ordinary one",
    ]
    for d in (tv, ours, unstable, ordinary):
        assert len(d["residual"]) == 20 and d["growth"] > 0
        assert len(d["psnr"]) == len(d["ssim"]) == 3 and all(map(math.isfinite, d["psnr"] + d["ssim"]))
        assert len(d["pictures"]) == 2 and all(Path(path).is_file() for path in d["pictures"].values())
    assert tv["averaged"] == 0.5 and tv["weight"] > 0 and min(tv["psnr"]) > 20  # of noise at 16.5 dB
    assert 0.7 < tv["measured"] <= tv["found"] <= 1 and tv["residual"][-1] < 1e-2 * tv["residual"][0]
    assert ours["averaged"] <= 0.5 and ours["certified"] <= 1
    assert ours["growth"] <= 1 + 1e-9 and ours["residual"][-1] < ours["residual"][0]
    assert unstable["averaged"] is None and 1 < unstable["found"] <= unstable["certified"] <= 1.5 * (1 + 1e-9)
    assert unstable["growth"] > 1.4 and unstable["residual"][-1] > 100 and unstable["weights"] == ours["weights"]
    assert 0 < ours["measured"] <= ours["found"] <= ours["certified"] * (1 + 1e-9)
    assert ordinary["averaged"] is None and 0 < ordinary["found"] <= ordinary["certified"] * (1 + 1e-9)
    assert ours["steps"] >= 1 and ours["parameters"] < ordinary["parameters"]
    report = (out / "report.md").read_text()
    assert "| the ours one |" in report and "![pictures](pictures.png)" in report
    assert "| unstable | 1.5 |" in report and (out / "repeated.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "pictures.png").read_bytes()[:4] == b"\x89PNG"

    with monkeypatch.context() as patch:  # all of it is taken from the folder
        patch.setattr(denoising, "jacobian_norm", killed)
        patch.setattr(denoising, "trace", killed)
        patch.setattr(denoising, "tv_denoise", killed)
        patch.setattr(training, "pace", killed)
        assert run(patch, *command) == 0
        assert json.loads((out / "result.json").read_text()) == result
    assert run(monkeypatch, *command, "--set", "train.batch=4") == 3
    assert "of another run" in capsys.readouterr().err


def test_patches_that_differ_are_refused(data: Path, toy: Path, tmp_path: Path) -> None:
    text = toy.read_text() + '\nset = ["data.patch=20"]'
    toy.write_text(text)
    with pytest.raises(BadInput, match="the same patches"):
        next(iter(denoising.compare(Denoising.from_toml(toy), data, tmp_path / "out")))


def test_plug_and_play_settles_with_a_proof_and_diverges_without(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    torch.manual_seed(0)
    small = {"channels": 3, "features": 4, "layers": 3}
    checkpoint.save(tmp_path / "dncnn.safetensors", build("dncnn", **small), "dncnn", small, {})
    (data / "blurs").mkdir()
    np.save(data / "blurs" / "k.npy", np.ones((3, 3)))
    settings = ('kernels=["k.npy", "gaussian:1"]', "kernel_folder=blurs", "size=24", "iterations=90", "trial=2", "tuned=1",
                "noise=[0.01]", "amplification=1.6", f"ordinary={tmp_path / 'dncnn.safetensors'}")  # fmt: skip
    command = ["experiment", "plug-and-play", "--data", data, "-o", out, "--limit", 3]
    command += [word for setting in settings for word in ("--set", setting)]
    assert run(monkeypatch, *command) == 0
    result = json.loads((out / "result.json").read_text())
    tv, ours, ordinary, unstable = result["runs"]
    assert [r["method"] for r in result["runs"]] == list(plug_and_play.METHODS)
    residual = np.array(ours["residual"], dtype=float)
    assert residual.shape == (3, 90) and np.all(residual[:, 1:] <= residual[:, :-1] * (1 + 1e-4) + 1e-5)
    assert 0 < ours["averaged"] < 1 and ours["growth"] <= 1 + 1e-4 and ours["diverged"] == 0
    assert np.shape(tv["psnr"]) == (3, 1) and tv["averaged"] is None
    assert np.mean([row[-1] for row in ours["psnr"]]) > np.mean(ours["blurred"])
    assert ordinary["averaged"] is None and "not averaged" in ordinary["refusal"] and 0.01 <= ordinary["strength"] <= 1
    assert unstable["averaged"] is None and "Amplified" in unstable["refusal"] and unstable["growth"] > 1.1
    assert unstable["diverged"] == 3 or np.mean([row[-1] for row in unstable["residual"]]) > 10
    assert "refused" in (out / "report.md").read_text()
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"

    with monkeypatch.context() as patch:  # all of it is taken from the folder
        patch.setattr(plug_and_play, "trace", lambda *_: pytest.fail("run again"))
        patch.setattr(plug_and_play, "tv_deblur", lambda *_: pytest.fail("run again"))
        assert run(patch, *command) == 0
        assert json.loads((out / "result.json").read_text()) == result

    # without weights of a DnCNN it says what to run, and can do without
    only = ["--only", "total variation", "--only", "averaged"]
    assert run(monkeypatch, *command, "--set", "ordinary=") == 3
    assert "experiment bsds500" in capsys.readouterr().err
    assert run(monkeypatch, *command, "--set", "ordinary=", *only) == 0
    # a denoiser that is none of ours is not taken for averaged
    assert run(monkeypatch, *command, "--set", f"denoiser={tmp_path / 'dncnn.safetensors'}", *only) == 4
