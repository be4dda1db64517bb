"""`from_nir`: NIR graphs as networks of single-step modules, against NIR's equations and other frameworks."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor

import snncompile
from snncompile import CaptureError, from_nir, functional, neuron, surrogate
from snncompile.nir import LI, CubaLI, Delay, Integrator, RecurrentRegion
from snncompile.nir.cycles import closing_edges

from .contract import SCHEDULES, step_loop
from .nir_reference import NEURONS, Interpreter

nir = pytest.importorskip("nir")

from .nir_graphs import (  # noqa: E402
    DT,
    GRAPHS,
    RANGES,
    Draw,
    conv_graph,
    graph_of,
    interlocked_graph,
    nested_graph,
    one_node,
    random_graph,
    recurrent_graph,
    residual_graph,
)

BATCH = 4  # from here on, batching over time keeps the bits of convolutions and linear layers


@pytest.fixture
def double() -> Iterator[None]:
    """Networks in float64, like the reference, so that both round alike and no spike flips."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def random_input(steps: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn((steps, BATCH, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equals(got: Tensor, expected: Any) -> None:
    torch.testing.assert_close(got.detach(), torch.as_tensor(np.asarray(expected)), rtol=1e-9, atol=1e-10)


# Neurons against NIR's equations.


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("kind", NEURONS)
def test_a_neuron_steps_as_the_equations_say(kind: str, uniform: bool) -> None:
    graph = one_node(Draw().neuron(kind, 3, 4, uniform=uniform), 3, 4)
    x_seq = 2 * random_input(40, 3, 4)
    net = from_nir(graph, dt=DT)
    y_seq = step_loop(net, x_seq)
    assert_equals(y_seq, Interpreter(graph, {"input": x_seq.numpy()}, DT).output())
    if kind.endswith("IF") or kind == "LIF":
        assert 0.02 < y_seq.mean() < 0.9


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (1, 1)])
def test_parameters_broadcast(shape: tuple[int, ...]) -> None:
    narrow = Draw().neuron("LIF", *shape)
    wide = nir.LIF(**{name: np.broadcast_to(getattr(narrow, name), (3, 4)) for name in RANGES["LIF"]})
    x_seq = 2 * random_input(20, 3, 4)
    got, expected = (step_loop(from_nir(one_node(node, 3, 4), dt=DT), x_seq) for node in (narrow, wide))
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("double")
def test_threshold_and_scale() -> None:
    draw = Draw()
    nodes = {"scale": nir.Scale(draw.rng.normal(size=5)), "threshold": nir.Threshold(draw.rng.normal(size=5))}
    graph = graph_of(nodes, "input>scale>threshold>output", inputs=5)
    x_seq = random_input(9, 5)
    assert_equals(step_loop(from_nir(graph), x_seq), Interpreter(graph, {"input": x_seq.numpy()}, 1.0).output())


@pytest.mark.parametrize("kind", ["IF", "LIF", "CubaLIF", "Threshold"])
def test_a_neuron_does_not_fire_at_its_threshold(kind: str) -> None:
    one = np.ones(2)
    node = {
        "IF": lambda: nir.IF(r=one, v_threshold=one),
        "LIF": lambda: nir.LIF(tau=one, r=one, v_leak=0 * one, v_threshold=one),
        "CubaLIF": lambda: nir.CubaLIF(tau_syn=one, tau_mem=one, r=one, v_leak=0 * one, v_threshold=one),
        "Threshold": lambda: nir.Threshold(one),
    }[kind]()
    above = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    spikes = from_nir(one_node(node, 2), dt=1.0)(torch.tensor([[1.0, above]]))
    assert spikes.tolist() == [[0.0, 1.0]]


def test_a_neuron_that_equals_ours_gives_its_outputs_and_gradients() -> None:
    node = nir.LIF(tau=np.full(5, 4.0), r=np.ones(5), v_leak=np.zeros(5), v_threshold=np.full(5, 0.3))
    net, ours = from_nir(one_node(node, 5), dt=1.0), neuron.LIFNode(tau=4.0, v_threshold=0.3)
    x_seq = 2 * random_input(12, 5).float()
    gradients = []
    for module in (net, ours):
        x = x_seq.clone().requires_grad_()
        y_seq = step_loop(module, x)
        (y_seq * torch.linspace(0, 1, y_seq.numel()).view_as(y_seq)).sum().backward()
        gradients.append((y_seq.detach(), x.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("kind", NEURONS)
def test_every_parameter_of_a_neuron_is_trainable(kind: str) -> None:
    net = from_nir(one_node(Draw().neuron(kind, 5), 5), dt=DT, surrogate_function=surrogate.ATan())
    step_loop(net, 2 * random_input(12, 5).float()).sum().backward()
    gradients = {name.removeprefix("node."): parameter.grad for name, parameter in net.named_parameters()}
    assert gradients.keys() == RANGES[kind].keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.count_nonzero() > 0, name


def test_detach_reset_and_the_surrogate_function_reach_every_neuron() -> None:
    function = surrogate.ATan(3.0)
    net = from_nir(recurrent_graph(), dt=DT, surrogate_function=function, detach_reset=True)
    lif = net.recurrent.lif
    assert lif.surrogate_function is function
    assert lif.detach_reset
    one_step = from_nir(one_node(Draw().neuron("LIF", 5), 5), dt=DT, detach_reset=True)
    y = step_loop(one_step, 2 * random_input(6, 5).float())
    assert y.any()
    y.sum().backward()
    assert one_step.node.v_threshold.grad.count_nonzero() > 0


@pytest.mark.usefixtures("double")
def test_parameters_of_the_smooth_neurons_have_the_true_gradients() -> None:
    x_seq = random_input(4, 2)

    def run(make: Callable[..., Any]) -> Callable[..., Tensor]:
        def of(*arrays: Tensor) -> Tensor:
            module = make(*(array.detach() for array in arrays), dt=DT)
            names = [name for name, _ in module.named_parameters()]
            states: tuple[Any, ...] = tuple(torch.zeros_like(x_seq[0]) for _ in module.state_names)
            for name, array in zip(names, arrays, strict=True):
                del module._parameters[name]
                setattr(module, name, array)
            outputs = []
            for x in x_seq:
                (y,), states = module.step((x,), states)
                outputs.append(y)
            return torch.stack(outputs)

        return of

    for make, count in ((Integrator, 1), (LI, 3), (CubaLI, 5)):
        arrays = [(torch.rand(2) * 5e-3 + 5e-3).requires_grad_() for _ in range(count)]
        assert torch.autograd.gradcheck(run(make), arrays)


# Graphs against the reference.


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", GRAPHS)
def test_a_network_computes_what_its_graph_says(name: str) -> None:
    make, shape, closing = GRAPHS[name]
    graph = make()
    x_seq = random_input(20, *shape)
    y_seq = step_loop(from_nir(graph, dt=DT), x_seq)
    assert_equals(y_seq, Interpreter(graph, {"input": x_seq.numpy()}, DT, closing).output())
    assert y_seq.detach().std() > 0.05


@pytest.mark.parametrize("steps", [1, 5, 16])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", GRAPHS)
def test_a_compiled_network_gives_the_bits_of_the_step_loop(name: str, schedule: str | int, steps: int) -> None:
    make, shape, _ = GRAPHS[name]
    net = from_nir(make(), dt=DT).eval()
    x_seq = random_input(steps, *shape).float()
    with torch.no_grad():
        opt = snncompile.optimize(net, steps, schedule=schedule)
        parity = snncompile.verify(net, opt, x_seq)
        assert parity.exact, parity
        if steps == 5:
            opt(x_seq)
            parity = snncompile.verify(net, opt, x_seq)  # from states that are carried in
            assert parity.exact, parity


@pytest.mark.parametrize("name", GRAPHS)
def test_a_compiled_network_trains_like_the_step_loop(name: str) -> None:
    make, shape, _ = GRAPHS[name]
    net = from_nir(make(), dt=DT).train()
    opt = snncompile.optimize(net, 5, schedule="breadth-first")
    snncompile.verify(net, opt, random_input(5, *shape).float().requires_grad_()).check()
    opt(random_input(5, *shape).float()).sum().backward()
    missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert missing == []


def test_layers_around_a_recurrent_region_are_batched_over_time() -> None:
    net = from_nir(recurrent_graph(), dt=DT)
    opt = snncompile.optimize(net, 8, schedule="breadth-first", example_input=random_input(8, 6).float())
    assert "batched(net['fc']" in opt.code
    assert "batched(net['out']" in opt.code


@pytest.mark.usefixtures("double")
def test_several_inputs_and_outputs_come_sorted_by_name() -> None:
    draw = Draw(7)
    sizes = {"right": 3, "left": 6}
    nodes: dict[str, Any] = {name: nir.Input(np.array([size])) for name, size in sizes.items()}
    nodes |= {"fc_r": draw.linear(3, 5), "fc_l": draw.affine(6, 5), "lif": draw.neuron("LIF", 5)}
    nodes |= {"spikes": nir.Output(np.array([5])), "currents": nir.Output(np.array([5]))}
    edges = [("right", "fc_r"), ("left", "fc_l"), ("fc_r", "lif"), ("fc_l", "lif"), ("lif", "spikes")]
    graph = nir.NIRGraph(nodes, [*edges, ("fc_l", "currents")])
    x = {name: random_input(6, size, seed=size) for name, size in sizes.items()}
    net = from_nir(graph, dt=DT)
    steps = [net(left, right) for left, right in zip(x["left"], x["right"], strict=True)]
    reference = Interpreter(graph, {name: value.numpy() for name, value in x.items()}, DT)
    for number, name in enumerate(("currents", "spikes")):
        assert_equals(torch.stack([step[number] for step in steps]), reference.output(name))
    functional.reset_net(net)
    opt = snncompile.optimize(net.eval(), 6, schedule=3)
    with torch.no_grad():
        assert snncompile.verify(net, opt, x["left"], x["right"]).exact


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "1d": ((9,), {"stride": 2, "padding": 1, "dilation": 2}),
    "1d same": ((9,), {"padding": "same"}),
    "2d strided": ((7, 8), {"stride": (2, 1), "padding": (1, 2)}),
    "2d same": ((7, 8), {"padding": "same", "dilation": (2, 1)}),
    "2d valid": ((7, 8), {"padding": "valid"}),
    "2d grouped": ((7, 8), {"groups": 2}),
    "2d not square": ((7, 8), {"kernel": (3, 1)}),
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    size, options = CONVOLUTIONS[name]
    node = Draw().conv(size, 4, 6, **options)
    graph = one_node(node, 4, *size)
    graph.nodes["output"].output_type = {"output": None}
    x_seq = random_input(2, 4, *size)
    assert_equals(step_loop(from_nir(graph), x_seq), Interpreter(graph, {"input": x_seq.numpy()}, 1.0).output())


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", ["AvgPool2d", "SumPool2d"])
def test_pooling_counts_padding_as_zeros(kind: str) -> None:
    node = getattr(nir, kind)(np.array([3, 2]), np.array([2, 1]), np.array([1, 0]))
    graph = one_node(node, 2, 7, 6)
    graph.nodes["output"].output_type = {"output": None}
    x_seq = random_input(2, 2, 7, 6)
    assert_equals(step_loop(from_nir(graph), x_seq), Interpreter(graph, {"input": x_seq.numpy()}, 1.0).output())


@pytest.mark.parametrize(
    ("start", "end", "shape"),
    [(0, -1, (24,)), (1, -1, (2, 12)), (0, 1, (6, 4)), (-2, 2, (2, 12))],
)
def test_flatten_counts_dimensions_without_the_batch(start: int, end: int, shape: tuple[int, ...]) -> None:
    graph = one_node(nir.Flatten({"input": np.array([2, 3, 4])}, start, end), 2, 3, 4)
    graph.nodes["output"].output_type = {"output": np.array(shape)}
    x = torch.randn(BATCH, 2, 3, 4)
    assert torch.equal(from_nir(graph)(x), x.reshape(BATCH, *shape))


# Cycles.


@pytest.mark.parametrize("name", GRAPHS)
def test_the_edge_that_closes_a_cycle_leaves_the_neuron(name: str) -> None:
    make, _, expected = GRAPHS[name]
    net = from_nir(make(), dt=DT)
    regions = [module for module in net.modules() if isinstance(module, RecurrentRegion)]
    assert len(regions) == (name in ("recurrent", "interlocked", "delayed loop"))
    registers = {key.removesuffix("_previous") for key, module in net.named_modules() if key.endswith("_previous")}
    assert registers == {f"recurrent.{source}" for source, _ in expected}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed: int) -> None:
    """Any wiring of nodes of one size: every cycle is closed once, and the network computes what the graph says."""
    graph = random_graph(random.Random(seed))
    net = from_nir(graph, dt=DT)
    keys = {(name,): node for name, node in graph.nodes.items()}
    modules: dict[Any, Any] = dict.fromkeys(keys)
    for (name,), node in keys.items():
        if type(node).__name__ == "Delay":
            modules[name,] = Delay(np.rint(node.delay / DT))
        elif type(node).__name__ in NEURONS:
            modules[name,] = Integrator(1.0, dt=1.0)
    closing = closing_edges([((a,), (b,)) for a, b in graph.edges], [("input",)], modules)
    closed = {(source[0], target[0]) for source, target in closing}
    registers = [key[0] for key, module in modules.items() if isinstance(module, Delay) and module.is_register]
    order = nx.DiGraph([edge for edge in graph.edges if edge not in closed and edge[1] not in registers])
    assert nx.is_directed_acyclic_graph(order)
    x_seq = random_input(12, 5)
    y_seq = step_loop(net, x_seq)
    assert_equals(y_seq, Interpreter(graph, {"input": x_seq.numpy()}, DT, closed).output())
    functional.reset_net(net)
    with torch.no_grad():
        opt = snncompile.optimize(net.eval(), 12, schedule=SCHEDULES[seed % len(SCHEDULES)])
        assert snncompile.verify(net, opt, x_seq).exact


@pytest.mark.usefixtures("double")
def test_a_recurrent_weight_that_feeds_forward_too_gives_out_this_step_and_feeds_back_the_last() -> None:
    draw = Draw(8)
    nodes = {"fc": draw.affine(6, 5), "lif": draw.neuron("LIF", 5), "w": draw.affine(5, 5)}
    graph = graph_of(nodes, "input>fc>lif>w>lif w>output")
    x_seq = random_input(15, 6)
    expected = Interpreter(graph, {"input": x_seq.numpy()}, DT, {("w", "lif")}).output()
    assert_equals(step_loop(from_nir(graph, dt=DT), x_seq), expected)


def test_states_of_a_region_are_read_written_and_reset_by_name() -> None:
    net = from_nir(recurrent_graph(), dt=DT)
    region = net.recurrent
    assert set(region.state_names) == {"lif_previous_x_1", "lif_v"}
    x_seq = random_input(6, 6).float()
    first = step_loop(net, x_seq)
    assert region.lif_v.shape == region.lif_previous_x_1.shape == (BATCH, 5)
    with pytest.raises(ValueError, match=r"state lif_.* call reset\(\)"):
        net(torch.randn(BATCH + 1, 6))
    opt = snncompile.optimize(net, 6)
    with pytest.raises(ValueError, match=r"state lif_.* call reset\(\)"):
        opt(torch.randn(6, BATCH + 1, 6))
    functional.reset_net(net)
    assert torch.equal(step_loop(net, x_seq), first)
    opt.reset()
    assert region.states == region.reset_values
    assert torch.equal(opt(x_seq), first)


def test_one_call_of_many_steps_equals_many_calls_of_few() -> None:
    with torch.no_grad():
        for make, shape, _ in GRAPHS.values():
            net = from_nir(make(), dt=DT).eval()
            x_seq = random_input(12, *shape).float()
            whole = snncompile.optimize(copy.deepcopy(net), 12, schedule="breadth-first")(x_seq)
            opt = snncompile.optimize(net, 3)
            assert torch.equal(whole, torch.cat([opt(part) for part in x_seq.split(3)]))


# Inner graphs, names, files.


def test_an_inner_graph_computes_what_it_would_outside() -> None:
    x_seq = random_input(10, 6).float()
    inner, outer = from_nir(nested_graph(), dt=DT), from_nir(recurrent_graph(), dt=DT)
    assert torch.equal(step_loop(inner, x_seq), step_loop(outer, x_seq))
    assert "recurrent.rnn_lif.tau" in inner.state_dict()


@pytest.mark.usefixtures("double")
def test_a_cycle_through_inner_graphs() -> None:
    draw = Draw(9)
    nodes = {"fc": draw.affine(6, 5), "lif": draw.neuron("LIF", 5), "back": draw.affine(5, 5)}
    flat = graph_of(nodes, "input>fc>lif>back>lif>output")
    inner = {name: nir.NIRGraph.from_list(copy.deepcopy(nodes[name])) for name in ("lif", "back")}
    nested = graph_of({"fc": nodes["fc"], **inner}, "input>fc>lif>back>lif>output", type_check=False)
    x_seq = random_input(12, 6)
    assert torch.equal(*(step_loop(from_nir(graph, dt=DT), x_seq) for graph in (nested, flat)))


def test_node_names_that_are_no_identifiers() -> None:
    draw = Draw(10)
    names = ["0", "1.fc", "class", "self", "training", "graph", "a b", "a_b", "µ", "_modules", "step", "order"]
    nodes = {name: draw.neuron("LI", 5) for name in names}
    loop = ">".join(name.replace(" ", "%") for name in names)
    nodes = {name.replace(" ", "%"): node for name, node in nodes.items()}
    graph = graph_of(nodes, f"input>{loop}>output class>step>class", inputs=5)
    net = from_nir(graph, dt=DT)
    assert len(list(net.parameters())) == 3 * len(names)
    x_seq = random_input(4, 5).float()
    opt = snncompile.optimize(net.eval(), 4, schedule="breadth-first")
    assert snncompile.verify(net, opt, x_seq).ok


@pytest.mark.parametrize("name", [*GRAPHS, "nested"])
def test_a_file_gives_the_same_network(name: str, tmp_path: Path) -> None:
    make, shape, _ = GRAPHS.get(name, (nested_graph, (6,), ()))
    graph = make()
    nir.write(tmp_path / "graph.nir", graph)
    x_seq = random_input(8, *shape).float()
    nets = [from_nir(source, dt=DT) for source in (graph, tmp_path / "graph.nir", str(tmp_path / "graph.nir"))]
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()
    expected, *got = (step_loop(net, x_seq) for net in nets)
    assert all(torch.equal(y_seq, expected) for y_seq in got)


def test_a_graph_without_v_reset_resets_to_zero(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    node = nir.LIF(tau=np.ones(2), r=np.ones(2), v_leak=np.zeros(2), v_threshold=np.ones(2), v_reset=np.full(2, 9.0))
    nir.write(tmp_path / "graph.nir", one_node(node, 2))
    with h5py.File(tmp_path / "graph.nir", "r+") as file:
        del file["node/nodes/node/v_reset"]
    net = from_nir(tmp_path / "graph.nir", dt=1.0)
    assert net(torch.full((1, 2), 2.0)).tolist() == [[1.0, 1.0]]
    assert net.node.v.tolist() == [[0.0, 0.0]]
    del node.v_reset
    graph = one_node(nir.LIF(np.ones(2), np.ones(2), np.zeros(2), np.ones(2)), 2)
    graph.nodes["node"].v_reset = None
    assert from_nir(graph).node.v_reset.item() == 0.0


def test_the_graph_keeps_its_arrays_and_the_network_has_its_own() -> None:
    graph = recurrent_graph()
    before = copy.deepcopy(graph.to_dict())
    net = from_nir(graph, dt=DT)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    for name, node in graph.to_dict()["nodes"].items():
        for field, value in node.items():
            assert np.array_equal(value, before["nodes"][name][field]), (name, field)


def test_building_a_network_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    from_nir(conv_graph(), dt=DT)
    assert torch.equal(before, torch.get_rng_state())


# States and modules.


def test_a_potential_starts_at_rest_and_returns_there() -> None:
    for kind, rest in (("LI", "v_leak"), ("LIF", "v_leak"), ("CubaLIF", "v_leak"), ("IF", "v_reset"), ("I", None)):
        module = from_nir(one_node(Draw().neuron(kind, 5), 5), dt=DT).node
        for _ in range(2):
            (v, *_), x = module.materialize_states((torch.zeros(2, 5),), module.states), torch.randn(2, 5)
            assert torch.equal(v, (getattr(module, rest) if rest else torch.zeros(5)).expand(2, 5))
            assert not v.requires_grad
            module(x)
            module.reset()
    assert module.v == 0.0


def test_a_state_may_be_set_before_the_first_step() -> None:
    net = from_nir(one_node(nir.LI(np.ones(2), np.ones(2), np.full(2, 0.25)), 2), dt=0.5)
    assert net.node.v == 0.25
    net.node.v = 1.0
    assert net(torch.zeros(1, 2)).tolist() == [[0.625, 0.625]]


def test_networks_are_copied_pickled_and_moved_like_any_module() -> None:
    net = from_nir(interlocked_graph(), dt=DT)
    x_seq = random_input(8, 6).float()
    step_loop(net, x_seq[:4])
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    expected = step_loop(net, x_seq[4:])
    for twin in copies:
        assert torch.equal(step_loop(twin, x_seq[4:]), expected)
    wide = copy.deepcopy(net).double()
    assert wide(x_seq[0].double()).dtype == torch.float64
    assert wide.recurrent.a_v.dtype == torch.float64
    other = from_nir(interlocked_graph(), dt=DT)
    with torch.no_grad():
        other.recurrent.a.tau.mul_(2.0)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.recurrent.a.tau, net.recurrent.a.tau)


def test_a_delay_may_be_fed_from_one_buffer() -> None:
    delay, x = Delay(2), torch.zeros(1, 3)
    outputs = []
    for step in range(5):
        outputs.append(delay(x.fill_(step + 1.0)).clone())
    assert torch.cat(outputs)[:, 0].tolist() == [0.0, 0.0, 1.0, 2.0, 3.0]


def test_a_delay_refuses_parts_of_a_step() -> None:
    for steps in (-1, 1.5, [0, -2]):
        with pytest.raises(ValueError, match="whole numbers >= 0"):
            Delay(steps)


# Other frameworks as oracles. They round in another order, so a spike at the very threshold may come out differently.


def louder(net: Any) -> Any:
    """The network with weights that make every layer fire."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(4.0)
    return net


def assert_same_spikes(got: Tensor, expected: Tensor) -> None:
    assert 0.05 < expected.mean() < 0.95
    assert (got != expected).float().mean() < 0.005


def test_snntorch_computes_the_same_spikes_as_its_export() -> None:
    """With the reset of NIR, to zero within the step; snnTorch's default subtracts the threshold a step later."""
    snn = pytest.importorskip("snntorch")
    from snntorch import utils
    from snntorch.export_nir import export_to_nir

    def options(size: int, beta: float) -> dict[str, Any]:
        common = {"init_hidden": True, "reset_mechanism": "zero", "reset_delay": False}
        return {"beta": torch.full((size,), beta), "threshold": torch.ones(size), **common}

    layers = [
        torch.nn.Linear(6, 16),
        snn.Leaky(**options(16, 0.9)),
        torch.nn.Linear(16, 8, bias=False),
        snn.Synaptic(alpha=torch.full((8,), 0.7), **options(8, 0.8)),
        torch.nn.Linear(8, 5),
        snn.RLeaky(**(options(5, 0.85) | {"beta": 0.85, "threshold": 1.0}), linear_features=5),
    ]
    theirs = louder(torch.nn.Sequential(*layers))
    graph = export_to_nir(theirs, torch.randn(1, 6), ignore_dims=[0])
    utils.reset(theirs)
    net = from_nir(graph, dt=1e-4)
    x_seq = random_input(40, 6).float()
    assert_same_spikes(step_loop(net, x_seq), step_loop(theirs, x_seq))


def test_norse_computes_the_same_spikes_as_its_export() -> None:
    """Its box cells start at v_leak and step like ours. Two others step in ways that their export does not say, and are
    not compared: IAFCell adds r·x whatever dt is, and in LIFCell an input adds to the current undivided by tau_syn and
    reaches the potential a step late.
    """
    pytest.importorskip("norse")
    import norse.torch as nt
    from norse.torch.module.leaky_integrator_box import LIBoxCell, LIBoxParameters
    from norse.torch.module.lif_box import LIFBoxParameters
    from norse.torch.utils.export_nir import to_nir

    def parameters(kind: Any, size: int, **more: Any) -> Any:
        return kind(tau_mem_inv=torch.linspace(50, 200, size), v_leak=torch.linspace(-0.1, 0.1, size), **more)

    theirs = nt.SequentialState(
        torch.nn.Linear(6, 16),
        LIBoxCell(parameters(LIBoxParameters, 16), dt=1e-3),
        torch.nn.Linear(16, 5),
        nt.LIFBoxCell(parameters(LIFBoxParameters, 5, v_th=torch.full((5,), 0.3)), dt=1e-3),
    )
    louder(theirs)
    # One sample without a batch, as a shape in NIR has none. The dt here is a factor on the exported time constants.
    graph = to_nir(theirs, torch.randn(6), dt=1.0)
    x_seq = 2 * random_input(30, 6).float()
    state, outputs = None, []
    for x in x_seq:
        y, state = theirs(x, state)
        outputs.append(y)
    assert_same_spikes(step_loop(from_nir(graph, dt=1e-3), x_seq), torch.stack(outputs))


def test_spikingjelly_computes_the_same_spikes_as_its_export() -> None:
    pytest.importorskip("spikingjelly")
    pytest.importorskip("nirtorch")
    from spikingjelly.activation_based import layer
    from spikingjelly.activation_based import neuron as sj
    from spikingjelly.activation_based.functional import reset_net
    from spikingjelly.activation_based.nir_exchange import export_to_nir

    layers = [
        layer.Conv2d(2, 4, 3, padding=1),
        sj.LIFNode(tau=2.5, v_reset=-0.1, v_threshold=0.4),
        layer.AvgPool2d(2),
        layer.Flatten(),
        layer.Linear(36, 5),
        sj.IFNode(v_threshold=0.3),
    ]
    theirs = louder(torch.nn.Sequential(*layers))
    x_seq = random_input(20, 2, 6, 6).float() + 0.5
    graph = export_to_nir(theirs, x_seq[0], dt=1e-3)
    reset_net(theirs)
    assert_same_spikes(step_loop(from_nir(graph, dt=1e-3), x_seq), step_loop(theirs, x_seq))


# Errors.


def bad_graphs() -> dict[str, tuple[Callable[[], Any], str]]:
    draw = Draw()

    def li(*shape: int) -> Any:
        return draw.neuron("LI", *shape)

    def build(nodes: dict[str, Any], edges: str, inputs: Any = 5, outputs: Any = 5, **a: Any) -> Callable[[], Any]:
        """A graph, with other attributes for its node "a"."""

        def make() -> Any:
            for name, value in a.items():
                setattr(nodes["a"], name, value)
            return graph_of(nodes, edges, inputs=inputs, outputs=outputs, type_check=False)

        return make

    class Izhikevich(nir.NIRNode):  # type: ignore[misc,name-defined,unused-ignore]
        def __init__(self) -> None:
            pass

    two = np.array([5])
    twice = nir.NIRGraph(
        {"i": nir.Input(two), "j": nir.Input(two), "o": nir.Output(two)}, [("i", "o"), ("j", "o")], type_check=False
    )
    inside = nir.NIRGraph(
        {"i": nir.Input(two), "x": Izhikevich(), "o": nir.Output(two)}, [("i", "x"), ("x", "o")], type_check=False
    )
    nan = nir.LI(np.ones(5), np.full(5, np.nan), np.zeros(5))
    instant = nir.LI(np.array([1.0, 0, 1, 1, 1]), np.ones(5), np.zeros(5))
    pool = nir.AvgPool2d(np.array([2, 2]), np.array([2, 2]), np.array([3, 3]))
    bias = nir.Affine(np.ones((5, 5)), np.ones(4))
    words = nir.Scale(np.array(["a"] * 5))
    return {
        "type": (build({"x": Izhikevich()}, "input>x>output"), "'x' is of type Izhikevich.*supported are Affine.*at x"),
        "type inside": (build({"g": inside}, "input>g>output"), r"'g\.x' is of type Izhikevich"),
        "two ports": (build({"g": twice}, "input>g>output"), "inner graph 'g' has 2 nodes of type Input"),
        "no input": (lambda: nir.NIRGraph({"a": li(5)}, [("a", "a")], type_check=False), "no Input"),
        "edge to nowhere": (build({"a": li(5)}, "input>a>output a>b"), r"\('a', 'b'\) names 'b'"),
        "edge twice": (build({"a": li(5)}, "input>a>output input>a"), "listed 2 times"),
        "edge into an input": (build({"a": li(5)}, "input>a>output a>input"), "enters an Input"),
        "not fed": (build({"a": li(5), "b": li(5)}, "input>a>output b>a"), "LI 'b' is not reached from any Input"),
        "not fed but looped": (
            build({"a": li(5), "b": li(5)}, "input>a>output b>b>a"),
            "LI 'b' is not reached from any Input",
        ),
        "not read": (build({"a": li(5), "b": li(5)}, "input>a>output a>b"), "LI 'b' leads to no Output"),
        "input not read": (build({"a": li(5), "more": nir.Input(two)}, "input>a>output"), "'more' leads to no Output"),
        "size": (build({"a": draw.linear(4, 5)}, "input>a>output"), r"'a' takes inputs of shape \(4,\), got \(5,\)"),
        "batch": (
            build({"a": draw.affine(5, 5)}, "input>a>output", inputs=(1, 5)),
            r"got \(1, 5\); a shape in NIR has no batch dimension",
        ),
        "broadcast": (build({"a": li(4)}, "input>a>output"), r"LI 'a' has a tau of shape \(4,\), .* input of \(5,\)"),
        "broadcast the wrong way": (build({"a": li(3, 5)}, "input>a>output"), r"'a' has a tau of shape \(3, 5\)"),
        "sum": (
            build(
                {"a": draw.linear(5, 3), "b": draw.linear(5, 1), "c": li(3)}, "input>a>c>output input>b>c", outputs=3
            ),
            r"different shapes lead to 'c': \(1,\) from 'b', \(3,\)",
        ),
        "loop": (
            build({"a": li(5), "b": draw.linear(5, 4)}, "input>a>b>a>output"),
            r"different shapes lead to 'a': \(4,\) from 'b'",
        ),
        "output": (build({"a": draw.linear(5, 4)}, "input>a>output"), r"Output 'output' declares the shape \(5,\)"),
        "channels": (
            build({"a": draw.conv((4, 4), 2, 3)}, "input>a>output", inputs=(3, 4, 4)),
            r"Conv2d 'a' takes .* 2 channels, got \(3, 4, 4\)",
        ),
        "window": (
            build({"a": draw.conv((2, 2), 2, 3)}, "input>a>output", inputs=(2, 2, 2)),
            r"Conv2d 'a' cannot take an input of shape \(2, 2, 2\)",
        ),
        "input_shape": (
            build({"a": draw.conv((4, 4), 2, 3)}, "input>a>output", inputs=(2, 5, 4)),
            r"input_shape \(4, 4\), but what reaches it has \(5, 4\)",
        ),
        "stride of same": (
            build({"a": draw.conv((4, 4), 2, 3, padding="same", stride=2)}, "input>a>output", inputs=(2, 4, 4)),
            "Conv2d 'a' is no convolution",
        ),
        "stride": (
            build({"a": draw.conv((4, 4), 2, 3)}, "input>a>output", inputs=(2, 4, 4), stride=0),
            "Conv2d 'a' cannot take an input of shape",
        ),
        "groups": (
            build({"a": draw.conv((4, 4), 2, 3)}, "input>a>output", inputs=(2, 4, 4), groups=[1, 1]),
            r"Conv2d 'a' has groups = \[1, 1\], expected a whole number",
        ),
        "pool": (build({"a": pool}, "input>a>output", inputs=(2, 4, 4)), "AvgPool2d 'a' cannot take"),
        "pool rank": (build({"a": pool}, "input>a>output"), r"'a' takes inputs of shape \(channels, height, width\)"),
        "flatten": (
            build({"a": nir.Flatten({"input": two}, 0, 3)}, "input>a>output"),
            r"Flatten 'a' flattens dimensions 0 to 3 of an input of shape \(5,\)",
        ),
        "weight": (
            build({"a": nir.Linear(np.ones((2, 5, 5)))}, "input>a>output"),
            r"Linear 'a' has a weight of shape \(2, 5, 5\)",
        ),
        "bias": (build({"a": bias}, "input>a>output"), r"Affine 'a' has a bias of shape \(4,\), expected \(5,\)"),
        "nan": (build({"a": nan}, "input>a>output"), "LI 'a' has a r that is not finite"),
        "words": (build({"a": words}, "input>a>output"), "Scale 'a' needs an array of real numbers as scale"),
        "time constant": (build({"a": instant}, "input>a>output"), r"LI 'a' has a tau of 0\.0, expected"),
        "delay": (
            build({"a": nir.Delay(np.array([1, 1.5, 1, 1, 1]) * DT)}, "input>a>output"),
            r"Delay 'a' delays by 0\.0015, which is 1\.5 steps of dt = 0\.001",
        ),
        "negative delay": (build({"a": nir.Delay(np.full(5, -DT))}, "input>a>output"), r"'a' has a delay of -0\.001"),
        "shape": (lambda: without_shape(li(5)), "Input 'input' declares no shape"),
    }


def without_shape(node: Any) -> Any:
    graph = one_node(node, 5)
    graph.nodes["input"] = nir.Input({"input": None})
    return graph


@pytest.mark.parametrize("name", bad_graphs())
def test_a_graph_that_cannot_be_built_is_refused_by_node(name: str) -> None:
    make, message = bad_graphs()[name]
    with pytest.raises(CaptureError, match=message):
        from_nir(make(), dt=DT)


def test_arguments_are_checked(tmp_path: Path) -> None:
    graph = residual_graph()
    for dt in (0, -1e-3, float("nan")):
        with pytest.raises(ValueError, match="dt must be"):
            from_nir(graph, dt=dt)
    with pytest.raises(TypeError, match="dt must be"):
        from_nir(graph, dt="1ms")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be a nir\.NIRGraph or the path of one, got LIF"):
        from_nir(Draw().neuron("LIF", 2))
    with pytest.raises(TypeError, match="surrogate_function must be callable"):
        from_nir(graph, surrogate_function=4.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="detach_reset"):
        from_nir(graph, detach_reset=1)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        from_nir(tmp_path / "none.nir")


def test_a_file_with_an_unknown_node_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    nir.write(tmp_path / "graph.nir", residual_graph())
    with h5py.File(tmp_path / "graph.nir", "r+") as file:
        del file["node/nodes/lif1/type"]
        file["node/nodes/lif1/type"] = "Izhikevich"
    with pytest.raises(CaptureError, match=r"nir cannot read a graph from .*graph\.nir"):
        from_nir(tmp_path / "graph.nir")


def test_a_missing_package_is_an_import_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(ImportError, match="pip install nir"):
        from_nir("graph.nir")
