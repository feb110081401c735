"""The training loop: it learns, resumes exactly, agrees over processes, and refuses what it must."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from nonexpansive.errors import BadCheckpoint, BadInput, Interrupted
from nonexpansive.train import loop
from nonexpansive.train.config import Run, TrainConfig, apply_overrides
from nonexpansive.train.data import generator
from nonexpansive.train.loop import TrainingFailed, fit, learning_rate
from nonexpansive.train.tasks import DenoiseTask

torch.set_num_threads(1)


class Regression:
    """A smooth function of the plane, to be learned."""

    metrics = ("score", "error")

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        time.sleep(self.delay)
        x = torch.stack([torch.rand(2, generator=generator("regression", step, row)) for row in rows])
        return x, torch.sin(3 * x[:, :1]) * x[:, 1:]

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def validate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        error = self.loss(model, self.batch(-1, range(256))).item()
        return {"score": -error, "error": error}


class Net(nn.Module):
    """An MLP with what makes a resume hard: dropout, and a buffer that each training step moves (a power iteration)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))
        self.register_buffer("vector", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layers[0].weight
        if self.training:
            with torch.no_grad():
                moved = weight @ (weight.T @ self.vector)
                self.vector.copy_(moved / moved.norm())
        norm = (weight.T @ self.vector.clone()).norm()
        return self.layers(x) / norm.clamp(min=1)


def make_run(**train: Any) -> Run:
    settings = {"steps": 300, "batch": 8, "learning_rate": 0.01, "ema": 0.9, "log_every": 20, "validate_every": 50}
    return Run("regression", "net", {}, {}, TrainConfig(**(settings | train)))


def train(out: Path, *, dropout: float = 0.1, task: Any = None, resume: bool = True, **settings: Any) -> Net:
    torch.manual_seed(0)
    model = Net(dropout)
    settings = {"checkpoint_minutes": 0.002, **settings}
    best = fit(
        make_run(**settings),
        model,
        task or Regression(),
        out,
        accelerator="cpu",
        resume=resume,
        progress=False,
    )
    assert best == out / "best.safetensors"
    return model


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open() as file:
        return list(csv.DictReader(file))


def about(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["header"])


def assert_same(first: Path, second: Path) -> None:
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def assert_same_run(first: Path, second: Path, steps: int = 300) -> None:
    """The weights, their average and the optimiser's state, bit for bit; the same log but for times and losses."""
    for name in ("last.safetensors", "best.safetensors", f"checkpoint-{steps:09d}.safetensors"):
        assert_same(first / name, second / name)
    left, right = rows(first), rows(second)
    for column in ("step", "learning_rate", "score", "error"):
        assert [row[column] for row in left] == [row[column] for row in right]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    train(out)
    return out


def start(*command: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], env=environment)


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-*.safetensors"))


def test_it_learns_and_records(uninterrupted: Path) -> None:
    log = rows(uninterrupted)
    steps = [int(row["step"]) for row in log]
    assert steps == sorted({*range(20, 301, 20), *range(50, 301, 50)})
    assert float(log[0]["loss"]) > 0.1 and float(log[-1]["error"]) < 0.03
    assert all(bool(row["score"]) == (int(row["step"]) % 50 == 0) for row in log)
    assert len(checkpoints(uninterrupted)) == 2
    assert list((uninterrupted / "tensorboard").iterdir())
    assert not list(uninterrupted.glob("*.part"))


def test_resume_after_kill_9_is_exact(uninterrupted: Path, tmp_path: Path) -> None:
    child = start(__file__, str(tmp_path), "0.1")
    deadline = time.monotonic() + 100
    while not any(path.stem >= "checkpoint-000000110" for path in checkpoints(tmp_path)):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(BadInput, match="another process is at work"):
        train(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "last.safetensors").exists()
    train(tmp_path)
    assert_same_run(uninterrupted, tmp_path)


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    module = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert start(*module, __file__, str(tmp_path / "two"), "0").wait(120) == 0
    train(tmp_path / "one", dropout=0)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    losses = [[float(row["loss"]) for row in rows(tmp_path / name)] for name in ("one", "two")]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-6)


class Stopping(Regression):
    """Sends a signal to its own process in the middle."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.calls = number, 0

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        self.calls += model.training
        if self.calls == 123:
            os.kill(os.getpid(), self.number)
        return super().loss(model, batch)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_resumes_exactly(number: int, uninterrupted: Path, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"step 123 of 300.*same command resumes"):
        train(tmp_path, task=Stopping(number), checkpoint_minutes=5)
    assert signal.getsignal(number) is before
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000000123.safetensors"]
    train(tmp_path)
    assert_same_run(uninterrupted, tmp_path)


def test_damaged_checkpoints(uninterrupted: Path, tmp_path: Path) -> None:
    for damage in (
        lambda content: content[:-100],
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(Interrupted):
            train(out, task=Stopping(signal.SIGTERM))
        last = checkpoints(out)[-1]
        last.write_bytes(damage(last.read_bytes()))
        with pytest.warns(UserWarning, match=r"000000123.*damaged.*going back"):
            train(out)
        assert_same_run(uninterrupted, out)
        assert (out / "checkpoint-000000123.damaged").exists()
    for path in checkpoints(out):
        path.write_bytes(b"rubbish")
    with pytest.warns(UserWarning, match="going back"), pytest.raises(BadCheckpoint, match="no checkpoint is readable"):
        train(out)


def test_another_run_is_refused_and_a_finished_one_returns(tmp_path: Path) -> None:
    train(tmp_path, steps=20)
    content = (tmp_path / "log.csv").read_text()
    with pytest.raises(BadCheckpoint, match=r"train\.learning_rate was 0\.01, now 0\.02"):
        train(tmp_path, steps=20, learning_rate=0.02)
    with pytest.raises(BadCheckpoint, match=r"train\.steps was 20, now 40"):
        train(tmp_path, steps=40)
    with pytest.raises(BadInput, match="resume it, or choose another folder"):
        train(tmp_path, steps=20, resume=False)
    (tmp_path / "last.safetensors").unlink()
    train(tmp_path, steps=20, log_every=7)
    assert (tmp_path / "last.safetensors").exists() and (tmp_path / "log.csv").read_text() == content


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    train(tmp_path, steps=5)
    with pytest.raises(BadCheckpoint, match="does not fit the model"):
        fit(make_run(steps=5), nn.Linear(2, 1), Regression(), tmp_path, accelerator="cpu", progress=False)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'abacus' on this machine: there is auto, cpu"):
        fit(make_run(steps=5), nn.Linear(2, 1), Regression(), tmp_path, accelerator="abacus", progress=False)
    with pytest.raises(BadInput, match="no weights to train"):
        fit(make_run(steps=5), nn.ReLU(), Regression(), tmp_path, accelerator="cpu", progress=False)


class Peaking(Regression):
    """Its headline is best in the middle."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        self.seen = getattr(self, "seen", 0) + 1
        return {"score": -abs(self.seen - 3.0), "error": 0.0}


def test_best_is_the_best_and_last_the_last(tmp_path: Path) -> None:
    train(tmp_path, task=Peaking(), steps=50, validate_every=10)
    best, last = about(tmp_path / "best.safetensors"), about(tmp_path / "last.safetensors")
    assert (best["step"], best["metrics"]["score"], last["step"]) == (30, 0.0, 50)
    assert best["run"] == make_run(steps=50, validate_every=10, checkpoint_minutes=0.002).to_dict()


class Exploding(Regression):
    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().loss(model, batch) * (math.inf if self.calls == 33 else 1)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"inf at step 33;.*last good checkpoint is .*checkpoint-0000000(\d\d)\."):
        train(tmp_path, task=Exploding(), checkpoint_minutes=0)
    assert checkpoints(tmp_path)[-1].stem == "checkpoint-000000032"


def test_averaged_weights_are_exported(tmp_path: Path) -> None:
    model = train(tmp_path / "averaged", steps=40, dropout=0)
    last = load_file(tmp_path / "averaged" / "last.safetensors")
    assert not torch.equal(last["layers.0.weight"], model.layers[0].weight)
    assert torch.equal(last["vector"], model.vector)
    model = train(tmp_path / "plain", steps=40, dropout=0, ema=0.0)
    last = load_file(tmp_path / "plain" / "last.safetensors")
    assert torch.equal(last["layers.0.weight"], model.layers[0].weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimiser": "sgd"},
        {"optimiser": "muon"},
        {"optimiser": "fourier_muon"},
        {"optimiser": "adamw", "clip": 1.0, "weight_decay": 0.1},
    ],
)
def test_optimisers_resume_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "whole", steps=150, **settings)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", steps=150, task=Stopping(signal.SIGTERM), **settings)
    train(tmp_path / "parts", steps=150, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 150)


def test_compiled_weights_keep_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, real = [], torch.compile

    def eager(model: nn.Module, **_: Any) -> Any:
        compiled.append(model)
        return real(model, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    train(tmp_path, steps=5, dropout=0, compile=True)
    assert compiled and load_file(tmp_path / "last.safetensors").keys() == Net(0).state_dict().keys()


class Denoiser(nn.Module):
    """y - σ·A(y): one convolution, enough to learn to smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 5, padding=2)
        nn.init.zeros_(self.convolution.weight)

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        return noisy - (10 * sigma)[:, None, None, None] * self.convolution(noisy)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_denoiser_learns_to_smooth(precision: str, tmp_path: Path) -> None:
    ramp = torch.arange(48, dtype=torch.uint8)
    photo = (ramp[:, None] * 2 + ramp).repeat(3, 1, 1)
    task = DenoiseTask([photo], [photo], patch=16, sigma=(25.0, 25.0), levels=(25.0,))
    config = TrainConfig(
        steps=80,
        batch=4,
        learning_rate=0.03,
        validate_every=40,
        channels_last=True,
        precision=precision,  # pyright: ignore
    )
    run = Run("denoise", "convolution", {}, {}, config)
    torch.manual_seed(0)
    fit(run, Denoiser(), task, tmp_path, accelerator="cpu", progress=False)
    assert float(rows(tmp_path)[-1]["psnr"]) > 22.5  # the noisy photograph has 20.2


@pytest.mark.parametrize(("slow", "precision"), [(True, "bf16-mixed"), (True, "32-true"), (False, "bf16-mixed")])
def test_a_processor_that_is_slow_in_the_precision_is_named(
    slow: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(loop._slow_in_bf16(torch.device("cpu")), bool) and not loop._slow_in_bf16(torch.device("cuda"))
    monkeypatch.setattr(loop, "_slow_in_bf16", lambda device: slow)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, steps=2, precision=precision)
    assert any("train.precision=32-true" in str(w.message) for w in caught) == (slow and precision == "bf16-mixed")


def test_batch_must_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Three:
        world_size = 3

    monkeypatch.setattr("nonexpansive.train.loop._launch", lambda *_: Three())
    with pytest.raises(BadInput, match=r"train\.batch = 8: not divisible by the 3 processes"):
        train(tmp_path)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_schedules_rise_and_fall_to_zero(schedule: Any) -> None:
    config = TrainConfig(steps=100, learning_rate=2.0, warmup=0.2, schedule=schedule)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[19] == rates[20] == max(rates) == 2.0
    assert rates[:20] == pytest.approx([0.1 * (step + 1) for step in range(20)])
    assert rates[20:] == sorted(rates[20:], reverse=True) and 0 < rates[-1] < 0.03
    assert rates[60] == pytest.approx(1.0)
    assert learning_rate(TrainConfig(steps=1, warmup=0), 0) == 1e-3


CONFIG = """
task = "denoise"
[model]
name = "denoiser"
channels = 64
[data]
sigma = [1, 55]
[train]
steps = 1000
learning_rate = 2e-3
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path


def test_run_from_toml(config_file: Path) -> None:
    overrides = [
        "train.steps=100",
        "model.channels = 32",
        "train.schedule=one_cycle",
        "data.levels=[25]",
        "data.train=a b",
    ]
    run = Run.from_toml(config_file, overrides)
    assert (run.task, run.model, run.kwargs) == ("denoise", "denoiser", {"channels": 32})
    assert (run.train.steps, run.train.learning_rate, run.train.schedule) == (100, 2e-3, "one_cycle")
    assert (run.data.sigma, run.data.levels, run.data.train) == ((1.0, 55.0), (25.0,), "a b")
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=1", r"train\.stepz: unknown setting\. Did you mean train\.steps.*Accepted: train\.steps"),
        ("trian.steps=1", r"trian: unknown setting\. Did you mean train"),
        ("task=denoize", r"denoize: unknown task\. Did you mean denoise"),
        ("train.steps=0", r"train\.steps = 0: must be at least 1"),
        ("train.steps=1.5", r"train\.steps = 1\.5: expected an integer"),
        ("train.steps=true", r"train\.steps = True: expected an integer"),
        ("train.compile=1", r"train\.compile = 1: expected true or false"),
        ("train.learning_rate=fast", r"train\.learning_rate = 'fast': expected a number"),
        ("train.learning_rate=nan", r"train\.learning_rate = nan: must be positive"),
        ("train.ema=1.0", r"train\.ema = 1\.0: must be in \[0, 1\)"),
        (
            "train.optimiser=adan",
            r"train\.optimiser = 'adan': unknown value.*'adam', 'adamw', 'fourier_muon', 'muon', 'sgd'",
        ),
        ("data.channels=2", r"data\.channels = 2: unknown value.*Accepted: 1, 3"),
        ("data.sigma=[5]", r"data\.sigma = \[5\]: expected a list of 2 numbers"),
        ("data.sigma=[9, 5]", r"data\.sigma = .*must be \[low, high\]"),
        ("data.levels=[]", r"data\.levels = .*one or more"),
        ("train=3", r"train: expected a table"),
        ("train.steps.more=3", r"steps is a value, not a table"),
        ("train.steps", r"expected key=value"),
        ("=3", r"expected key=value"),
    ],
)
def test_mistakes_are_named(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Run.from_toml(config_file, [override])


def test_unreadable_configs(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        Run.from_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("task =")
    with pytest.raises(BadInput, match=r"bad\.toml: not valid TOML"):
        Run.from_toml(tmp_path / "bad.toml")
    with pytest.raises(BadInput, match=r"model\.name: missing"):
        Run.from_dict({"task": "denoise"})


def test_overrides_leave_the_original_alone() -> None:
    values = {"train": {"steps": 1}}
    assert apply_overrides(values, ["train.steps=2", "new.key=x"]) == {"train": {"steps": 2}, "new": {"key": "x"}}
    assert values == {"train": {"steps": 1}}


if __name__ == "__main__":  # the child of a test: train into a folder with a dropout, slowly enough to be killed
    train(Path(sys.argv[1]), dropout=float(sys.argv[2]), task=Regression(delay=0.002))
