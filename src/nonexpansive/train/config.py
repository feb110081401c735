"""What a training run is, as checked values: read from TOML, changed by `key=value`, refused by name before work."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from nonexpansive.errors import BadInput

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True)
class TrainConfig:
    """How to optimise, the same for every task.

    `warmup` is the fraction of `steps` in which the learning rate rises linearly; it then falls to 0, by half a cosine
    (`cosine`) or linearly (`one_cycle`). `momentum` is SGD's and Muon's, and β₁ of Adam; `beta2` is Adam's, which Muon uses
    for biases and the last layer. `fourier_muon` is Muon with the updates of convolutions orthogonal at each frequency. `clip`
    bounds the Euclidean norm of the whole gradient and `ema` is the decay of the averaged weights, which are those validated
    and exported; 0 turns either off. `batch` counts the samples of one step over all processes. `start` names the weights that the
    model begins with, a shipped model or a file, in place of fresh ones: those of a model of the same shapes.
    """

    steps: int = 40_000
    batch: int = 16
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "one_cycle"] = "cosine"
    warmup: float = 0.05
    optimiser: Literal["adam", "adamw", "fourier_muon", "muon", "sgd"] = "adam"
    momentum: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 0.0
    ema: float = 0.0
    seed: int = 0
    start: str = ""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    compile: bool = False
    channels_last: bool = False
    checkpoint_minutes: float = 5.0
    validate_every: int = 1000
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "validate_every", "log_every"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        _require(0 < self.learning_rate < math.inf, "train.learning_rate", self.learning_rate, "positive and finite")
        for name in ("warmup", "momentum", "beta2", "ema"):
            _require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "in [0, 1)")
        for name in ("weight_decay", "clip", "checkpoint_minutes"):
            _require(0 <= getattr(self, name) < math.inf, f"train.{name}", getattr(self, name), "finite, at least 0")
        _require(0 <= self.seed < 2**63, "train.seed", self.seed, "in [0, 2⁶³)")
        decays = "muon" not in self.optimiser or self.weight_decay == 0
        _require(decays, "train.weight_decay", self.weight_decay, "0 with muon, which keeps the norms of the weights")


@dataclass(frozen=True)
class DenoiseData:
    """Photographs of a denoising run. Paths are relative to the data folder; noise levels are in units of 1/255.

    The folders `train` and `validation` hold photographs; `exclude` is a file of names that are used from neither (the
    test photographs). One level σ is drawn for each sample, uniformly in `sigma`; validation is at each of `levels`, on
    the first `validation_images` photographs by name.

    The loss is the mean over the samples of what `loss` names, `rmse`, the root mean square error over σ^0.75, or its square, `mse`. The
    root is there for the sake of the mean PSNR: that counts a photograph's relative error, where a mean of squares is a matter of its
    hardest patches. (The mean of the patches' own PSNR would go too far: they differ more than photographs do.)
    """

    train: str = "train"
    validation: str = "val"
    exclude: str = ""
    channels: Literal[1, 3] = 3
    patch: int = 64
    sigma: tuple[float, float] = (1.0, 55.0)
    levels: tuple[float, ...] = (5.0, 15.0, 25.0, 50.0)
    validation_images: int = 16
    loss: Literal["rmse", "mse"] = "rmse"

    def __post_init__(self) -> None:
        _require(self.patch >= 2, "data.patch", self.patch, "at least 2")
        _require(self.validation_images >= 1, "data.validation_images", self.validation_images, "at least 1")
        low, high = self.sigma
        _require(0 < low <= high < math.inf, "data.sigma", self.sigma, "[low, high] with 0 < low ≤ high")
        positive = bool(self.levels) and all(0 < level < math.inf for level in self.levels)
        _require(positive, "data.levels", self.levels, "one or more positive levels")
        _require(len(set(self.levels)) == len(self.levels), "data.levels", self.levels, "distinct")


@dataclass(frozen=True)
class ClassifyData:
    """Images and the loss of a classification run.

    `source` names the data set as for `load_images`, the fraction `validation` of whose training images is held out, drawn
    by `train.seed`; of the others the first `limit` are used (0: all). Each image is shifted by up to `crop` pixels, what
    enters being black, mirrored with probability 1/2 if `flip`, and, with probability 1/2, a rectangle is blackened whose share of the
    area is uniform in `erase` (0, 0: none).

    The loss is `cross_entropy` of (z - ξ·onehot(y))/τ, times τ, or the `multi_margin` hinge Σ_j max(0, ξ - z_y + z_j)/K
    over j ≠ y; ξ is `margin`, τ the `temperature`. With a radius `near` above 0 the logit of the strongest rival is
    z_j + F - `near`·‖w_y - w_j‖ in place of z_j, F a bound of what the margin may lose within `near` of the image
    (`Classifier.forward`): it enlarges the radii that are certified near images, and a step takes some five times as long.
    Validation's headline, by the Lipschitz constant alone, is the share of images that are classified
    rightly with a radius above `radius` (in units of images in [0, 1]; 0: rightly at all), so it decides "best".
    """

    source: str = "cifar10"
    validation: float = 0.1
    limit: int = 0
    crop: int = 0
    flip: bool = False
    erase: tuple[float, float] = (0.0, 0.0)
    loss: Literal["cross_entropy", "multi_margin"] = "cross_entropy"
    margin: float = 0.0
    temperature: float = 1.0
    near: float = 0.0
    radius: float = 0.0

    def __post_init__(self) -> None:
        _require(0 < self.validation < 1, "data.validation", self.validation, "a fraction between 0 and 1")
        for name in ("limit", "crop", "margin", "near", "radius"):
            _require(0 <= getattr(self, name) < math.inf, f"data.{name}", getattr(self, name), "finite, at least 0")
        _require(0 < self.temperature < math.inf, "data.temperature", self.temperature, "positive and finite")
        low, high = self.erase
        _require(0 <= low <= high < 1, "data.erase", self.erase, "[low, high] with 0 ≤ low ≤ high < 1")
        fits = self.loss == "cross_entropy" or (self.margin > 0 and self.temperature == 1)
        _require(fits, "data.loss", self.loss, "used with a margin above 0 and no temperature")


DATA: dict[str, type] = {"denoise": DenoiseData, "classify": ClassifyData}
"""The data settings of each task that can be named in a file."""


@dataclass(frozen=True)
class Run:
    """A whole training run: the task, the model's name and arguments, the data and the optimisation.

    In a file: `task = "denoise"`, then the tables `[model]` (`name` and the model's arguments), `[data]` and `[train]`.
    """

    task: str
    model: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    data: Any = None
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def from_toml(cls, path: Path | str, overrides: Iterable[str] = ()) -> Run:
        """The run that a TOML file describes, after `overrides` such as `train.steps=100`. Raises `BadInput`."""
        return cls.from_dict(apply_overrides(load_toml(path), overrides))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        """The inverse of `to_dict`; every unknown key, wrong type and value out of range is a `BadInput`."""
        accepted = ("task", "model", "data", "train")
        for key in values:
            if key not in accepted:
                raise BadInput(unknown("setting", key, accepted))
        task = _typed(values.get("task", "a missing task"), str, "task")
        if task not in DATA:
            raise BadInput(unknown("task", task, DATA))
        tables = {name: values.get(name, {}) for name in accepted[1:]}
        for name, table in tables.items():
            if not isinstance(table, Mapping):
                raise BadInput(f"{name}: expected a table of settings, got {table!r}")
        kwargs = dict(tables["model"])
        if "name" not in kwargs:
            raise BadInput("model.name: missing, the name of the model to train")
        model = _typed(kwargs.pop("name"), str, "model.name")
        data = read(DATA[task], tables["data"], "data")
        return cls(task, model, kwargs, data, read(TrainConfig, tables["train"], "train"))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, as in the TOML file."""
        # pyright takes any dataclass to be perhaps a class
        data = dataclasses.asdict(self.data) if dataclasses.is_dataclass(self.data) else self.data or {}  # pyright: ignore
        values = {
            "task": self.task,
            "model": {"name": self.model, **self.kwargs},
            "data": data,
            "train": dataclasses.asdict(self.train),
        }
        return _plain(values)


def load_toml(path: Path | str) -> dict[str, Any]:
    """What a TOML file holds. Raises `BadInput`."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not valid TOML ({error})") from error


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of nested `values` with each `dotted.key=value` set; the value is read as TOML, else as bare text."""
    result = copy.deepcopy(dict(values))
    for override in overrides:
        path, equals, text = override.partition("=")
        *tables, key = keys = [part.strip() for part in path.split(".")]
        if not equals or not all(keys):
            raise BadInput(f"--set {override}: expected key=value, such as train.steps=100")
        table = result
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise BadInput(f"--set {override}: {name} is a value, not a table of settings")
        table[key] = _value(text.strip())
    return result


def read(cls: type[T], values: Mapping[str, Any], section: str) -> T:
    """The dataclass `cls` from a table of settings, each checked against its annotation. Raises `BadInput`."""
    hints = get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # pyright: ignore
    for key in values:
        if key not in fields:
            raise BadInput(unknown("setting", f"{section}.{key}", [f"{section}.{name}" for name in fields]))
    for name, item in fields.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise BadInput(f"{section}.{name}: missing")
    return cls(**{name: _typed(value, hints[name], f"{section}.{name}") for name, value in values.items()})


def unknown(kind: str, name: str, accepted: Collection[str]) -> str:
    """The message for a name that is not among those accepted, with the ones that resemble it."""
    close = difflib.get_close_matches(name, list(accepted), n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{name}: unknown {kind}.{hint} Accepted: {', '.join(accepted)}."


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two nested dicts of settings, one line a setting."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            for line in differences(old.get(key, "unset"), new.get(key, "unset"), f"{path}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{path} was {old!r}, now {new!r}"]


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotated type: an int passes for a float and a list for a tuple, nothing else is converted."""
    if get_origin(hint) is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in get_args(hint)):
            raise BadInput(unknown("value", f"{name} = {value!r}", [repr(choice) for choice in get_args(hint)]))
        return value
    if get_origin(hint) is tuple:
        of = get_args(hint)
        if not isinstance(value, (list, tuple)) or (of[-1] is not Ellipsis and len(of) != len(value)):
            count = "numbers" if of[-1] is Ellipsis else f"{len(of)} numbers"
            raise BadInput(f"{name} = {value!r}: expected a list of {count}")
        return tuple(_typed(item, of[0], name) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        wanted = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[hint]
        raise BadInput(f"{name} = {value!r}: expected {wanted}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise BadInput(f"{name} = {value!r}: must be {wanted}")
