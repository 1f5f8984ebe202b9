"""The package as others get it: what the wheel holds, that it works anywhere, which way its imports go."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("trgnet", "kernels", "optimizers")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources: the checkout stays clean, and no old build gets in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
               "--wheel-dir", str(out), str(source)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = out.glob("*.whl")
    return file


def test_wheel_holds_trgnet_and_nothing_else_at_the_top_level(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert "trgnet" in top
    assert all(
        name == "trgnet" or (name.startswith("trgnet-") and name.endswith(".dist-info")) for name in top
    ), top


def test_wheel_holds_every_module_and_data_file(wheel: Path):
    expected = set()
    for folder, package in (
        ("trgnet", "trgnet"),
        ("kernels", "trgnet/kernels"),
        ("optimizers", "trgnet/optimizers"),
    ):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                expected.add(f"{package}/{file.relative_to(ROOT / folder).as_posix()}")
    assert {"trgnet/configs/mocap6.yaml", "trgnet/kernels/__init__.py"} <= expected
    assert not expected - set(zipfile.ZipFile(wheel).namelist())


def test_installed_wheel_works_far_from_its_source(wheel: Path, tmp_path: Path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--target",
        str(target),
    ]
    subprocess.run([*command, str(wheel)], check=True)
    program = (
        "import trgnet, trgnet.kernels, trgnet.optimizers\n"
        "print(trgnet.__file__, trgnet.kernels.__file__, trgnet.optimizers.__file__, sep='\\n')\n"
        "dataset = trgnet.load_dataset('mocap6')\n"
        "print(sum(recording.length for recording in dataset.recordings))\n"
        "print(trgnet.load_config('mocap6').data.name)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    *files, frames, config = result.stdout.split("\n")[:-1]
    assert [Path(file).relative_to(target).parent.as_posix() for file in files] == [
        "trgnet",
        "trgnet/kernels",
        "trgnet/optimizers",
    ]
    assert (frames, config) == ("2058", "mocap6")


def test_checkout_runs_as_a_module_without_installation(tmp_path: Path):
    program = "import trgnet.kernels, trgnet.optimizers; print(trgnet.kernels.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == ROOT / "kernels" / "__init__.py"


def test_public_names_are_there_and_load_lazily():
    program = (
        "import sys, trgnet\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "for name in trgnet.__all__: getattr(trgnet, name)\n"
        "try: trgnet.nonsense\n"
        "except AttributeError as error: assert 'nonsense' in str(error)\n"
        "else: raise SystemExit('an unknown name must be an AttributeError')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def imports(folder: str) -> Iterator[tuple[str, str, int]]:
    """(place, absolute or relative module, level) of every import statement of a folder's modules."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        depth = len(file.relative_to(ROOT / folder).parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            place = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield place, alias.name, 0
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= depth, f"{place}: a relative import that leaves {folder}/"
                yield place, node.module or "", node.level


@pytest.mark.parametrize(
    ("folder", "below"),
    [
        ("kernels", ()),
        ("optimizers", ("trgnet.kernels",)),
        ("trgnet", ("trgnet.kernels", "trgnet.optimizers")),
    ],
)
def test_imports_go_downwards_and_are_relative_inside_a_package(folder: str, below: tuple[str, ...]):
    found = list(imports(folder))
    assert found
    for place, module, level in found:
        top = module.split(".")[0]
        if level:
            assert folder != "trgnet" or top not in ("kernels", "optimizers"), (
                f"{place}: import it by its full name"
            )
        elif top in SOURCES:
            allowed = any(module == name or module.startswith(f"{name}.") for name in below)
            assert allowed, f"{place}: {folder}/ must not import {module}"
