"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_it_runs(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pytest.importorskip("nonexpansive.app.images", reason="needs the extra nonexpansive[app]")
    photo = Path(images.__file__).parents[1] / "photographs" / "astronaut.png"
    monkeypatch.chdir(tmp_path)
    images.write_image(tmp_path / "photo.png", images.read_image(photo).tensor[:, 60:140, 180:260])
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(BLOCKS[index], f"README block {index}", "exec"), names)
    certificate = names.get("certificate") or names["job"].certificate  # type: ignore[attr-defined]
    assert certificate.nonexpansive if "job" in names else certificate.lipschitz < 2  # type: ignore[attr-defined]
