"""Imports run one way through the layers, and private torch interfaces are used in one module only.

Both rules are read off the source, so that an import inside a function counts like one at the top of the file. Imports
under `if TYPE_CHECKING:` are no run-time dependency and are left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SUBSTRATE = frozenset({"surrogate", "stateful", "neuron", "functional", "ann2snn", "explicit_states", "nir"})

# In the order data flows. A module may import from its own layer and from those before it.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"options"}),
    SUBSTRATE,
    frozenset({"ir"}),
    frozenset({"capture"}),
    frozenset({"schedule"}),
    frozenset({"passes"}),
    frozenset({"codegen"}),
    frozenset({"runtime"}),
    frozenset({"report"}),
    frozenset({"pipeline"}),
    frozenset({"api"}),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

# Wraps what torch does not promise to keep. A leaf: every module may import it, it imports nothing but errors.
TORCH_PRIVATE = "torch_private"

# Private although their names have no underscore.
PRIVATE_BY_DECREE = ("torch.fx.experimental",)


@dataclass(frozen=True)
class Source:
    """One module of the package: its dotted name as installed, and its text."""

    module: str
    text: str
    is_package: bool = False

    @property
    def layer(self) -> str:
        """The name under `snncompile` that the module belongs to; empty for the top-level package itself."""
        return self.module.partition(".")[2].partition(".")[0]


def package_sources() -> list[Source]:
    sources = []
    for folder, package in ((ROOT / "snncompile", "snncompile"), (ROOT / "passes", "snncompile.passes")):
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            sources.append(Source(".".join(parts[: -1 if is_package else None]), path.read_text("utf-8"), is_package))
    return sources


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node of the tree but those that only a type checker reaches."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.orelse:
                yield from run_time_nodes(statement)
        else:
            yield from run_time_nodes(child)


def imported_names(source: Source, nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported; `from a import b` gives `a.b`."""
    package = source.module if source.is_package else source.module.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def layer_violations(source: Source) -> list[str]:
    """What the module imports that its layer does not allow, one line each."""
    if source.module == "snncompile":
        return []
    if source.layer != TORCH_PRIVATE and source.layer not in RANK:
        return [f"{source.module}: {source.layer!r} has no place in LAYERS"]
    found = []
    for line, name in imported_names(source, list(run_time_nodes(ast.parse(source.text)))):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        where = f"{source.module}:{line}"
        if root == "passes":
            found.append(f"{where} imports passes; the package is snncompile.passes")
        elif root != "snncompile" or target == TORCH_PRIVATE:
            continue
        elif target not in RANK:
            found.append(f"{where} imports {name} from the top-level package; import the module that defines it")
        elif not may_import(source.layer, target):
            found.append(f"{where} imports {name}, but {target} comes after {source.layer}")
    return found


def may_import(layer: str, target: str) -> bool:
    if layer == TORCH_PRIVATE:
        return target == "errors"
    if layer in SUBSTRATE:
        # Embedded: it can be lifted out and used on its own, so not even options may come before it.
        return target in SUBSTRATE or target == "errors"
    return RANK[target] <= RANK[layer]


def is_private_torch(name: str) -> bool:
    parts = name.split(".")
    if parts[0] != "torch":
        return False
    underscored = any(part.startswith("_") and not part.endswith("__") for part in parts[1:])
    return underscored or any(name == private or name.startswith(private + ".") for private in PRIVATE_BY_DECREE)


def dotted_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted_name(node.value)) is not None:
        return f"{base}.{node.attr}"
    return None


def private_torch_uses(source: Source) -> list[str]:
    """Private torch names that the module imports or reaches through a torch module, one line each."""
    if source.layer == TORCH_PRIVATE:
        return []
    nodes = list(run_time_nodes(ast.parse(source.text)))
    # What each local name stands for: `import torch.nn.functional as F` makes F stand for torch.nn.functional.
    stands_for: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                stands_for[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            stands_for.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    found = {(line, name) for line, name in imported_names(source, nodes) if is_private_torch(name)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and (name := dotted_name(node)) is not None:
            local, _, rest = name.partition(".")
            full = f"{stands_for.get(local, '')}.{rest}"
            if is_private_torch(full):
                found.add((node.lineno, full))
    return [f"{source.module}:{line} uses {name}; wrap it in snncompile.torch_private" for line, name in sorted(found)]


SOURCES = package_sources()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.module)
def test_imports_only_from_its_own_layer_and_those_before(source: Source) -> None:
    assert layer_violations(source) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.module)
def test_private_torch_only_in_torch_private(source: Source) -> None:
    assert private_torch_uses(source) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("snncompile.schedule.peak", "from snncompile.ir.graph import Graph"),
        ("snncompile.schedule.peak", "from .plan import Plan"),
        ("snncompile.schedule.peak", "from ..errors import SnnCompileError"),
        ("snncompile.passes.hoist_static", "from snncompile import torch_private"),
        ("snncompile.neuron", "from snncompile.surrogate import Sigmoid"),
        ("snncompile.capture.native", "from snncompile import neuron"),
        ("snncompile.ir.graph", "if TYPE_CHECKING:\n    from snncompile.api import optimize"),
        ("snncompile", "from snncompile.api import optimize"),
        ("snncompile.torch_private", "from snncompile.errors import CaptureError"),
    ],
)
def test_allowed_imports_pass_the_check(module: str, text: str) -> None:
    assert layer_violations(Source(module, text)) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("snncompile.ir.graph", "import snncompile.schedule.plan"),
        ("snncompile.ir.graph", "from ..schedule import plan"),
        ("snncompile.ir.graph", "def f():\n    from snncompile.capture import tracer"),
        ("snncompile.ir.graph", "if TYPE_CHECKING:\n    pass\nelse:\n    from snncompile.api import optimize"),
        ("snncompile.ir.graph", "from snncompile import optimize"),
        ("snncompile.ir.graph", "import snncompile"),
        ("snncompile.pipeline", "from passes.hoist_static import HoistStatic"),
        ("snncompile.neuron", "from snncompile.options import Options"),
        ("snncompile.torch_private", "from snncompile.options import Options"),
        ("snncompile.helpers", ""),
    ],
)
def test_forbidden_imports_fail_the_check(module: str, text: str) -> None:
    assert len(layer_violations(Source(module, text))) == 1


def test_relative_imports_of_a_package_start_at_the_package() -> None:
    assert layer_violations(Source("snncompile.ir", "from ..schedule import plan", is_package=True)) != []
    assert layer_violations(Source("snncompile.ir", "from .graph import Graph", is_package=True)) == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch._C",
        "from torch import _C",
        "from torch._subclasses import FakeTensorMode",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "from torch.utils import _pytree as pytree",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "import torch\ntorch._C._get_tracing_state()",
        "import torch\nimport torch.fx as fx\nfx.experimental",
        "import torch.nn.functional as F\nF._verify_batch_size",
        "from torch import nn\ndef f():\n    return nn.modules._functions",
    ],
)
def test_private_torch_is_found(text: str) -> None:
    assert private_torch_uses(Source("snncompile.capture.tracer", text)) != []
    assert private_torch_uses(Source("snncompile.torch_private", text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.__version__",
        "import torch\ntorch.nn.functional.relu",
        "import torch\nx = torch.zeros(1)\nx._version",
        "from torch import nn, fx\nfx.Tracer, nn.Module.__call__",
        "import networkx as nx\nnx._dispatchable",
    ],
)
def test_public_torch_is_left_alone(text: str) -> None:
    assert private_torch_uses(Source("snncompile.capture.tracer", text)) == []
