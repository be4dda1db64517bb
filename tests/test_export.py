"""A compiled network as a program that torch writes down: kernels are calls of `snncompile::scan`, results the same.

A network runs once first, since its kernels are found by the values of its parameters.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import snncompile
from snncompile import functional, neuron
from snncompile.codegen import parse_step, trace_step_function
from snncompile.ir import OpKind
from snncompile.runtime import cpp_build

from .contract import Snapshot
from .graphs import Calls
from .networks import StepCounter, random_input, random_network

T, N = 7, 4

needs_compiler = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")


def conv_net() -> nn.Sequential:
    """`[N, 2, 6, 6]` -> `[N, 5]`: a chain with tables, one without, and a strided read between them."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.2, 0.2)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        norm,
        neuron.IFNode(0.3),
        nn.Conv2d(6, 6, 3, padding=1),
        neuron.LIFNode(v_threshold=0.1),
        nn.Flatten(),
        nn.Linear(216, 5),
    ).eval()


def branches() -> nn.Module:
    """`[N, 6]` -> `[N, 6]` and `[N, 6]`: a broadcast operand, a residual addition, two results."""
    torch.manual_seed(0)

    def forward(x: Tensor, first: nn.Module, fires: nn.Module, second: nn.Module, last: nn.Module) -> Any:
        y = fires(first(x) * x[:, :1])
        return last(second(y) + x), y

    return Calls(forward, nn.Linear(6, 6), neuron.IFNode(0.2), nn.Linear(6, 6), neuron.LIFNode()).eval()


def learnable() -> nn.Module:
    """`[N, 6]` -> `[N, 6]`: a number of the kernel is made of a parameter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), neuron.ParametricLIFNode(init_tau=3.0, v_threshold=0.2)).eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (conv_net, (N, 2, 6, 6)),
    "branches": (branches, (N, 6)),
    "a learnable time constant": (learnable, (N, 6)),
}


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def compiled(name: str, *, static: bool = False, **options: Any) -> tuple[nn.Module, Any, Tensor, Any]:
    """A network, compiled; an input, and what it gives for that. States are carried on from there."""
    build, shape = NETWORKS[name]
    net = build()
    x = torch.rand(shape if static else (T, *shape), generator=torch.Generator().manual_seed(1))
    opt = snncompile.optimize(net, T, static_input=static, **options)
    return net, opt, x, opt(x)


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def scans(program: torch.fx.GraphModule | Any) -> int:
    return sum(node.target == torch.ops.snncompile.scan.default for node in program.graph.nodes)


@needs_compiler
@pytest.mark.parametrize("schedule", ["depth-first", 3, "breadth-first"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_program_gives_the_bits_of_a_call_from_reset_states(name: str, schedule: Any) -> None:
    net, opt, x, expected = compiled(name, schedule=schedule)
    before = Snapshot(net)
    program = torch.export.export(opt, (x,))
    before.assert_unchanged()
    assert_same(program.module()(x), expected)
    assert scans(program) > 0
    # Other values, and nothing is carried from call to call.
    other = torch.rand_like(x)
    functional.reset_net(net)
    assert_same(program.module()(other), opt(other))


@pytest.mark.parametrize("seed", range(8))
def test_random_networks(seed: int) -> None:
    net, shape = random_network(seed)
    net.eval()
    x = random_input((N, *shape[1:]), T)
    opt = snncompile.optimize(net, T, schedule=(1, 3, T)[seed % 3], readout=("sequence", "mean")[seed % 2])
    expected = opt(x)
    if any(node.kind is OpKind.OPAQUE for node in opt.latest_program.graph):
        pytest.skip("it has a module that is called as it is")
    program = torch.export.export(opt, (x,)).module()
    torch.testing.assert_close(program(x), expected, rtol=0.0, atol=0.0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("options", [{"readout": "sum"}, {"readout": "last"}, {"readout": "mean", "static": True}])
def test_readouts_and_static_inputs(options: dict[str, Any]) -> None:
    _, opt, x, expected = compiled("convolutions", schedule=3, **options)
    assert_same(torch.export.export(opt, (x,)).module()(x), expected)


@needs_compiler
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx(mode: str) -> None:
    _, opt, x, expected = compiled("convolutions", schedule=3)
    graph = make_fx(opt, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    assert scans(graph) > 0
    assert_same(graph(x), expected)


@needs_compiler
def test_torch_compiles_an_exported_program_further() -> None:
    _, opt, x, expected = compiled("branches", schedule=3)
    program = torch.compile(torch.export.export(opt, (x,)).module(), backend="aot_eager", fullgraph=True)
    assert_same(program(x), expected)


@needs_compiler
def test_images_that_lie_channels_last() -> None:
    net = conv_net()
    x = torch.rand(T * N, 2, 6, 6).contiguous(memory_format=torch.channels_last).unflatten(0, (T, N))
    opt = snncompile.optimize(net, T, schedule=3)
    expected = opt(x)
    assert_same(torch.export.export(opt, (x,)).module()(x), expected)


@needs_compiler
def test_weights_of_layers_are_parameters_and_numbers_of_kernels_are_fixed() -> None:
    net, opt, x, _ = compiled("a learnable time constant", schedule=3)
    program = torch.export.export(opt, (x,)).module()
    assert {name for name, _ in program.named_parameters()} == {name for name, _ in net.named_parameters()}
    expected = program(x)
    net[1].w.add_(1.0)  # type: ignore[operator, union-attr]
    assert_same(program(x), expected)


@needs_compiler
def test_states_that_are_passed_go_in_and_come_out() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            v = 0.5 * v + self.linear(x)
            return (v > 0.3).float(), v

    net, x, start = Leaky().eval(), torch.rand(T, N, 6), torch.rand(N, 6)
    opt = snncompile.optimize(snncompile.with_states(net), T)
    expected = opt(x, start)
    program = torch.export.export(opt, (x, start)).module()
    assert_same(program(x, start), expected)
    assert_same(program(x, expected[1]), opt(x, expected[1]))


@needs_compiler
def test_a_program_that_was_saved_runs_in_a_process_that_only_imports_the_package(tmp_path: Path) -> None:
    _, opt, x, expected = compiled("convolutions", schedule=3)
    torch.export.save(torch.export.export(opt, (x,)), tmp_path / "net.pt2")
    torch.save((x, expected), tmp_path / "values.pt")
    code = (
        "import sys, torch, snncompile\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "x, expected = torch.load(sys.argv[2])\n"
        "assert torch.equal(program(x), expected)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "net.pt2", tmp_path / "values.pt"], check=True)


def operands(kind: str, *, is_chunk: bool) -> tuple[Any, ...]:
    """Arguments of the operator for a leaky step with a table and a broadcast operand."""
    shape, table = (3, 4, 5), torch.rand(4, 1)
    function = trace_step_function(
        lambda x, s: ((x[0] + s[0] * 0.5,), (s[0] + x[1] * table,)),
        (torch.empty(shape), torch.empty(3, 1, 5)),
        (torch.empty(shape),),
    )
    x = torch.rand(6, *shape) if is_chunk else torch.rand(shape)
    y = torch.rand(3, 1, 5)
    state = torch.rand(shape)
    if kind == "gaps":
        x, state = torch.rand(*x.shape[:-1], 10)[..., ::2], torch.rand(5, 4, 3).permute(2, 1, 0)
    tables = [each.value() for each in function.tables]
    numbers = [number() for number in function.numbers]
    still = [False, True] if is_chunk else [False, False]
    return str(function), [x, y], [state], tables, numbers, still, 6 if is_chunk else 1, is_chunk


@needs_compiler
@pytest.mark.parametrize("is_chunk", [False, True])
@pytest.mark.parametrize("kind", ["dense", "gaps"])
def test_the_operator_keeps_torchs_rules_and_computes_the_step(kind: str, is_chunk: bool) -> None:
    arguments = operands(kind, is_chunk=is_chunk)
    torch.library.opcheck(torch.ops.snncompile.scan.default, arguments)
    outputs, after = torch.ops.snncompile.scan(*arguments)
    _, (x, y), (state,), (table,), *_ = arguments
    expected = []
    for step in x if is_chunk else [x]:
        expected.append(step + state * 0.5)
        state = state + y * table
    assert_same(outputs, torch.stack(expected) if is_chunk else expected[0])
    assert_same(after, state)


def test_a_step_function_comes_back_from_its_text() -> None:
    function = trace_step_function(
        lambda x, s: ((torch.where(x[0] > 0.0, x[0], s[0]),), (s[0] + 1.0,)), (torch.empty(3),), (torch.empty(3),)
    )
    assert parse_step(str(function), 1, 1, [number() for number in function.numbers]) == function
    for wrong in ("", "r0 = add(x0, s0)", "return (x0)", "r0 add x0\nreturn (r0), ()"):
        with pytest.raises(ValueError, match="the text of a step function"):
            parse_step(wrong, 1, 1)


# What is refused


def test_it_has_to_have_run_on_such_inputs() -> None:
    net = conv_net()
    opt, x = snncompile.optimize(net, T, schedule=3), torch.rand(T, N, 2, 6, 6)
    with pytest.raises(RuntimeError, match="call a compiled network once on inputs like these"):
        torch.export.export(opt, (x,))
    opt(x[:, :2])
    with pytest.raises(RuntimeError, match="call a compiled network once on inputs like these"):
        torch.export.export(opt, (x,))


def test_only_inference_is_exported() -> None:
    _, opt, x, _ = compiled("branches", schedule=3)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"under torch.no_grad\(\)"):
        torch.export.export(opt, (x,))


@pytest.mark.filterwarnings("ignore")  # of torch, that tracing looks at values
def test_torch_jit_is_refused() -> None:
    net, opt, x, _ = compiled("branches", schedule=3)
    with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot"):
        torch.jit.trace(opt, (x,))
    functional.reset_net(net)
    opt(x)


@pytest.mark.parametrize(
    ("build", "options", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 6), StepCounter(), neuron.LIFNode()), {}, "called as it is at every step"),
        (lambda: nn.Sequential(nn.Linear(6, 64), neuron.LIFNode()), {"memory_budget": 40_000}, "parts of the batch"),
    ],
    ids=["opaque code", "a batch in parts"],
)
def test_plans_that_cannot_be_written_down(build: Callable[[], nn.Module], options: Any, reason: str) -> None:
    net, x = build().eval(), torch.rand(T, 64, 6)
    opt = snncompile.optimize(net, T, readout="sum", **options)
    opt(x)
    before = Snapshot(net)
    with pytest.raises(RuntimeError, match=reason):
        torch.export.export(opt, (x,))
    before.assert_unchanged()


@pytest.mark.parametrize("form", [{"channels_last": True}, {"events_below": 0.5}])
def test_copies_of_weights_that_are_made_for_this_machine_are_not_exported(form: dict[str, Any]) -> None:
    _, opt, x, _ = compiled("convolutions", schedule=3)
    program = opt.latest_program
    (name, *_) = (node.name for node in program.graph if "conv" in node.name)
    program.graph = program.graph.with_nodes({name: replace(program.graph[name], **form)})
    with pytest.raises(RuntimeError, match="compile without reassociate=True"):
        torch.export.export(opt, (x,))
