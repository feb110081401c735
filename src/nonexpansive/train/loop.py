"""The one training loop, for every task, on one process or many.

It can be stopped or killed at any moment and resumes exactly: all randomness is a function of (seed, step, row), so a
checkpoint is only the weights, their average, the optimiser's state and the step.
"""

from __future__ import annotations

import atexit
import copy
import csv
import io
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from nonexpansive import sealed
from nonexpansive.allocator import keep_memory
from nonexpansive.atomic import atomic, held
from nonexpansive.errors import BadCheckpoint, BadInput, Interrupted, NonexpansiveError, Refused
from nonexpansive.nn.flow import project
from nonexpansive.train.config import Run, TrainConfig, differences
from nonexpansive.train.data import key, prefetch
from nonexpansive.train.muon import FourierMuon, Muon
from nonexpansive.train.tasks import Task

FORMAT = "nonexpansive training checkpoint 1"
WEIGHTS = "nonexpansive weights 1"
Export = Callable[[nn.Module, Path, dict[str, Any]], None]

KEPT = 2
"""Checkpoints kept, so that a damaged last one loses little."""

FREE = ("checkpoint_minutes", "log_every")
"""The training settings that may change when a run resumes: they leave the weights as they would have been."""


class TrainingFailed(NonexpansiveError, RuntimeError):
    """The loss or the weights are no longer finite."""


def fit(
    run: Run,
    model: nn.Module,
    task: Task,
    out: Path | str,
    *,
    accelerator: str = "auto",
    devices: int | None = None,
    resume: bool = True,
    progress: bool = True,
    export: Export | None = None,
) -> Path:
    """Train `model` on `task` as `run.train` says, and return the path of the best weights.

    The folder `out` receives `best.safetensors` (of the step with the highest headline metric) and `last.safetensors`,
    both of the averaged weights if `ema` is on, written by `export(model, path, description)` (plain safetensors unless
    given); `checkpoint-*.safetensors`, `log.csv` and TensorBoard's files.

    With checkpoints of the same run in `out`, training goes on from the newest readable one and ends with the weights
    of an uninterrupted run: bit for bit on a CPU with the same number of threads, elsewhere as far as the kernels are
    deterministic. Under `torchrun`, or with `devices` > 1, each process takes an equal share of every batch and the
    gradient is that of the mean over the whole batch, so the result is that of one process within rounding.

    The model is changed in place and ends with the last, not averaged, weights.

    Raises:
        BadInput: the batch is not divisible by the number of processes, another training is writing to `out`, or `resume` is false
            and `out` holds a run.
        BadCheckpoint: the checkpoints are of another run (the message says what differs), or none is readable.
        TrainingFailed: the loss is not finite; the message names the step and the last good checkpoint.
        Interrupted: SIGTERM or SIGINT came; a checkpoint is saved.
    """
    keep_memory()
    config, out = run.train, Path(out)
    fabric = _launch(config, accelerator, devices)
    if config.batch % fabric.world_size:
        raise BadInput(f"train.batch = {config.batch}: not divisible by the {fabric.world_size} processes")
    if fabric.is_global_zero and config.precision == "bf16-mixed" and _slow_in_bf16(fabric.device):
        warnings.warn(
            "this processor has no fast operations in bfloat16, in which a training may take many times as long: "
            "--set train.precision=32-true",
            stacklevel=2,
        )
    share = config.batch // fabric.world_size
    rows = range(fabric.global_rank * share, (fabric.global_rank + 1) * share)

    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore  (torch's stub lacks this overload)
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    compiled = cast(nn.Module, torch.compile(model)) if config.compile else model
    wrapped, optimiser = fabric.setup(compiled, _optimiser(config, model))
    state = _State(run, model, fabric.to_device(averaged), optimiser, export or _export)
    out.mkdir(parents=True, exist_ok=True)
    with held(out) if fabric.is_global_zero else nullcontext():
        with fabric.rank_zero_first():  # a damaged checkpoint is set aside before the other processes look
            state.restore(out, resume, fabric.is_global_zero)
        _train(fabric, state, wrapped, task, rows, out, progress)
    return out / "best.safetensors"


def _train(
    fabric: Fabric, state: _State, wrapped: nn.Module, task: Task, rows: range, out: Path, progress: bool
) -> None:
    """The steps that are left, of each of which this process takes the samples ``rows``."""
    config, model, optimiser, start = state.run.train, state.model, state.optimiser, state.step

    log = _Log(out, task.metrics, start, config.steps, progress) if fabric.is_global_zero else None
    pending: list[Tensor] = []
    wrapped.train()
    saved = mark = time.monotonic()
    batches = prefetch(lambda step: task.batch(step, rows), range(start, config.steps))
    with _signals() as signals, closing(batches), closing(log) if log else nullcontext():
        for step, batch in batches:
            torch.manual_seed(key("step", config.seed, step, fabric.global_rank))  # for dropout and the like
            rate = learning_rate(config, step)
            for group in optimiser.param_groups:
                group["lr"] = rate
            try:
                loss = task.loss(wrapped, _to_device(fabric, batch, config.channels_last))
            except Refused as error:
                if state.step == start:
                    raise  # of the network as it was given
                raise TrainingFailed(f"at step {state.step + 1}: {error} {_remedy(out)}") from error
            fabric.backward(loss)
            if config.clip:
                fabric.clip_gradients(wrapped, optimiser, max_norm=config.clip, error_if_nonfinite=False)
            optimiser.step()
            optimiser.zero_grad()
            project(model)
            state.advance()
            pending.append(loss.detach())

            done = state.step == config.steps
            validates = done or state.step % config.validate_every == 0
            logs = validates or state.step % config.log_every == 0
            if logs:
                losses = fabric.all_reduce(torch.stack(pending), reduce_op="mean")
                assert isinstance(losses, Tensor)
                _check(losses, state.step, out)
                values = {"loss": losses.mean().item(), "learning_rate": rate}
                values["step_seconds"] = (time.monotonic() - mark) / len(pending)
                pending.clear()
                if log:
                    if validates:
                        values |= state.validate(task, out)
                    log.row(state.step, values)
                mark = time.monotonic()
            if log:
                log.tick(state.step)

            # with several processes the decision to stop is shared, where they meet anyway
            stop = bool(signals) if fabric.world_size == 1 else logs and _any(fabric, bool(signals))
            if log and (done or stop or time.monotonic() - saved >= 60 * config.checkpoint_minutes):
                if pending:
                    _check(torch.stack(pending), state.step, out)
                state.save(out)
                saved = time.monotonic()
            if stop and not done:
                fabric.barrier()  # no process ends, which makes torchrun end the others, before the checkpoint is whole
                where = f"step {state.step} of {config.steps}"
                raise Interrupted(f"stopped at {where}, which is saved in {out}: the same command resumes from there")
    if fabric.is_global_zero:
        state.refresh()
        state.export(state.averaged, out / "last.safetensors", state.about({}))
    fabric.barrier()


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of the step after `step` are done: a linear rise, then half a cosine or a line down to 0 at the end."""
    rise = config.warmup * config.steps
    if step < rise:
        return config.learning_rate * min(1.0, (step + 1) / rise)
    fallen = (step - rise) / (config.steps - rise)
    left = (1 + math.cos(math.pi * fallen)) / 2 if config.schedule == "cosine" else 1 - fallen
    return config.learning_rate * left


@dataclass
class _State:
    """What a checkpoint holds: the weights, their average, the optimiser's state, the step and the best metric."""

    run: Run
    model: nn.Module
    averaged: nn.Module
    optimiser: torch.optim.Optimizer
    export: Export
    step: int = 0
    best: float = -math.inf

    @torch.no_grad()
    def advance(self) -> None:
        """Count a step and move the average: decay min(ema, (1+k)/(10+k)), so that it soon forgets the start."""
        self.step += 1
        if self.run.train.ema:
            decay = min(self.run.train.ema, (1 + self.step) / (10 + self.step))
            for average, weight in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)

    def refresh(self) -> None:
        """Give the averaged module the live one's buffers, and its weights too where nothing is averaged."""
        state = self.model.state_dict()
        if self.run.train.ema:
            state |= dict(self.averaged.named_parameters())
        self.averaged.load_state_dict(state)

    def validate(self, task: Task, out: Path) -> dict[str, float]:
        """Metrics of the averaged weights, exported if they are the best so far. The live module is left alone."""
        self.refresh()
        with torch.no_grad():
            metrics = task.validate(self.averaged)
        headline = metrics[task.metrics[0]]
        if headline > self.best or not (out / "best.safetensors").exists():
            self.best = -math.inf if math.isnan(headline) else headline
            self.export(self.averaged, out / "best.safetensors", self.about(metrics))
        return metrics

    def about(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """What is written beside exported weights."""
        return {"run": self.run.to_dict(), "step": self.step, "metrics": dict(metrics)}

    def save(self, out: Path) -> None:
        """Write a checkpoint, whole or not at all, and drop the oldest."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        if self.run.train.ema:
            tensors |= {f"averaged/{name}": value for name, value in self.averaged.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimiser.state[parameter].items() if parameter in self.optimiser.state else ():
                if value is not None:
                    tensors[f"optimiser/{name}/{kind}"] = value
        if not all(value.isfinite().all() for name, value in tensors.items() if name.startswith("model/")):
            raise TrainingFailed(f"the weights are not finite at step {self.step}; {_remedy(out)}")
        # as a string: JSON has no infinity
        state = {"step": self.step, "best": repr(self.best), "run": self.run.to_dict()}
        sealed.write(out / f"checkpoint-{self.step:09d}.safetensors", FORMAT, tensors, state)
        for path in _checkpoints(out)[KEPT:]:
            path.unlink()

    def restore(self, out: Path, resume: bool, writes: bool) -> None:
        """Take up the newest readable checkpoint in `out`, if there is one; damaged ones are renamed `.damaged`."""
        found = _checkpoints(out)
        if found and not resume:
            raise BadInput(f"{out} holds the checkpoints of a run: resume it, or choose another folder")
        for path in found:
            try:
                tensors, state = sealed.read(path, FORMAT)
            except BadCheckpoint as error:
                if writes:
                    warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=3)
                    path.replace(path.with_suffix(".damaged"))
                continue
            self._load(path, tensors, state)
            return
        if found:
            raise BadCheckpoint(f"{out}: no checkpoint is readable; choose another folder to start again")

    def _load(self, path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        if changed := differences(_fixed(state["run"]), _fixed(self.run.to_dict())):
            raise BadCheckpoint(f"{path} is of another run: {'; '.join(changed)}. Choose another folder")
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "averaged": {}, "optimiser": {}}
        for name, value in tensors.items():
            group, _, rest = name.partition("/")
            groups[group][rest] = value
        parameters = dict(self.model.named_parameters())
        try:
            self.model.load_state_dict(groups["model"])
            self.averaged.load_state_dict(groups["model"] | groups["averaged"])
            for name, value in groups["optimiser"].items():
                name, _, kind = name.rpartition("/")
                parameter = parameters[name]
                if kind != "step":  # in the weights' memory layout and place, for the same kernels and rounding
                    value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
                self.optimiser.state[parameter][kind] = value
        except (RuntimeError, KeyError) as error:
            raise BadCheckpoint(f"{path} does not fit the model: {error}") from error
        self.step, self.best = state["step"], float(state["best"])


class _Log:
    """The record of a run, by one process: `log.csv`, TensorBoard, and a progress bar, or a line a minute to a pipe."""

    def __init__(self, out: Path, metrics: tuple[str, ...], start: int, steps: int, progress: bool) -> None:
        # imported here because it takes seconds
        from torch.utils.tensorboard import SummaryWriter

        self.columns = ("step", "loss", "learning_rate", "step_seconds", *metrics)
        self.headline, self.start, self.steps = metrics[0], start, steps
        self.file = self._continue(out / "log.csv")
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        self.shown: dict[str, float] = {}
        self.began = self.printed = time.monotonic()
        self.lines, self.bar = progress and not sys.stderr.isatty(), None
        if progress and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.description}")
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text)
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.start()
            self.bar.add_task("", total=steps, completed=start)

    def _continue(self, path: Path) -> TextIO:
        """The open log, with the rows up to the step resumed from: later ones will be written again."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        if self.start and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                writer.writerows(row for row in csv.DictReader(file) if row["loss"] and int(row["step"]) <= self.start)
        with atomic(path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8")
        return path.open("a", newline="", encoding="utf-8")

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Record what was measured at a step."""
        csv.DictWriter(self.file, self.columns, restval="", lineterminator="\n").writerow({"step": step, **values})
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.shown |= {name: value for name, value in values.items() if name in ("loss", self.headline)}

    def tick(self, step: int) -> None:
        """Show how far the run is."""
        figures = ", ".join(f"{name} {value:.5g}" for name, value in self.shown.items())
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, description=figures)
        elif self.lines and (now - self.printed >= 60 or step == self.steps):
            left = (now - self.began) / (step - self.start) * (self.steps - step) / 60
            print(f"step {step}/{self.steps}, {left:.0f} min left, {figures}", file=sys.stderr, flush=True)
            self.printed = now

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        self.board.close()
        self.file.close()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGTERM and SIGINT that came, noted instead of obeyed. `torchrun` may send them twice, so all are noted."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if not received:
            print("stopping after this step", file=sys.stderr, flush=True)
        received.append(number)

    main = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _launch(config: TrainConfig, accelerator: str, devices: int | None) -> Fabric:
    """Fabric on the processes that `torchrun` started, or else on `devices` (1 unless given) that it starts itself."""
    there = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(), "gpu": torch.cuda.is_available()}
    if not there.get(accelerator):
        usable = ", ".join(name for name, usable in there.items() if usable)
        raise BadInput(f"no accelerator {accelerator!r} on this machine: there is {usable}")
    nodes = 1
    if torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    devices = devices or 1
    strategy = "ddp" if devices * nodes > 1 else "auto"
    fabric = Fabric(
        accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy, precision=config.precision
    )
    fabric.launch()
    if devices * nodes > 1:
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    """Leave the processes' group, whose threads must end before the interpreter does, or gloo aborts the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _optimiser(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise BadInput(f"{type(model).__name__} has no weights to train: give it at least one block")
    shared: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimiser == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, **shared)
    if config.optimiser in ("muon", "fourier_muon"):
        head = set(getattr(model, "head", nn.Module()).parameters())
        matrices = [p for p in parameters if p.ndim > 1 and p not in head]
        others = [p for p in parameters if p.ndim <= 1 or p in head]
        method = Muon if config.optimiser == "muon" else FourierMuon
        return method(matrices, others, lr=config.learning_rate, momentum=config.momentum, beta2=config.beta2)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimiser]
    return kind(parameters, betas=(config.momentum, config.beta2), **shared)


def _to_device(fabric: Fabric, batch: tuple[Tensor, ...], channels_last: bool) -> tuple[Tensor, ...]:
    moved = (fabric.to_device(item) for item in batch)
    if not channels_last:
        return tuple(moved)
    return tuple(item.contiguous(memory_format=torch.channels_last) if item.ndim == 4 else item for item in moved)


def _any(fabric: Fabric, flag: bool) -> bool:
    total = fabric.all_reduce(torch.tensor(float(flag), device=fabric.device), reduce_op="sum")
    return bool(total)


def _check(losses: Tensor, step: int, out: Path) -> None:
    """`losses` are those of the last steps up to `step`."""
    finite = losses.isfinite().tolist()
    if not all(finite):
        first = finite.index(False)
        at = step - len(finite) + 1 + first
        raise TrainingFailed(f"the loss is {losses[first].item()} at step {at}; {_remedy(out)}")


def _remedy(out: Path) -> str:
    good = next(iter(_checkpoints(out)), None)
    return f"lower train.learning_rate or set train.clip. The last good checkpoint is {good or 'none'}"


def _fixed(run: dict[str, Any]) -> dict[str, Any]:
    """The settings on which a run's weights depend; an empty one is as one not made."""
    return run | {"train": {name: value for name, value in run["train"].items() if name not in FREE and value != ""}}


def _checkpoints(out: Path) -> list[Path]:
    """Newest first."""
    return sorted(out.glob("checkpoint-*.safetensors"), reverse=True)


def _slow_in_bf16(device: torch.device) -> bool:
    """Whether this is a processor without vector operations that bfloat16 convolutions are written for."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _export(model: nn.Module, path: Path, about: dict[str, Any]) -> None:
    sealed.write(path, WEIGHTS, model.state_dict(), about)
