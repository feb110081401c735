"""Checkpoints: what is written comes back, and nothing that was damaged, changed or made up is believed."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from nonexpansive import certify, load, models
from nonexpansive.checkpoint import DEFAULTS, FORMAT, path_of, read, save
from nonexpansive.errors import BadCheckpoint, BadInput, Refused
from nonexpansive.nn.classifier import Classifier
from nonexpansive.nn.models import ProximalDenoiser, build
from nonexpansive.sealed import digest

CONFIG: dict[str, Any] = {"channels": 1, "features": 8, "blocks": 2}
TRAINING = {"steps": 10, "note": "σ = 25/255"}


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = build("denoiser", **CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint's bytes."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save(path, trained(), "denoiser", CONFIG, TRAINING)
    return path.read_bytes()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a safetensors file, and its tensors."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def forged(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object], content: bytes) -> Path:
    """The checkpoint with its header or its tensors changed, and a digest that is right for that."""
    written(path, content)
    header, tensors = read(path)
    fields = copy.deepcopy(vars(header))
    tensors = {name: t.clone() for name, t in tensors.items()}
    change(fields, tensors)
    text = json.dumps(fields, sort_keys=True)
    return written(path, to_bytes(tensors, {"format": FORMAT, "header": text, "sha256": digest(tensors, text)}))


def test_a_model_comes_back(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "sub σ.safetensors"
    model.train()
    save(path, model, "denoiser", CONFIG, TRAINING)
    assert model.training
    assert all(child.training for child in model.modules())
    loaded = load(path)
    assert not loaded.training
    x = torch.rand(1, 1, 9, 8)
    assert torch.allclose(loaded(x, 0.1), model.eval()(x, 0.1), atol=1e-6)  # in another memory layout
    assert certify(loaded, (1, 9, 8)) == certify(model, (1, 9, 8))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    header, _ = read(str(path))
    assert header.training == TRAINING
    assert header.config == CONFIG
    assert header.claimed["averaged"] == certify(model, (1, 32, 32)).averaged
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_come_back_as_the_same_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of 16 bits in float32, which is what is run, and certified: a file of half the size."""
    path, full, model = tmp_path / "model.safetensors", tmp_path / "full.safetensors", trained().to(dtype)
    save(path, model, "denoiser", CONFIG, {})
    save(full, model.float(), "denoiser", CONFIG, {})
    loaded = load(path)
    wide = torch.promote_types(dtype, torch.float32)
    for name, t in read(path)[1].items():
        assert t.dtype == dtype
        assert loaded.state_dict()[name].dtype == wide
        assert torch.equal(loaded.state_dict()[name], t.to(wide))
    assert certify(loaded, (1, 9, 8)) == certify(load(full).to(wide), (1, 9, 8))
    assert loaded(torch.rand(1, 1, 9, 8).to(wide), 0.1).dtype == wide


def test_weights_of_several_types_are_not_saved(tmp_path: Path) -> None:
    model = trained()
    next(model.parameters()).data = next(model.parameters()).data.double()
    with pytest.raises(BadInput, match="of one type"):
        save(tmp_path / "model.safetensors", model, "denoiser", CONFIG, {})


def test_a_classifier_comes_back(tmp_path: Path) -> None:
    path, config = tmp_path / "model.safetensors", {"classes": 3, "blocks": 1}
    model = build("paper_classifier", **config)
    save(path, model, "paper_classifier", config, {})
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(load(path)(x), model.eval()(x), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- damage


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, content: bytes) -> None:
    length = 8 + struct.unpack("<Q", content[:8])[0]
    ends = {
        0,
        1,
        7,
        8,
        9,
        100,
        length // 2,
        length - 1,
        length,
        length + 1,
        (length + len(content)) // 2,
        len(content) - 1,
    }
    for end in sorted(ends):
        with pytest.raises(BadCheckpoint):
            load(written(tmp_path / "cut.safetensors", content[:end]))
    with pytest.raises(BadCheckpoint):
        load(written(tmp_path / "long.safetensors", content + b"\0"))


def test_one_changed_byte_is_refused_wherever_it_is(tmp_path: Path, content: bytes) -> None:
    length = 8 + struct.unpack("<Q", content[:8])[0]
    header = content[:length].decode("utf-8", "replace")
    digest, config = content.index(b"sha256") + 12, content.index(b"features")
    places = {
        *range(8),
        8,
        9,
        config,
        digest,
        content.index(FORMAT.encode()),
        length - 1,
        length,
        length + 1,
        len(content) - 1,
    }
    places |= {content.index(b'"dtype"') + 9, content.index(b'"shape"') + 9, content.index(b"data_offsets") + 15}
    places |= set(range(10, len(content), len(content) // 150))
    assert header.startswith("{", 8)
    for place in sorted(places):
        for flip in (1, 0x80):
            changed = bytearray(content)
            changed[place] ^= flip
            if _means_the_same(content, bytes(changed)):
                continue
            with pytest.raises(BadCheckpoint):
                load(written(tmp_path / "flipped.safetensors", bytes(changed)))


def _means_the_same(one: bytes, other: bytes) -> bool:
    """Whether the change is one of blanks between or after the parts of the JSON header."""
    try:
        return parts(one) == parts(other)
    except (ValueError, struct.error, OverflowError, MemoryError):
        return False


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"weight": torch.ones(3)}, tmp_path / "torch.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(Payload()))
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.safetensors").write_text("no model\n" * 100)
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    (tmp_path / "large.safetensors").write_bytes(struct.pack("<Q", 10**9) + b"{}")
    (tmp_path / "bare.safetensors").write_bytes(to_bytes({"weight": torch.ones(3)}))
    (tmp_path / "other.safetensors").write_bytes(to_bytes({"weight": torch.ones(3)}, {"format": "pt"}))
    (tmp_path / "deep.safetensors").write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(BadCheckpoint, match=path.name):
            load(path)
    assert not (tmp_path / "executed").exists()
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(BadInput, match="not a file"):
        load(tmp_path / "folder.safetensors")
    with pytest.raises(BadInput, match="no such file"):
        load(tmp_path / "missing.safetensors")
    with pytest.raises(BadInput):
        load(f"{tmp_path}/nul\0.safetensors")
    for name in ("denoiser-purple", ""):
        with pytest.raises(BadInput, match="no shipped model") as caught:
            load(name)
        assert all(shipped in str(caught.value) for shipped in models())


# ------------------------------------------------------------------------------------------------------------------ forgeries


def first(tensors: dict[str, Tensor], ending: str = "linear.weight") -> Tensor:
    return next(t for name, t in tensors.items() if name.endswith(ending))


def _set(key: str, value: object) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    return lambda header, tensors: header.__setitem__(key, value)


def _config(**changes: object) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    return lambda header, tensors: header["config"].update(changes)


FORGERIES: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, Tensor]], object]]] = {
    "a smaller alpha": ("prove only", lambda h, t: h["claimed"].update(averaged=0.1)),
    "a smaller L": ("prove only", lambda h, t: h["claimed"].update(lipschitz=0.5)),
    "NaN claimed": ("not a number", lambda h, t: h["claimed"].update(averaged=float("nan"))),
    "text claimed": ("not a number", lambda h, t: h["claimed"].update(averaged="0.1")),
    "true claimed": ("not a number", lambda h, t: h["claimed"].update(averaged=True)),
    "a huge number claimed": ("not a number", lambda h, t: h["claimed"].update(averaged=10**400)),
    "a list of claims": ("claims", _set("claimed", [1, 2])),
    "fewer claims": ("claims", lambda h, t: h["claimed"].pop("averaged")),
    "another claim": ("claims", lambda h, t: h["claimed"].update(exact=1.0)),
    "another architecture": ("fit", _set("architecture", "paper_classifier")),
    "an unknown architecture": ("no architecture", _set("architecture", "denoisr")),
    "an architecture that is no name": ("header", _set("architecture", ["denoiser"])),
    "a config that is a list": ("header", _set("config", [1, 2])),
    "a field more": ("header", _set("pickle", "x")),
    "a field less": ("header", lambda h, t: h.pop("training")),
    "more features": ("fit", _config(features=16)),
    "fewer blocks": ("fit", _config(blocks=1)),
    "more blocks": ("fit", _config(blocks=3)),
    "an unknown setting": ("takes no", _config(feature=8)),
    "text for a number": ("fit", _config(features="8")),
    "a fraction": ("fit", _config(features=8.5)),
    "a negative kernel": ("fit", _config(kernel=-3)),
    "an even kernel": ("odd", _config(kernel=4)),
    "no factor": ("fit", _config(factor=0)),
    "an object for a name": ("fit", _config(method={"a": 1})),
    "a method with r = 0": ("radius", _config(method="midpoint")),
    "an activation that decreases": ("decreases", _config(activation="gelu")),
    "an endless number": ("fit", _config(kernel=10**30 + 1)),
    "a tensor more": ("Unexpected", lambda h, t: t.update(extra=torch.ones(3))),
    "a tensor less": ("Missing", lambda h, t: t.pop(next(iter(t)))),
    "a tensor of another shape": ("size mismatch", lambda h, t: t.update({next(iter(t)): torch.ones(3)})),
    "tensors of two types": ("fit", lambda h, t: t.update({next(iter(t)): next(iter(t.values())).double()})),
    "whole numbers": ("fit", lambda h, t: t.update({name: v.to(torch.int32) for name, v in t.items()})),
    "NaN weights": ("no certificate", lambda h, t: first(t).fill_(float("nan"))),
    "infinite weights": ("no certificate", lambda h, t: first(t).fill_(float("inf"))),
    "NaN thresholds": ("no certificate", lambda h, t: first(t, "log_threshold").fill_(float("nan"))),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_are_refused_although_their_digest_is_right(name: str, tmp_path: Path, content: bytes) -> None:
    word, change = FORGERIES[name]
    path = forged(tmp_path / "forged.safetensors", change, content)
    with pytest.raises(BadCheckpoint, match=word) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_larger_weights_are_certified_anew(tmp_path: Path, content: bytes) -> None:
    """Nothing stored is trusted: a forger who triples the weights gets a step that is right for them, and a map that is averaged."""

    def triple(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            if name.endswith("linear.weight"):
                t.mul_(3)

    model = load(forged(tmp_path / "forged.safetensors", triple, content))
    averaged = certify(model, (1, 8, 8)).averaged
    assert averaged is not None and averaged <= 0.9


def test_a_header_that_is_deeply_nested_is_refused(tmp_path: Path, content: bytes) -> None:
    _, tensors = read(written(tmp_path / "model.safetensors", content))
    text = "[" * 100_000 + "]" * 100_000
    data = to_bytes(tensors, {"format": FORMAT, "header": text, "sha256": digest(tensors, text)})
    with pytest.raises(BadCheckpoint, match="header"):
        load(written(tmp_path / "deep.safetensors", data))


def test_a_digest_covers_names_types_shapes_and_text() -> None:
    one = {"a": torch.ones(2, 3)}
    digests = {
        digest(one, "x"), digest(one, "y"), digest({"b": torch.ones(2, 3)}, "x"), digest({"a": torch.ones(3, 2)}, "x"),
        digest({"a": torch.ones(2, 3).int()}, "x"), digest({"a": torch.zeros(2, 3)}, "x"), digest({}, "x"),
        hashlib.sha256(b"x").hexdigest(),
    }  # fmt: skip
    assert len(digests) == 7  # the last two agree: no tensors, nothing added


# ------------------------------------------------------------------------------------------------------------------- writing


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(BadInput, match="not what the architecture"):
        save(path, trained(), "denoiser", CONFIG | {"blocks": 3}, {})
    with pytest.raises(BadInput, match="no architecture"):
        save(path, trained(), "denoisr", CONFIG, {})
    with pytest.raises(BadInput, match="JSON"):
        save(path, trained(), "denoiser", CONFIG, {"loss": float("nan")})
    with pytest.raises(BadInput, match="JSON"):
        save(path, trained(), "denoiser", CONFIG, {"path": Path("x")})
    broken = trained()
    first(broken.state_dict()).fill_(float("nan"))
    with pytest.raises(Refused):
        save(path, broken, "denoiser", CONFIG, {})
    with pytest.raises(BadInput, match="not written"):
        save(tmp_path / "missing" / "model.safetensors", trained(), "denoiser", CONFIG, {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "model.safetensors", content)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="disk is full"):
        save(path, trained(), "denoiser", CONFIG, {"steps": 99})
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "model.safetensors", content)
    program = (
        "import os, signal, sys\n"
        "from nonexpansive import checkpoint\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"checkpoint.save({str(path)!r}, checkpoint.load({str(path)!r}), 'denoiser', {CONFIG!r}, {{'steps': 99}})\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert path.read_bytes() == content
    load(path)


# ------------------------------------------------------------------------------------------------------------------- shipped


@pytest.mark.parametrize("name", models())
def test_shipped_models_load(name: str) -> None:
    assert path_of(name).is_file()
    model = load(name)
    if isinstance(model, Classifier):
        proved, claimed = certify(model, model.shape), read(path_of(name))[0].claimed
        assert proved.lipschitz == pytest.approx(claimed["lipschitz"], rel=1e-9)
        assert name not in DEFAULTS.values() or certify(model.features, model.shape).lipschitz <= 1
        return
    certificate = certify(model, (model.channels, 32, 32))  # type: ignore[arg-type]
    if isinstance(model, ProximalDenoiser):
        assert certificate.proximal and certificate.lipschitz == pytest.approx(
            read(path_of(name))[0].claimed["lipschitz"], rel=1e-6
        )
    elif model.lipschitz is not None:
        assert 0.999 * model.lipschitz < certificate.lipschitz <= model.lipschitz  # type: ignore[operator]
    else:
        assert certificate.averaged is not None and certificate.averaged <= model.alpha  # type: ignore[operator]
