"""What is installed is what is in the tree, with `passes/` shipped as `snncompile.passes`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SOURCE_FOLDERS = {"snncompile": ROOT / "snncompile", "snncompile/passes": ROOT / "passes"}

BUILD_SCRIPT = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""

# Adapters import the framework they adapt, which need not be installed; nothing else may be missing.
IMPORT_SCRIPT = """
import importlib
for name in MODULES:
    try:
        print(importlib.import_module(name).__file__)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in {"spikingjelly", "snntorch", "norse", "triton"}:
            raise
"""


def run(
    *command: str | Path, cwd: Path, pythonpath: Path | None = None, **extra_env: str
) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "MYPYPATH"}} | extra_env
    if pythonpath is not None:
        env["PYTHONPATH"] = str(pythonpath)
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def python(code: str, *, cwd: Path, pythonpath: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, cwd=cwd, pythonpath=pythonpath)


def build(kind: str, tree: Path, destination: Path) -> Path:
    """Build a "wheel" or "sdist" from `tree` with the installed setuptools: no isolation, so no network."""
    destination.mkdir(parents=True, exist_ok=True)
    result = run(sys.executable, "-c", BUILD_SCRIPT, f"build_{kind}", destination, cwd=tree)
    assert result.returncode == 0, result.stderr
    return destination / result.stdout.splitlines()[-1]


def package_files(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def tree_files() -> set[str]:
    """The files an install should have, named by their place in it."""
    modules = {
        f"{target}/{path.relative_to(folder).as_posix()}"
        for target, folder in SOURCE_FOLDERS.items()
        for path in folder.rglob("*.py")
    }
    return modules | {"snncompile/py.typed"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads: setuptools writes beside its sources, and an old build/ would leak into a wheel."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("snncompile", "passes"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an ordinary, not editable, install of the package."""
    target = tmp_path_factory.mktemp("installed")
    result = run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target
    )
    assert result.returncode == 0, result.stderr
    return target


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_package_list_equals_the_folders_on_disk() -> None:
    folders = {
        "/".join([target, *path.parent.relative_to(folder).parts])
        for target, folder in SOURCE_FOLDERS.items()
        for path in folder.rglob("*.py")
    }
    listed = project()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(folder.replace("/", ".") for folder in folders)


def test_every_package_folder_has_an_init() -> None:
    # Without one, the folder is a namespace package: it would import here and be typed differently when installed.
    for folder in SOURCE_FOLDERS.values():
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path.parent


def test_wheel_equals_the_tree(wheel: Path) -> None:
    assert package_files(wheel) == tree_files()


def test_wheel_carries_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]


def test_sdist_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(build("sdist", tree, tmp_path / "sdist"), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert package_files(build("wheel", unpacked, tmp_path / "wheel")) == package_files(wheel)


def test_importing_passes_from_the_root_says_what_to_import() -> None:
    result = python("import passes", cwd=ROOT)
    assert result.returncode != 0
    assert "ImportError: import snncompile.passes, not passes" in result.stderr


def test_passes_imports_by_its_own_name_from_the_root() -> None:
    result = python("import snncompile.passes as p; print(p.__name__)", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "snncompile.passes"


def test_ordinary_install_imports_every_module(installed: Path, tmp_path: Path) -> None:
    modules = sorted(
        path.relative_to(installed).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for path in (installed / "snncompile").rglob("*.py")
    )
    result = python(f"MODULES = {modules!r}\n{IMPORT_SCRIPT}", cwd=tmp_path, pythonpath=installed)
    assert result.returncode == 0, result.stderr
    assert all(Path(line).is_relative_to(installed) for line in result.stdout.splitlines())


def test_version_is_the_one_in_pyproject(installed: Path, tmp_path: Path) -> None:
    result = python("import snncompile; print(snncompile.__version__)", cwd=tmp_path, pythonpath=installed)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == project()["project"]["version"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_ordinary_install_type_checks(installed: Path) -> None:
    # From outside the checkout: mypy cannot follow an editable install into passes/ and would leave it out silently, so
    # the number of files it read is checked too.
    result = run(
        *(sys.executable, "-m", "mypy", "--strict", "-p", "snncompile"),
        *("--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"),
        cwd=installed,
        MYPYPATH=str(installed),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    count = sum(name.endswith(".py") for name in tree_files())
    assert f"no issues found in {count} source files" in result.stdout
