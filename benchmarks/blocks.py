"""What a flow block costs beside the bare layers it is made of: ``python benchmarks/blocks.py [--threads N] [--quick]``.

Prints markdown tables. What is compared runs in turns, and a ratio is the median over the turns, so that other load on the machine
falls on both sides. With one thread the clock is that of the process's own CPU time, else wall time.
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nonexpansive
from nonexpansive import GradientFlow
from nonexpansive.nn import Flows
from nonexpansive.nn.linear import affine, homogeneous
from nonexpansive.nn.models import paper_classifier

Program = Callable[[], object]

SHAPES = [(32, 16, 32, 32), (16, 64, 32, 32), (16, 128, 16, 16)]
CHAIN = (32, 64, 32, 32)
BLOCKS = 10


class BarePair(nn.Module):
    """Aᵀσ(Ax + b) and nothing else: conv2d, ReLU, conv_transpose2d with one weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(F.relu(self.linear(x)), self.linear.weight, padding=1)


def flow(channels: int, **settings: object) -> GradientFlow:
    return GradientFlow(nn.Conv2d(channels, channels, 3, padding=1), "relu", **settings)  # type: ignore[arg-type]


def without_control(model: nn.Module, run: Program) -> Program:
    """``run`` with every flow's training step held at what it is now, so that the norm control costs nothing. With the same weights at the
    same places: of two copies of one network, one can be slower throughout."""
    held = []
    for flow in (module for module in model.modules() if isinstance(module, GradientFlow)):
        squared = flow.control.squared_norm(flow.linear, homogeneous).detach()
        held.append((flow.control, squared, flow.control.training_step(squared, 1.0, flow.tableau)))

    def frozen_run() -> None:
        for control, squared, step in held:
            control.squared_norm = lambda *_, value=squared: value  # type: ignore[method-assign]
            control.training_step = lambda *_, value=step: value  # type: ignore[method-assign]
        run()
        for control, *_ in held:
            del control.squared_norm, control.training_step

    return frozen_run


def gradients(model: nn.Module, x: Tensor, autocast: bool = False) -> Program:
    """A forward and a backward pass, with gradients of x and of the weights."""
    x = x.clone().requires_grad_()
    upstream = torch.randn_like(x)

    def run() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            y = model(x)
        y.backward(upstream.to(y.dtype))

    return run


def inference(model: nn.Module, x: Tensor, autocast: bool = False) -> Program:
    model = model.eval()

    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            return model(x)

    return run


# --------------------------------------------------------------------------------------------------------------------- clocks


def measure(programs: dict[str, Program], turns: int) -> dict[str, list[float]]:
    """Seconds of each program in each turn, in an order drawn anew (what ran before leaves traces in caches and allocator)."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        program()
        program()
    order = random.Random(0)
    for _ in range(turns):
        for name, program in order.sample(list(programs.items()), len(programs)):
            began = clock()
            program()
            times[name].append(clock() - began)
    return times


def ratio(of: list[float], to: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def of_fastest(of: list[float], to: list[float]) -> float:
    """The ratio of the least disturbed turns: what the medians tend to on a quiet machine."""
    return min(of) / min(to)


def milliseconds(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):.1f}"


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    lines = [head, ["---"] * len(head), *rows]
    print(f"\n### {title}\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines), flush=True)


# --------------------------------------------------------------------------------------------------------------------- tables


def overhead(turns: int) -> None:
    """A block against the bare pair: x and h, and the norm control, are what it adds."""
    rows = []
    for shape in SHAPES:
        torch.manual_seed(0)
        x, channels = torch.randn(shape), shape[1]
        bare, block = BarePair(channels), flow(channels)
        block.linear.load_state_dict(bare.linear.state_dict())
        names = {"bare": bare, "block": block}
        programs = {name: gradients(model, x) for name, model in names.items()}
        train = measure({**programs, "frozen": without_control(block, programs["block"])}, turns)
        infer = measure({name: inference(model, x) for name, model in names.items()}, 2 * turns)
        for what, times, frozen_ratio in (
            ("forward + backward", train, f"{ratio(train['frozen'], train['bare']):.3f}"),
            ("inference", infer, "none needed"),
        ):
            total = f"**{ratio(times['block'], times['bare']):.3f}**"
            shown = [milliseconds(times["bare"]), milliseconds(times["block"])]
            quiet = f"{of_fastest(times['block'], times['bare']):.3f}"
            rows.append([str(shape), what, *shown, frozen_ratio, total, quiet])
    table(
        "A flow block (Euler, ReLU, 3x3) against conv2d + ReLU + conv_transpose2d",
        ["input", "pass", "bare ms", "block ms", "ratio, step frozen", "ratio", "ratio of the fastest"],
        rows,
    )


KINDS = {"bare pairs": 0, "blocks": 0, "blocks, recompute=1": 1, "blocks, recompute=2": 2, "blocks, recompute=3": 3}
"""The chains whose memory is compared, and of how many blocks each keeps one input."""


def _chain(kind: str, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    channels, x = shape[1], torch.randn(shape, requires_grad=True)
    make = BarePair if kind == "bare pairs" else flow
    return Flows((make(channels) for _ in range(BLOCKS)), KINDS[kind]), x


def saved_for_backward(kind: str) -> int:
    """Bytes of distinct storages that the graph of a forward pass holds, the weights left out."""
    model, x = _chain(kind, CHAIN)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            held[t.untyped_storage().data_ptr()] = t  # kept alive, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(t.untyped_storage().nbytes() for t in held.values())


def peak_of_process(kind: str) -> int:
    """By how many bytes a training step raises the peak of resident memory; for a process of its own."""
    torch.set_num_threads(1)
    unit = 1 if sys.platform == "darwin" else 1024
    for shape in ((1, *CHAIN[1:]), CHAIN):
        model, x = _chain(kind, shape)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model(x).sum().backward()
    return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def memory() -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # freed tensors go back to the system at once
    kinds = list(KINDS)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = pool.map(peak_of_process, kinds, chunksize=1)
    saved = [saved_for_backward(kind) for kind in kinds]
    rows = [
        [kind, f"{s / 2**20:.0f}", f"{s / saved[0]:.3f}", f"{p / 2**20:.0f}", f"**{p / peaks[0]:.3f}**"]
        for kind, s, p in zip(kinds, saved, peaks, strict=True)
    ]
    table(
        f"Memory of a training step, a chain of {BLOCKS} on {CHAIN} (one such tensor: {math.prod(CHAIN) / 2**18:.0f} MiB)",
        ["chain", "saved for backward, MiB", "ratio", "rise of the process's peak, MiB", "ratio"],
        rows,
    )


def norm_control(turns: int, batch: int) -> None:
    """Twice: as the difference of two steps, which is all of it but needs a quiet machine, and on its own."""
    rows = []
    x, labels = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))

    def step(model: nn.Module) -> Program:
        optimiser = torch.optim.SGD(model.parameters(), 1e-6)

        def run() -> None:
            optimiser.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimiser.step()

        return run

    def alone(model: nn.Module) -> Program:
        flows = [module for module in model.modules() if isinstance(module, GradientFlow)]

        def run() -> None:
            for f in flows:
                h: Any  # the adaptive control steers by a number
                h, _ = f.control.training_step(f.control.squared_norm(f.linear, homogeneous), 1.0, f.tableau)
                if isinstance(h, Tensor) and h.requires_grad:
                    torch.autograd.backward(h)

        return run

    for control in ("adaptive", "maximal"):
        torch.manual_seed(0)
        model = paper_classifier(control=control)
        on = step(model)
        programs = {"on": on, "frozen": without_control(model, on), "alone": alone(model)}
        times = measure(programs, turns)
        difference, share = ratio(times["on"], times["frozen"]) - 1, ratio(times["alone"], times["frozen"])
        rows.append([control, milliseconds(times["frozen"]), milliseconds(times["on"]), f"{100 * difference:.1f} %"])
        rows[-1] += [milliseconds(times["alone"]), f"**{100 * share:.1f} %**"]
    table(
        f"Norm control in a training step of the paper's CIFAR-10 network, batch {batch}",
        ["control", "step frozen, ms", "step, ms", "added", "the control's work alone, ms", "share"],
        rows,
    )


def modes(turns: int) -> None:
    """The ways to run the same chain, each checked against eager float32."""
    torch.manual_seed(0)
    shape = SHAPES[1]
    model, x = nn.Sequential(*(flow(shape[1]) for _ in range(2))), torch.randn(shape)
    wide = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last)
    ways: dict[str, tuple[nn.Module, Tensor, bool]] = {
        "eager float32": (model, x, False),
        "channels-last": (wide, x_last, False),
        "bfloat16 autocast": (model, x, True),
        "bfloat16 autocast, channels-last": (wide, x_last, True),
        "torch.compile": (torch.compile(copy.deepcopy(model)), x, False),  # type: ignore[dict-item]
        "torch.compile, bfloat16 autocast, channels-last": (torch.compile(copy.deepcopy(wide)), x_last, True),  # type: ignore[dict-item]
    }
    train = measure({name: gradients(*way) for name, way in ways.items()}, turns)
    programs = {name: inference(*way) for name, way in ways.items()}
    infer = measure(programs, turns)
    outputs = {name: program() for name, program in programs.items()}
    reference = outputs["eager float32"]
    assert isinstance(reference, Tensor)
    rows = []
    for name, (_, _, autocast) in ways.items():
        error = float((outputs[name].float() - reference).norm() / reference.norm())  # type: ignore[union-attr]
        assert error < (2e-2 if autocast else 1e-5), f"{name} is off by {error:g}"
        rows.append([name, milliseconds(train[name]), f"**{ratio(train[name], train['eager float32']):.2f}**"])
        rows[-1] += [milliseconds(infer[name]), f"**{ratio(infer[name], infer['eager float32']):.2f}**", f"{error:.0e}"]
    table(
        f"Ways to run a chain of 2 blocks on {shape}",
        ["way", "forward + backward, ms", "ratio", "inference, ms", "ratio", "relative deviation of the output"],
        rows,
    )


def growth(turns: int) -> None:
    def chain(depth: int, batch: int, side: int) -> Program:
        model = nn.Sequential(*(flow(64) for _ in range(depth)))
        return gradients(model, torch.randn(batch, 64, side, side))

    rows = []
    for what, sizes in {
        "depth": [(2, 4, 32), (4, 4, 32), (8, 4, 32)],
        "pixels": [(2, 4, 32), (2, 4, 45), (2, 4, 64)],
        "batch": [(2, 4, 32), (2, 8, 32), (2, 16, 32)],
    }.items():
        times = measure({str(i): chain(*size) for i, size in enumerate(sizes)}, turns)
        actual = [math.log(d * b * s * s) for d, b, s in sizes]
        seconds = [math.log(statistics.median(t)) for t in times.values()]
        exponent = statistics.linear_regression(actual, seconds).slope
        rows.append([what, *(milliseconds(t) for t in times.values()), f"**{exponent:.2f}**"])
    table(
        "Growth of a training step: 2 blocks of 64 channels on 4 pictures of 32x32, then more of one",
        ["of", "1x, ms", "2x, ms", "4x, ms", "exponent"],
        rows,
    )


def few_channels(turns: int) -> None:
    """A convolution of few channels and its pullback, which goes column by column, beside torch's own two."""
    rows = []
    for batch, channels, filters, kernel, side in [
        (8, 1, 48, 9, 64),
        (1, 1, 48, 9, 256),
        (8, 4, 35, 3, 32),
        (8, 4, 99, 5, 32),
        (1, 4, 99, 5, 256),
        (8, 12, 105, 5, 32),
    ]:
        conv = nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=False)
        x = torch.randn(batch, channels, side, side)
        with torch.no_grad():
            t, (s, pullback) = conv(x), affine(conv, x)  # to pull back: each of the layout that it made

        def ours(conv: nn.Conv2d = conv, x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return affine(conv, x)[0]

        def theirs(conv: nn.Conv2d = conv, x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return conv(x)

        def pulled(s: Tensor = s, pullback: Callable[..., Tensor] = pullback) -> Tensor:
            with torch.no_grad():
                return pullback(s)

        def transposed(t: Tensor = t, conv: nn.Conv2d = conv) -> Tensor:
            with torch.no_grad():
                return F.conv_transpose2d(t, conv.weight, padding=conv.padding)  # type: ignore[arg-type]

        times = measure({"theirs": theirs, "ours": ours, "transposed": transposed, "pulled": pulled}, turns)
        rows.append([f"{batch} of {channels}→{filters}, {kernel}x{kernel}, {side}x{side}"])
        for there, here in ((theirs, ours), (transposed, pulled)):
            deviation = float((here() - there()).norm() / there().norm())
            assert deviation < 1e-5, f"{here.__name__} of {conv} is off by {deviation:g}"
            one, other = times[there.__name__], times[here.__name__]
            rows[-1] += [milliseconds(one), milliseconds(other), f"**{ratio(one, other):.1f}**"]
    table(
        "A convolution and its adjoint, without gradients",
        ["pictures", "conv2d, ms", "affine, ms", "ratio", "conv_transpose2d, ms", "pullback, ms", "ratio"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer turns, ratios within a few percent")
    parser.add_argument(
        "--only", choices=["overhead", "memory", "control", "modes", "growth", "few-channels"], help="one table alone"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    nonexpansive.keep_memory()
    quick = arguments.quick
    tables: dict[str, Callable[[], None]] = {
        "overhead": lambda: overhead(7 if quick else 25),
        "memory": memory,
        "control": lambda: norm_control(5 if quick else 40, 128),
        "modes": lambda: modes(3 if quick else 11),
        "growth": lambda: growth(3 if quick else 11),
        "few-channels": lambda: few_channels(5 if quick else 25),
    }
    print(f"torch {torch.__version__}, {arguments.threads} thread(s)")
    for name, show in tables.items():
        if arguments.only in (None, name):
            show()


if __name__ == "__main__":
    main()
