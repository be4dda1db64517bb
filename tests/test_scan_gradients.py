"""Training by kernels: forward has the bits of the eager steps, backward their gradients, or a stated refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import snncompile
from snncompile import neuron, surrogate
from snncompile.codegen import Still
from snncompile.ir import huge_pages
from snncompile.neuron import StatefulModule
from snncompile.runtime import KernelTarget, cpp_build
from snncompile.runtime.cpp_scan import CppTarget
from snncompile.runtime.scan_kernels import ScanKernels
from snncompile.runtime.states import StateSlot

from .spikingjelly_neurons import exact_neurons, transcendental_neurons

pytestmark = pytest.mark.skipif(cpp_build.compiler() is None, reason="no C++ compiler")

CHUNK = 4
CPP = CppTarget()
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 13)

NATIVE: dict[str, Callable[[], nn.Module]] = {
    "IF": neuron.IFNode,
    "soft IF, ATan": lambda: neuron.IFNode(v_reset=None, surrogate_function=surrogate.ATan()),
    "LIF": neuron.LIFNode,
    "LIF, raw input, ATan": lambda: neuron.LIFNode(
        3.0, decay_input=False, v_reset=-0.1, surrogate_function=surrogate.ATan()
    ),
    "LIF, detached reset": lambda: neuron.LIFNode(v_threshold=0.6, detach_reset=True),
    "parametric LIF": lambda: neuron.ParametricLIFNode(1.5, v_threshold=0.5),
    "non-spiking LIF": lambda: neuron.NonSpikingLIFNode(2.0, v_reset=0.1),
}


def variants_of_spikingjelly() -> dict[str, Callable[[], nn.Module]]:
    """LIF neurons with each surrogate, and with a reset that gradients do not see."""
    sj = pytest.importorskip("spikingjelly.activation_based.neuron")
    sjs = pytest.importorskip("spikingjelly.activation_based.surrogate")
    surrogates = ("ATan", "PiecewiseExp", "PiecewiseQuadratic", "SoftSign", "SuperSpike", "Erf", "Rect", "S2NN")

    def make(name: str) -> nn.Module:
        lif: nn.Module = sj.LIFNode(surrogate_function=getattr(sjs, name)())
        return lif

    made = {name: partial(make, name) for name in surrogates}
    return {"detached": lambda: sj.LIFNode(detach_reset=True), **made}


class Pair(StatefulModule):
    """Two states, two inputs, two outputs and two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.register_state("i", 0.5)
        self.decay = nn.Parameter(torch.tensor(0.7))
        self.threshold = nn.Parameter(torch.tensor([0.8]))
        self.fire = surrogate.ATan()

    def step(self, inputs: Any, states: Any) -> Any:
        x, gate = inputs
        i = self.decay.clamp(0.0, 1.0) * states[1] + torch.where(gate > 0.3, x, -x)
        v = (0.9 * states[0] + i).clamp(-2.0, 2.5)
        spike = self.fire(v - self.threshold)
        return (spike, torch.minimum(v.abs(), i)), (v - spike.detach() * self.threshold, i)


def sequence(steps: int, *shape: int, seed: int = 0) -> Tensor:
    return 3.0 * torch.rand((steps, *shape), generator=torch.Generator().manual_seed(seed)) - 0.5


def tensors_in(*groups: Any) -> list[Tensor]:
    return [value for group in groups for value in ([group] if isinstance(group, Tensor) else group)]


class Run:
    """A chunk, or several in a row, from given states; what comes out, and its gradients."""

    def __init__(
        self,
        module: nn.Module,
        inputs: list[Tensor],
        states: list[Tensor],
        lengths: list[int],
        *,
        by_kernel: bool,
        target: KernelTarget = CPP,
    ) -> None:
        kernels = ScanKernels(target, trains=True, reassociates=True) if by_kernel else None
        self.module = module
        self.inputs = [value.clone().requires_grad_() for value in inputs]
        self.states = [value.clone().requires_grad_() for value in states]
        slot = StateSlot(module, kernels)
        slot.states = tuple(self.states)
        pieces, begin = [], 0
        for length in lengths:
            chunks = (value[begin : begin + length] for value in self.inputs)
            pieces.append(tensors_in(slot.scan(length, *chunks)))
            begin += length
        assert (slot.bound is not None) is by_kernel, "the eager step ran"
        self.outputs = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        self.after = list(slot.states)

    def gradients(self, seed: int = 5) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(seed)
        results = [*self.outputs, *self.after]
        weights = [torch.randn(value.shape, generator=generator) for value in results]
        recorded = [(value, weight) for value, weight in zip(results, weights, strict=True) if value.requires_grad]
        targets = [*self.inputs, *self.states, *self.module.parameters()]
        of, given = zip(*recorded, strict=True)
        return list(torch.autograd.grad(of, targets, given, allow_unused=True, retain_graph=True))


def assert_close(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """Equal up to the order of additions; and not trivially so."""
    assert any(value is not None and float(value.abs().sum()) > 0 for value in expected)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * max(1.0, float(b.abs().max())))


def check(
    module: nn.Module,
    inputs: list[Tensor],
    lengths: list[int],
    seed: int = 0,
    *,
    is_exact: bool = True,
    target: KernelTarget = CPP,
) -> None:
    adapter = StateSlot(module).adapter
    given = tuple(value[0] for value in inputs)
    count = len(adapter.materialize(module, given, adapter.reset_values(module)))
    states = [sequence(1, *inputs[0].shape[1:], seed=seed + 10 + n)[0] for n in range(count)]
    got, expected = (
        Run(module, inputs, states, lengths, by_kernel=by_kernel, target=target) for by_kernel in (True, False)
    )
    for a, b in zip((*got.outputs, *got.after), (*expected.outputs, *expected.after), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0 if is_exact else 1e-6, atol=0.0 if is_exact else 1e-6)
        assert a.requires_grad == b.requires_grad
    assert_close(got.gradients(), expected.gradients())


def chunked(steps: int) -> list[int]:
    return [CHUNK] * (steps // CHUNK) + [steps % CHUNK] * (steps % CHUNK > 0)


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("steps", LENGTHS)
def test_gradients_are_those_of_the_eager_steps(kind: str, steps: int) -> None:
    check(NATIVE[kind](), [sequence(steps, 5, 7)], chunked(steps))
    check(NATIVE[kind](), [sequence(steps, 5, 7)], [steps])


@pytest.mark.parametrize("steps", LENGTHS)
def test_several_inputs_states_outputs_and_parameters(steps: int) -> None:
    check(Pair(), [sequence(steps, 4, 6), sequence(steps, 4, 6, seed=1).clamp(0.0, 1.0)], chunked(steps))


@pytest.mark.parametrize("steps", [1, CHUNK + 1])
def test_every_pointwise_neuron_and_surrogate_of_spikingjelly(steps: int) -> None:
    for make in (*exact_neurons().values(), *variants_of_spikingjelly().values()):
        check(make().train(), [sequence(steps, 4, 6)], chunked(steps))
    for make in transcendental_neurons().values():
        check(make().train(), [sequence(steps, 4, 6)], chunked(steps), is_exact=False)


def test_many_elements_on_two_threads_and_a_single_one() -> None:
    check(neuron.ParametricLIFNode(), [sequence(5, 8, 1031)], [3, 2])
    check(neuron.ParametricLIFNode(), [sequence(5, 1)], [3, 2])
    gradients = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        run = Run(neuron.ParametricLIFNode(), [sequence(5, 8, 5003)], [torch.zeros(8, 5003)], [5], by_kernel=True)
        gradients.append(run.gradients())
    assert all(map(torch.equal, *gradients))


# A number for each channel or neuron


class Broadcast(StatefulModule):
    """A LIF neuron whose decay and threshold are broadcast, and of which one may be no parameter."""

    def __init__(self, decay: Tensor, threshold: Tensor, *, learns_threshold: bool = True) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.decay = nn.Parameter(decay)
        if learns_threshold:
            self.threshold = nn.Parameter(threshold)
        else:
            self.register_buffer("threshold", threshold)
        self.fire = surrogate.ATan()

    def step(self, inputs: Any, states: Any) -> Any:
        v = self.decayed() * states[0] + inputs[0]
        spike = self.fire(v - self.threshold)
        return (spike,), (v - spike.detach() * self.threshold,)

    def decayed(self) -> Tensor:
        return self.decay


class Sigmoidal(Broadcast):
    def decayed(self) -> Tensor:
        return torch.sigmoid(self.decay)


class Clamped(Broadcast):
    def decayed(self) -> Tensor:
        return self.decay.clamp(0.0, 1.0)


class Averaged(Broadcast):
    """Each channel's decay, drawn to the mean of all."""

    def decayed(self) -> Tensor:
        return 0.5 * (self.decay + self.decay.mean())


def spread(*shape: int, seed: int = 0) -> Tensor:
    """Numbers from -0.3 to 1.2."""
    return 1.5 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.3


BROADCAST: dict[str, tuple[Callable[[], Broadcast], tuple[int, ...]]] = {
    "of channels": (lambda: Broadcast(spread(3, 1, 1), spread(3, 1, 1, seed=1)), (4, 3, 5, 6)),
    "of neurons": (lambda: Broadcast(spread(3, 5, 6), spread(3, 5, 6, seed=1)), (4, 3, 5, 6)),
    "of features": (lambda: Broadcast(spread(1031), spread(1031, seed=1)), (3, 1031)),
    "of a channel and a row": (lambda: Broadcast(spread(3, 1, 1), spread(5, 1, seed=1)), (4, 3, 5, 6)),
    "of a sample": (lambda: Broadcast(spread(4, 1), spread(1, 6, seed=1)), (4, 6)),
    "of everything": (lambda: Broadcast(spread(4, 6), spread(4, 6, seed=1)), (4, 6)),
    "of one image": (lambda: Broadcast(spread(6), spread(1, 6, seed=1)), (1, 6)),
    "beside a single one": (lambda: Broadcast(spread(3, 1, 1), torch.tensor(0.7)), (4, 3, 5, 6)),
    "that are no parameters": (lambda: Broadcast(spread(6), spread(6, seed=1), learns_threshold=False), (4, 6)),
    "behind a sigmoid": (lambda: Sigmoidal(spread(6), spread(6, seed=1)), (4, 6)),
    "clamped": (lambda: Clamped(spread(3, 1, 1), spread(3, 1, 1, seed=1)), (4, 3, 5, 6)),
    "and their mean": (lambda: Averaged(spread(6), spread(6, seed=1)), (4, 6)),
}


@pytest.mark.parametrize("kind", BROADCAST)
def test_parameters_with_a_number_for_each(kind: str) -> None:
    make, shape = BROADCAST[kind]
    for steps in LENGTHS:
        check(make(), [sequence(steps, *shape)], chunked(steps))


def test_parameters_of_channels_meet_channels_that_lie_last() -> None:
    x = sequence(7, 2, 5, 4, 3).permute(0, 1, 4, 2, 3)
    check(Clamped(spread(3, 1, 1), spread(3, 5, 4, seed=1)), [x], [4, 3])


@pytest.mark.parametrize("what", ["decay", "threshold"])
def test_what_is_read_for_each_channel_must_not_be_written_into(what: str) -> None:
    run = lif_run(module=Broadcast(spread(6), spread(6, seed=1), learns_threshold=False))
    with torch.no_grad():
        getattr(run.module, what).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run.gradients()


@pytest.mark.parametrize("schedule", ["breadth-first", 3])
def test_a_network_of_such_neurons_trains_within_its_promised_peak(schedule: Any) -> None:
    torch.manual_seed(0)
    neurons = Clamped(spread(8, 1, 1), spread(8, 1, 1, seed=1)), Sigmoidal(spread(8, 16, 16), torch.tensor(0.4))
    net = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), neurons[0], nn.Conv2d(8, 8, 3, padding=1), neurons[1]),
        *(nn.Flatten(), nn.Linear(8 * 16 * 16, 3)),
    )
    x = sequence(7, 4, 2, 16, 16)
    opt = snncompile.optimize(net, 7, schedule=schedule, backend="cpp", example_input=x)
    assert snncompile.verify(net, opt, x).ok
    reasons = [d.reason for d in opt.report.decisions if d.pass_name == "backend" and d.node]
    assert reasons == ["runs as a C++ kernel"] * 2
    opt.reset()
    peak = snncompile.measure_peak(lambda: opt(x).sum().backward())
    assert peak <= opt.report.predicted_peak_bytes <= 1.05 * peak


def test_a_network_of_nir_learns_the_parameters_of_each_neuron_by_kernels() -> None:
    nir = pytest.importorskip("nir")
    weights = [spread(6, 5).numpy(), spread(4, 6, seed=1).numpy()]
    leaky = {"r": np.ones(6), "tau": np.linspace(2e-3, 2e-2, 6), "v_leak": np.zeros(6)}
    slow = {"r": np.ones(4), "tau_mem": np.linspace(2e-3, 2e-2, 4), "tau_syn": np.full(4, 5e-3), "v_leak": np.zeros(4)}
    graph = nir.NIRGraph.from_list(
        *(nir.Linear(weights[0]), nir.LIF(**leaky, v_threshold=np.linspace(0.01, 0.05, 6))),
        *(nir.Linear(weights[1]), nir.CubaLIF(**slow, v_threshold=np.full(4, 1e-3))),
    )
    net, x = snncompile.from_nir(graph).train(), sequence(9, 4, 5)
    opt = snncompile.optimize(net, 9, schedule=4, example_input=x)
    assert snncompile.verify(net, opt, x).ok
    assert float(opt(x).sum()) > 0
    reasons = [d.reason for d in opt.report.decisions if d.pass_name == "backend" and d.node]
    assert reasons == ["runs as a C++ kernel"] * 2


@pytest.mark.parametrize("layout", ["channels last", "steps apart", "expanded"])
def test_other_layouts(layout: str) -> None:
    if layout == "channels last":
        chunk = sequence(5, 2, 4, 4, 3).permute(0, 1, 4, 2, 3)
    else:
        chunk = sequence(10, 4, 6)[::2] if layout == "steps apart" else sequence(1, 4, 6).expand(5, 4, 6)
    module, found = neuron.LIFNode(), []
    for kernels in (ScanKernels(trains=True), None):
        x = chunk.detach().requires_grad_()
        slot = StateSlot(module, kernels)
        y = slot.scan(5, x)
        found.append(torch.autograd.grad((y * sequence(5, *y.shape[1:], seed=3)).sum() + slot.states[0].sum(), x))
    assert_close(list(found[0]), list(found[1]))


def test_an_input_that_is_the_same_at_every_step() -> None:
    found = []
    for kernels in (ScanKernels(trains=True), None):
        x = sequence(1, 4, 6)[0].requires_grad_()
        y = StateSlot(neuron.LIFNode(), kernels).scan(7, Still(x))
        found.append(torch.autograd.grad((y * sequence(7, 4, 6, seed=3)).sum(), x))
    assert_close(list(found[0]), list(found[1]))


# As a node of autograd's graph


def lif_run(steps: int = 5, *, by_kernel: bool = True, module: nn.Module | None = None) -> Run:
    module = module or neuron.ParametricLIFNode(v_threshold=0.5)
    return Run(module, [sequence(steps, 4, 6)], [sequence(1, 4, 6, seed=9)[0]], [steps], by_kernel=by_kernel)


def test_a_chunk_is_one_node() -> None:
    run = lif_run()
    assert type(run.after[0].grad_fn).__name__ == "_ScanBackward"
    (piece,) = {edge for edge, _ in run.outputs[0].grad_fn.next_functions}
    assert piece is run.after[0].grad_fn


def test_gradients_that_nobody_sends_or_wants() -> None:
    for select in (lambda run: run.outputs[0].sum(), lambda run: run.after[0].sum()):
        runs = [lif_run(by_kernel=by_kernel) for by_kernel in (True, False)]
        for targets in (lambda run: run.inputs, lambda run: run.states, lambda run: list(run.module.parameters())):
            got, expected = (
                list(torch.autograd.grad(select(run), targets(run), retain_graph=True, allow_unused=True))
                for run in runs
            )
            assert_close(got, expected)


def test_backward_again_needs_the_graph_retained() -> None:
    run = lif_run()
    once = run.gradients()
    assert_close(run.gradients(), once)
    torch.autograd.grad(run.outputs[0].sum(), run.inputs)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(run.outputs[0].sum(), run.inputs)


def test_gradients_of_gradients_are_those_of_the_eager_steps() -> None:
    found = []
    for by_kernel in (True, False):
        run = Run(
            neuron.ParametricLIFNode(v_threshold=0.5, surrogate_function=surrogate.ATan()),
            [sequence(5, 4, 6)],
            [sequence(1, 4, 6, seed=9)[0]],
            [2, 3],
            by_kernel=by_kernel,
        )
        targets = [*run.inputs, *run.states, *run.module.parameters()]
        weights = sequence(5, 4, 6, seed=3)
        first = torch.autograd.grad((run.outputs[0] * weights).sum(), targets, create_graph=True)
        penalty = sum((gradient**2).sum() for gradient in first)
        found.append([*first, *torch.autograd.grad(penalty, targets)])
    assert_close(*found)


def test_a_state_made_of_a_parameter_is_counted_once() -> None:
    found = []
    for by_kernel in (True, False):
        module = neuron.ParametricLIFNode(v_threshold=0.5, surrogate_function=surrogate.ATan())
        slot = StateSlot(module, ScanKernels(trains=True) if by_kernel else None)
        slot.states = (module.w * torch.ones(4, 6),)
        y = slot.scan(5, sequence(5, 4, 6))
        (first,) = torch.autograd.grad((y * sequence(5, 4, 6, seed=3)).sum(), module.w, create_graph=True)
        found.append([first, *torch.autograd.grad(first, module.w)])
    assert_close(*found)


def test_many_gradients_at_once() -> None:
    runs = [lif_run(by_kernel=by_kernel) for by_kernel in (True, False)]
    weights = torch.stack([sequence(5, 4, 6, seed=seed) for seed in range(3)])
    got, expected = (
        list(torch.autograd.grad(run.outputs[0], run.inputs, weights, is_grads_batched=True)) for run in runs
    )
    assert_close(got, expected)


@pytest.mark.parametrize("what", ["input", "state", "parameter"])
def test_what_backward_needs_must_not_be_written_into(what: str) -> None:
    run = lif_run()
    changed = {"input": run.inputs[0], "state": run.states[0], "parameter": run.module.w}[what]
    with torch.no_grad():
        changed.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run.gradients()


def test_an_output_may_be_written_into() -> None:
    found = []
    for by_kernel in (True, False):
        run = lif_run(by_kernel=by_kernel)
        run.outputs[0].mul_(2.0)
        found.append(run.gradients())
    assert_close(*found)


def test_hooks_see_and_change_gradients() -> None:
    found = []
    for by_kernel in (True, False):
        run = lif_run(by_kernel=by_kernel)
        seen: list[Tensor] = []
        run.outputs[0].register_hook(lambda gradient: 2.0 * gradient)
        run.module.w.register_hook(seen.append)
        run.outputs[0].sum().backward()
        found.append([run.inputs[0].grad, run.module.w.grad, *seen])
    assert_close(*found)


def test_saved_tensors_may_be_packed_elsewhere() -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
        run = lif_run()
    assert_close(run.gradients(), lif_run(by_kernel=False).gradients())


def test_a_frozen_parameter_gets_none() -> None:
    module = neuron.ParametricLIFNode()
    module.w.requires_grad_(False)
    run = lif_run(module=module)
    torch.autograd.grad(run.outputs[0].sum(), run.inputs)
    run = lif_run(module=module)
    run.outputs[0].sum().backward()
    assert module.w.grad is None


def test_eval_mode_of_spikingjelly_lets_no_gradient_through_spikes() -> None:
    sj = pytest.importorskip("spikingjelly.activation_based.neuron")
    runs = [lif_run(by_kernel=by_kernel, module=sj.LIFNode().eval()) for by_kernel in (True, False)]
    for a, b in zip(*((*run.outputs, *run.after) for run in runs), strict=True):
        assert a.requires_grad == b.requires_grad


# In a network


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), neuron.LIFNode(), nn.Flatten(), nn.Linear(144, 3), neuron.ParametricLIFNode()
    ).train()


@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first", 3, "auto"])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_network_trains_by_kernels_within_its_promised_peak(schedule: Any, steps: int) -> None:
    net, x = network(), sequence(steps, 4, 2, 6, 6)
    opt = snncompile.optimize(net, steps, schedule=schedule, backend="cpp", example_input=x)
    assert snncompile.verify(net, opt, x).ok
    reasons = [d.reason for d in opt.report.decisions if d.pass_name == "backend"]
    assert reasons == ["C++ kernels for neurons, forward and backward", *["runs as a C++ kernel"] * 2]
    opt.reset()

    def train() -> None:
        opt(x).sum().backward()

    peak = snncompile.measure_peak(train)
    assert peak <= opt.report.predicted_peak_bytes <= 1.05 * peak


def test_two_calls_before_one_backward() -> None:
    found = []
    for schedule in (2, None):
        net = network()
        call = snncompile.optimize(net, 4, schedule=schedule) if schedule else _loop(net)
        first, second = call(sequence(4, 4, 2, 6, 6)), call(sequence(4, 3, 2, 6, 6, seed=1)[:, [0, 1, 2, 0]])
        ((first * sequence(4, 4, 3, seed=2)).sum() + (second * sequence(4, 4, 3, seed=3)).sum()).backward()
        found.append([p.grad for p in net.parameters()])
    assert_close(*found)


def _loop(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([net(step) for step in x])


def test_attributes_changed_before_backward_do_not_change_gradients() -> None:
    found = []
    for by_kernel in (True, False):
        run = Run(
            neuron.LIFNode(v_threshold=0.5, surrogate_function=surrogate.ATan()),
            [sequence(5, 4, 6)],
            [torch.zeros(4, 6)],
            [5],
            by_kernel=by_kernel,
        )
        run.module.tau, run.module.v_threshold = 7.0, 0.1
        weights = sequence(5, 4, 6, seed=3)
        (first,) = torch.autograd.grad((run.outputs[0] * weights).sum(), run.inputs, create_graph=True)
        found.append([*run.gradients(), first])
    assert_close(*found)


def test_a_parameter_changed_between_calls_is_read_anew() -> None:
    net, x = network(), sequence(5, 4, 2, 6, 6)
    opt = snncompile.optimize(net, 5, schedule=2)
    opt(x).sum().backward()
    with torch.no_grad():
        net[4].w.add_(0.5)
    net.zero_grad()
    opt.reset()
    reference = copy.deepcopy(net)
    opt(x).sum().backward()
    _loop(reference)(x).sum().backward()
    assert_close([p.grad for p in net.parameters()], [p.grad for p in reference.parameters()])


def test_learnable_decay_and_threshold_of_snntorch() -> None:
    snntorch = pytest.importorskip("snntorch")

    class Leaky(nn.Module):
        """snnTorch's parameters and surrogate, in a class of the user's."""

        def __init__(self) -> None:
            super().__init__()
            self.beta, self.threshold = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor(0.6))
            self.fire, self.mem = snntorch.surrogate.fast_sigmoid(), 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.mem = self.beta.clamp(0, 1) * self.mem + x
            spike: Tensor = self.fire(self.mem - self.threshold)
            self.mem = self.mem - spike.detach() * self.threshold
            return spike

    snncompile.register_neuron(Leaky, states={"mem": 0.0})
    check(Leaky(), [sequence(5, 4, 6)], [2, 3])


class Smooth(StatefulModule):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.function = function

    def step(self, inputs: Any, states: Any) -> Any:
        v = self.function(states[0], inputs[0])
        return (v,), (v,)


class Wavy(surrogate.SurrogateFunction):
    def gradient(self, x: Tensor) -> Tensor:
        return torch.cos(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: neuron.LIFNode(surrogate_function=Wavy()), "aten.cos.default has no place"),
        (lambda: Smooth(lambda v, x: torch.tanh(v + x)), "its tanh may round otherwise than torch's"),
        (lambda: Smooth(lambda v, x: torch.erf(v + x)), "aten.erf.default has no place"),
    ],
)
def test_what_has_no_kernel_trains_eagerly_and_the_report_says_why(make: Callable[[], nn.Module], reason: str) -> None:
    net, x = nn.Sequential(nn.Linear(6, 6), make()), sequence(5, 4, 6)
    opt = snncompile.optimize(net, 5, schedule=2, example_input=x)
    assert snncompile.verify(net, opt, x).ok
    (found,) = [d for d in opt.report.decisions if d.pass_name == "backend" and d.node]
    assert found.verdict.value == "refused"
    assert reason in found.reason


@pytest.mark.parametrize("function", [torch.tanh, torch.exp, torch.sigmoid])
def test_transcendental_functions_train_by_kernels_where_rounding_may_differ(function: Any) -> None:
    net, x = nn.Sequential(nn.Linear(6, 6), Smooth(lambda v, x: function(0.3 * v + x))), sequence(5, 4, 6)
    opt = snncompile.optimize(net, 5, schedule=2, reassociate=True, example_input=x)
    assert snncompile.verify(net, opt, x).ok
    assert any("runs as a C++ kernel" in decision.reason for decision in opt.report.decisions)


def test_a_buffer_that_starts_to_record_gradients_ends_the_use_of_the_kernel() -> None:
    class Buffered(Smooth):
        def __init__(self) -> None:
            super().__init__(lambda v, x: self.decay * v + x)
            self.register_buffer("decay", torch.tensor(0.5))

    module, kernels = Buffered(), ScanKernels(trains=True)
    slot = StateSlot(module, kernels)
    slot.scan(3, sequence(3, 4, 6))
    assert slot.bound is not None
    module.decay.requires_grad_()
    slot = StateSlot(module, kernels)
    slot.scan(3, sequence(3, 4, 6)).sum().backward()
    assert module.decay.grad is not None


@pytest.mark.parametrize("seed", range(6))
def test_random_steps(seed: int) -> None:
    """A neuron put together at random from what a program can hold."""
    generator = torch.Generator().manual_seed(100 + seed)

    def draw(options: list[Any]) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    combine: list[Callable[[Tensor, Tensor], Tensor]] = [
        torch.add,
        torch.sub,
        torch.mul,
        torch.maximum,
        torch.minimum,
        lambda a, b: torch.where(a > b, 0.5 * a, b),
        lambda a, b: a / (b.abs() + 1.5),
    ]
    alone: list[Callable[[Tensor], Tensor]] = [
        torch.abs,
        torch.relu,
        lambda a: a.clamp(-0.8, 0.9),
        lambda a: surrogate.ATan()(a - 0.3),
        lambda a: surrogate.Sigmoid()(a - 0.4),
        lambda a: 0.7 * a,
        torch.Tensor.detach,
    ]
    plan = [(draw(combine), draw(alone), draw([0, 1, 2, 3]), draw([0, 1, 2, 3])) for _ in range(5)]

    class Drawn(StatefulModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_state("v", 0.0)
            self.register_state("i", 0.0)
            self.gain = nn.Parameter(torch.tensor(0.6))

        def step(self, inputs: Any, states: Any) -> Any:
            values = [inputs[0], *states, self.gain * inputs[0]]
            for both, one, first, second in plan:
                values.append(one(both(values[first], values[second - 1])))
            return (values[-1], values[-2]), ((0.5 * values[-3]).clamp(-3.0, 3.0), 0.5 * states[1] + values[-1])

    check(Drawn(), [sequence(5, 4, 6, seed=seed)], [2, 3], seed)


def test_large_fresh_tensors_ask_for_huge_pages_and_keep_their_place() -> None:
    for size in (10, 3 * 2**20):
        fresh = torch.empty(size)
        address = fresh.data_ptr()
        assert huge_pages.on_huge_pages(fresh) is fresh
        assert fresh.data_ptr() == address
        assert float(fresh.fill_(1.0).sum()) == size
