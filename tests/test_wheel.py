"""The wheel: what is installed is enough, without the source tree."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from distill.app import CONF

ROOT = CONF.parent


@pytest.mark.slow
def test_a_wheel_has_the_configuration_and_composes_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    here = {str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml")}
    assert {str(path.relative_to(site / "distill/conf")) for path in site.glob("distill/conf/**/*.yaml")} == here
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from distill.app import CONF, train; print(CONF); train()"
    shown = subprocess.run(
        [sys.executable, "-c", code, "--cfg", "job", "model=resnet50", "student=micro"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert shown.startswith(f"{site}/distill/conf\n")
    assert "name: mobilenetv3-small" in shown
