"""The experiments: what they name exists, what they measure bounds what they prove, and what is done is not done twice."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nonexpansive import certify, checkpoint
from nonexpansive.errors import BadInput, Refused
from nonexpansive.experiments import comparison, depth, listed, shipped
from nonexpansive.experiments.comparison import Comparison, averaging, compare
from nonexpansive.experiments.depth import worst_case
from nonexpansive.experiments.settings import Entry
from nonexpansive.experiments.stability import steepest
from nonexpansive.experiments.training import train
from nonexpansive.nn.classifier import Classifier, flow_classifier, paper_classifier
from nonexpansive.nn.models import build
from nonexpansive.train import Run
from nonexpansive.train.config import load_toml
from nonexpansive.train.loop import TrainingFailed

torch.set_num_threads(1)
QUICK = {"accelerator": "cpu", "progress": False}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command, as from a shell: its exit code."""
    from nonexpansive.app.cli import main

    monkeypatch.setattr(sys, "argv", ["nonexpansive", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# ------------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name", listed())
def test_every_shipped_training_builds_its_network(name: str) -> None:
    run = Run.from_toml(shipped(name))
    assert isinstance(build(run.model, **run.kwargs), nn.Module)


@pytest.mark.parametrize("name", listed("comparisons"))
def test_every_shipped_comparison_names_trainings_that_exist(name: str) -> None:
    if (kind := load_toml(shipped(name, "comparisons")).get("kind")) is not None:
        pytest.skip(f"an experiment of the kind {kind}: see test_imaging_experiments.py")
    known = Comparison.from_toml(shipped(name, "comparisons"))
    for entry in known.runs:
        run = Run.from_toml(shipped(entry.config), entry.set)
        assert isinstance(build(run.model, **run.kwargs), Classifier)


def test_the_papers_networks_have_the_papers_sizes() -> None:
    for ordinary, size in ((False, 254_810), (True, 497_290)):
        assert sum(p.numel() for p in paper_classifier(ordinary=ordinary).parameters()) == size


VALID: dict[str, Any] = {"title": "t", "epsilons": [0.0, 0.5], "runs": [{"name": "a", "config": "classifier-digits"}]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"runs": []}, "one or more"),
        ({"runs": VALID["runs"] * 2}, "a name of its own"),
        ({"runs": [{"name": "a"}]}, r"runs\[0\]\.config: missing"),
        ({"runs": [{"name": "a", "config": "x", "sets": []}]}, r"runs\[0\]\.sets: unknown"),
        ({"epsilons": [0.5]}, "rise from 0"),
        ({"epsilons": [0.0, 0.5, 0.2]}, "rise from 0"),
        ({"attack": "fgsm"}, "'pgd', 'auto'"),
        ({"images": -1}, "0 for all"),
        ({"quoted": [{"name": "q", "source": "s", "accuracy": [1.0]}]}, "one accuracy for each of the 2"),
        ({"epsilon": 3}, "Did you mean"),
    ],
)
def test_what_is_no_comparison_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    def toml(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
        return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)

    path = tmp_path / "own.toml"
    path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in VALID.items()))
    assert Comparison.from_toml(path).runs[0].config == "classifier-digits"
    path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in (VALID | changes).items()))
    with pytest.raises(BadInput, match=says):
        Comparison.from_toml(path)


# --------------------------------------------------------------------------------------------------------------------- depth


def test_the_ascent_finds_the_norm_of_a_linear_map_and_never_more() -> None:
    torch.manual_seed(0)
    for size in (2, 7):
        linear = nn.Linear(size, size + 1).double()
        norm = float(torch.linalg.matrix_norm(linear.weight.detach(), 2))
        found = steepest(linear, torch.randn(5, size, dtype=torch.float64))
        assert norm * 0.999 <= found <= norm * (1 + 1e-9)


def test_the_ascent_finds_a_steep_place_that_is_not_where_it_began() -> None:
    def ridge(x: torch.Tensor) -> torch.Tensor:  # of slope 3 where |x₁ - 2| < 1, of slope 1 elsewhere
        return torch.cat((x[:, :1] + 2 * (x[:, :1] - 2).clamp(-1, 1), x[:, 1:]), 1)

    found = steepest(ridge, torch.zeros(8, 2, dtype=torch.float64))
    assert 2.9 < found <= 3 + 1e-9


@pytest.mark.parametrize("blocks", [1, 4, 64])
def test_the_worst_case_attains_its_bound(blocks: int) -> None:
    net = worst_case(3, blocks).double().requires_grad_(False)
    x = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    assert torch.equal(net(x), 2.0**blocks * x)
    proved = certify(net, (3,)).lipschitz
    assert 2.0**blocks <= proved <= 2.0**blocks * (1 + 1e-9)
    assert 2.0**blocks * (1 - 1e-9) <= steepest(net, x) <= proved


def test_depth_measured_is_below_certified_and_flows_do_not_grow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn, which ships the digits")
    monkeypatch.setattr(depth, "DEPTHS", (1, 6, 64))
    command = ("experiment", "depth", "-o", tmp_path, "--set", "train.steps=40", "--limit", 6, "--accelerator", "cpu")
    assert run(monkeypatch, *command) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {(row["depth"], row["ordinary"]): row for row in result["trained"]}
    assert set(rows) == {(d, kind) for d in (1, 6) for kind in (True, False)}
    for (blocks, ordinary), row in rows.items():
        assert 0 < row["measured"] <= row["certified"] * (1 + 1e-9)
        assert row["norm"] < 1.2
        if ordinary:
            assert 0.5 * 2**blocks <= row["certified"] <= (1 + row["norm"] ** 2) ** blocks * (1 + 1e-6)
            assert row["measured"] > 1.2
        else:
            assert row["certified"] <= 1
    assert [w["measured"] == pytest.approx(2 ** w["depth"]) for w in result["worst_case"]] == [True, True]
    report = (tmp_path / "report.md").read_text()
    assert report.count(" ± ") == 1 + len(rows)
    assert "| 6 | gradient flow" in report and "--limit 6" in report
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------------------------------------------------------- comparisons


def test_the_poolings_that_a_loose_bound_overlooks() -> None:
    assert averaging(paper_classifier().eval()) == pytest.approx(32)
    assert averaging(paper_classifier((1, 8, 8), stages=1, rescaled=True).eval()) == pytest.approx(8)
    assert averaging(flow_classifier((1, 8, 8)).eval()) == 1
    loose, tight = (
        certify(net.eval().features, (1, 8, 8)).lipschitz for net in (_paper(rescaled=True), _paper(rescaled=False))
    )
    assert loose == pytest.approx(8 * tight)


def _paper(rescaled: bool) -> Classifier:
    torch.manual_seed(0)
    return paper_classifier((1, 8, 8), width=4, blocks=1, stages=1, rescaled=rescaled)


def test_a_comparison_is_reported_and_taken_up_where_it_was_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn, which ships the digits")
    command = ("experiment", "digits", "-o", tmp_path, "--set", "train.steps=12", "--limit", 12, "--accelerator", "cpu")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    attacked: list[float] = []
    attack = comparison.search

    def watched(*arguments: Any, **options: Any) -> Any:
        if len(attacked) == 2:
            raise KeyboardInterrupt
        attacked.extend(arguments[3])
        return attack(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "search", killed)
        assert run(patch, *command) == 130
    trained = (tmp_path / "non-expansive" / "log.csv").read_text()
    assert not (tmp_path / "result.json").exists()
    with monkeypatch.context() as patch:  # killed again, at the third ε that anything is attacked at
        patch.setattr(comparison, "search", watched)
        assert run(patch, *command) == 130
        before = attacked.copy()
        attacked.clear()
        assert run(patch, *command) == 130
    assert len(before) == 2 and max(before) < min(attacked)  # and not attacked again at those that were done

    assert run(monkeypatch, *command) == 0
    assert (tmp_path / "non-expansive" / "log.csv").read_text() == trained
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["name"] for row in result["runs"]] == ["non-expansive", "ordinary ResNet"]
    for row in result["runs"]:
        certified = dict(zip(row["certified"]["epsilons"], row["certified"]["accuracy"], strict=True))
        attacked = dict(zip(row["robust"]["epsilons"], row["robust"]["accuracy"], strict=True))
        assert len(certified) >= comparison.POINTS and row["clean"]["images"] == row["robust"]["images"] == 12
        assert row["clean"]["accuracy"][0] == attacked[0.0]
        assert all(certified[epsilon] <= attacked[epsilon] for epsilon in attacked)
        assert all(
            low <= high for low, high in zip(row["loose"]["accuracy"], row["certified"]["accuracy"], strict=True)
        )
    said = ["nonexpansive", "experiment", "digits", "-o", str(tmp_path), "--set", "train.steps=12", "--limit", "12"]
    assert shlex.split(result["command"]) == said
    report = (tmp_path / "report.md").read_text()
    assert "non-expansive, **certified** (12)" in report and "ordinary ResNet, counted as 1" in report

    with monkeypatch.context() as patch:  # all of it is taken from the folder
        patch.setattr(comparison, "search", killed)
        assert run(patch, *command) == 0
        assert json.loads((tmp_path / "result.json").read_text()) == result
        # what was measured of other images is not taken for these
        assert run(patch, *(11 if word == 12 else word for word in command)) == 130
        other = ("train.steps=13" if word == "train.steps=12" else word for word in command)
        assert run(patch, *other) == 3
        assert "of another run" in capsys.readouterr().err


def test_only_the_runs_that_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, "experiment", "digits", "-o", tmp_path / "new", "--only", "ours") == 3
    assert run(monkeypatch, "experiment", "depth", "-o", tmp_path / "new", "--only", "ours") == 3
    assert run(monkeypatch, "experiment", "imagenet", "-o", tmp_path / "new") == 3
    assert run(monkeypatch, "experiment", "bsds500", "-o", tmp_path / "new", "--data", tmp_path) == 3
    assert not (tmp_path / "new").exists()  # what was refused has left nothing
    known = Comparison.from_toml(shipped("digits", "comparisons"))
    pytest.importorskip("sklearn", reason="needs scikit-learn, which ships the digits")
    only = ["ordinary ResNet"]
    rows = list(compare(known, ".", tmp_path, overrides=["train.steps=2"], only=only, limit=4, **QUICK))
    assert [row.name for row in rows] == only
    assert [path.name for path in tmp_path.iterdir()] == ["ordinary-ResNet"]


def test_the_digits_are_learned_with_certificates(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn, which ships the digits")
    known = replace(Comparison.from_toml(shipped("digits", "comparisons")), attacked=30)
    ours, ordinary = compare(known, ".", tmp_path, **QUICK)
    at = {round(e, 6): a for e, a in zip(ours.certified.epsilons, ours.certified.accuracy, strict=True)}
    assert ours.clean.accuracy[0] > 0.94
    assert at[0.1] > 0.85 and at[0.3] > 0.6
    assert ordinary.clean.accuracy[0] > 0.94
    assert ordinary.certified.area < 0.1 * ours.certified.area
    assert ours.robust.area > ordinary.robust.area


def own_data(folder: Path, **test: Any) -> Comparison:
    """A comparison on an .npz of two classes, with the test split that is given."""
    x, y = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 2
    x[y == 1, :4] = 255
    np.savez(folder / "own.npz", **{"x_train": x, "y_train": y, **test})
    text = shipped("classifier-digits").read_text(encoding="utf-8")
    (folder / "own.toml").write_text(text.replace('source = "digits"', 'source = "own.npz"'), encoding="utf-8")
    return Comparison("t", (0.0, 0.1), runs=(Entry("a", str(folder / "own.toml")),))


@pytest.mark.parametrize(
    ("shape", "labels", "says"),
    [(None, None, "x_test"), ((8, 8), 2, "classes"), ((4, 4), 1, "to train on"), ((8, 8), -1, "number them from 0")],
)
def test_what_is_wrong_with_the_test_images_is_told_before_training(
    tmp_path: Path, shape: tuple[int, int] | None, labels: int, says: str
) -> None:
    named = {"classes": np.array(["low", "high"])} if says == "classes" else {}
    test = {} if shape is None else {"x_test": np.zeros((4, *shape), np.uint8), "y_test": np.full(4, labels)}
    known = own_data(tmp_path, **test, **named)
    with pytest.raises(BadInput, match=says):
        list(compare(known, tmp_path, tmp_path / "out", **QUICK))
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_later_run_is_told_before_the_first_is_trained(tmp_path: Path) -> None:
    x, y = np.zeros((4, 8, 8), np.uint8), np.arange(4) % 2
    known = own_data(tmp_path, x_test=x, y_test=y)
    second = Entry("b", known.runs[0].config, ("model.stages=3",))
    with pytest.raises(BadInput, match="list of tables"):
        list(compare(replace(known, runs=(*known.runs, second)), tmp_path, tmp_path / "out", **QUICK))
    assert not (tmp_path / "out").exists()


def test_a_run_may_name_the_classes(tmp_path: Path) -> None:
    config = own_data(tmp_path).runs[0].config
    for setting, names in (('model.classes=["low","high"]', ("low", "high")), ("model.classes=2", ("0", "1"))):
        run = Run.from_toml(config, (setting, "train.steps=1"))
        model = checkpoint.load(train(run, tmp_path, tmp_path / names[0], **QUICK))
        assert isinstance(model, Classifier) and tuple(model.classes) == names


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("model.shape=3", "leave it out"),
        ("model.shape=[1,9,9]", "leave it out"),
        ("model.stages=3", "list of tables"),
        ("model.stages=[1]", "list of tables"),
        ("model.stages=[{unshuffle=0}]", "whole numbers from 1"),
        ("model.stages=[{kernels=[-1]}]", "whole numbers from 1"),
        ("model.stages=[{kernels=3}]", "cannot be built"),
        ('model.stages=[{channels="x"}]', "cannot be built"),
        ("model.activation=7", "cannot be built"),
        ("model.classes=3", "leave it out"),
        ("model.mean=[0.1,0.2]", "mean"),
        ("model.shifts=[100]", "symmetrised|fails"),
    ],
)
def test_settings_that_make_no_network_are_told_before_training(tmp_path: Path, setting: str, says: str) -> None:
    run = Run.from_toml(own_data(tmp_path).runs[0].config, (setting, "train.steps=2"))
    with pytest.raises((BadInput, Refused), match=says):
        train(run, tmp_path, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_weights_that_outgrow_the_control_are_a_training_that_failed(tmp_path: Path) -> None:
    settings = (
        "model.control=adaptive",
        "train.optimiser=sgd",
        "train.learning_rate=1e4",
        "train.clip=0",
        "train.warmup=0",
    )
    run = Run.from_toml(own_data(tmp_path).runs[0].config, (*settings, "train.steps=50"))
    with pytest.raises(TrainingFailed, match=r"at step \d+: .*The last good checkpoint is"):
        train(run, tmp_path, tmp_path / "out", **QUICK)


def test_an_experiment_measures_in_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(monkeypatch, "experiment", "digits", "-o", tmp_path / "out") == 3
    assert "one process" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_training_starts_from_weights_of_its_own_shapes(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn, which ships the digits")

    def trained(folder: str, *settings: str) -> dict[str, torch.Tensor]:
        settings = ("train.steps=1", "train.learning_rate=1e-9", *settings)
        run = Run.from_toml(shipped("classifier-digits"), settings)
        return checkpoint.read(train(run, tmp_path, tmp_path / folder, accelerator="cpu", progress=False))[1]

    first = trained("first", "train.seed=1")
    fresh = trained("fresh")
    start = f"train.start={tmp_path / 'first' / 'best.safetensors'}"
    went_on = trained("second", start)
    kernels = [name for name in first if name.endswith("linear.weight")]
    assert len(kernels) >= 3
    for name in kernels:
        assert torch.allclose(went_on[name], first[name], atol=1e-6), name
        assert not torch.allclose(fresh[name], first[name], atol=1e-3), name
    with pytest.raises(BadInput, match="denoiser, not a flow_classifier"):
        trained("third", "train.start=denoiser-grey-small")
    with pytest.raises(BadInput, match=r"model\.stages was .*channels.*: 32.* now .*channels.*: 16"):
        trained("fourth", start, "model.stages=[{unshuffle=2,channels=16,kernels=[3,3,3]}]")
    with pytest.raises(BadInput, match="nowhere"):
        trained("fifth", "train.start=nowhere")
