"""Fixtures and options that every test shares."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

from snncompile.runtime import triton_build
from snncompile.runtime.triton_scan import TritonTarget

GOLDEN_ROOT = Path(__file__).parent / "golden"

# Compiling a network takes long enough, and varies enough, that hypothesis' per-example deadline only reports noise.
hypothesis.settings.register_profile("default", deadline=None, max_examples=20)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden texts instead of comparing with them"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """The thread count is part of what a CPU kernel computes, so it is the same on every machine."""
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same seed, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with `tests/golden/<test file>/<test name>.txt`.

    `golden(text)` fails with a unified diff where they differ; `pytest --update-golden` writes the file instead. A
    missing file is a failure too, so that a golden text is never created unseen.
    """
    # A parametrised test's name has brackets and may hold anything: keep what is safe in a file name.
    file_name = re.sub(r"[^\w.-]+", "-", request.node.name).strip("-") + ".txt"
    path = GOLDEN_ROOT / request.path.stem / file_name
    shown = path.relative_to(GOLDEN_ROOT.parent.parent)
    update = bool(request.config.getoption("--update-golden"))

    def check(text: str) -> None:
        __tracebackhide__ = True
        text = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(
                f"no golden text {shown}; run pytest with --update-golden to write it, then read it", pytrace=False
            )
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            diff = difflib.unified_diff(
                expected.splitlines(keepends=True), text.splitlines(keepends=True), str(shown), "this run"
            )
            pytest.fail(
                "the text differs from its golden text; if the change is meant, run pytest with --update-golden\n"
                + "".join(diff),
                pytrace=False,
            )

    return check


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> TritonTarget:
    """Triton's kernels run by its interpreter, in networks too."""
    if not triton_build.version():
        pytest.skip("Triton is not installed")
    if tuple(map(int, triton_build.version().split(".")[:2])) < (3, 9):
        pytest.skip("the interpreter of earlier releases rounds fused multiply-adds twice")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return TritonTarget(None)
