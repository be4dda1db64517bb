"""Neurons: SpikingJelly's bits forward and backward, and the life of a state."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from snncompile.neuron import (
    IFNode,
    LIFNode,
    NonSpikingIFNode,
    NonSpikingLIFNode,
    ParametricLIFNode,
    SpikingNode,
    StatefulModule,
)
from snncompile.surrogate import ATan, Sigmoid

NEURONS: dict[str, type[SpikingNode]] = {"IFNode": IFNode, "LIFNode": LIFNode, "ParametricLIFNode": ParametricLIFNode}
LEAK: dict[str, list[dict[str, Any]]] = {
    "IFNode": [{}],
    "LIFNode": [{"tau": tau, "decay_input": decay} for tau in (2.0, 3.3) for decay in (True, False)],
    "ParametricLIFNode": [{"init_tau": tau, "decay_input": decay} for tau in (2.0, 3.3) for decay in (True, False)],
}
RESETS: list[dict[str, Any]] = [
    {"v_reset": v_reset, "v_threshold": v_threshold, "detach_reset": detach}
    for v_reset, v_threshold in ((0.0, 1.0), (-0.3, 0.7), (None, 1.0), (None, 0.7))
    for detach in (False, True)
]
CONFIGURATIONS = [
    pytest.param(name, {**leak, **reset}, id="-".join([name, *(str(v) for v in {**leak, **reset}.values())]))
    for name in NEURONS
    for leak, reset in itertools.product(LEAK[name], RESETS)
]


def pair(
    name: str, arguments: dict[str, Any], surrogate: str = "Sigmoid", alpha: float = 4.0, kernels: bool = False
) -> tuple[Any, Any]:
    """The same neuron, ours and SpikingJelly's.

    Its float32 kernels have a hand-written backward, which rounds in an order of its own. A surrogate that it does not
    know, such as a subclass, sends it to its reference equations and autograd instead.
    """
    peer = pytest.importorskip("spikingjelly.activation_based.neuron")
    peer_surrogate = getattr(pytest.importorskip("spikingjelly.activation_based.surrogate"), surrogate)
    oracle_surrogate = peer_surrogate if kernels else type("Unknown", (peer_surrogate,), {})
    ours = NEURONS[name](**arguments, surrogate_function={"Sigmoid": Sigmoid, "ATan": ATan}[surrogate](alpha))
    return ours, getattr(peer, name)(**arguments, surrogate_function=oracle_surrogate(alpha))


def run(node: Any, x_seq: Tensor, grad_output: Tensor, step_mode: str) -> dict[str, Tensor]:
    """Outputs, final state and every gradient of one run; the loss reads the spikes and the final state."""
    x_seq = x_seq.detach().requires_grad_()
    if step_mode == "m":
        node.step_mode = "m"
        spikes = node(x_seq)
    else:
        spikes = torch.stack([node(x) for x in x_seq])
    ((spikes * grad_output).sum() + node.v.sum()).backward()
    result = {"spikes": spikes.detach(), "v": node.v.detach(), "x.grad": x_seq.grad}
    result.update({f"{name}.grad": parameter.grad for name, parameter in node.named_parameters()})
    return result


def assert_same_bits(ours: dict[str, Tensor], oracle: dict[str, Tensor]) -> None:
    assert ours.keys() == oracle.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == oracle[name].dtype, name
        assert torch.equal(tensor, oracle[name]), f"{name}: {(tensor - oracle[name]).abs().max()}"


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize(("name", "arguments"), CONFIGURATIONS)
def test_spikingjelly_bits(name: str, arguments: dict[str, Any], T: int, step_mode: str) -> None:
    x_seq, grad_output = 3 * torch.randn(T, 5, 8) + 1, torch.randn(T, 5, 8)
    ours, oracle = pair(name, arguments)
    result = run(ours, x_seq, grad_output, step_mode)
    assert_same_bits(result, run(oracle, x_seq, grad_output, step_mode))
    assert 0 < result["spikes"].mean() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("surrogate", "alpha"), [("Sigmoid", 1.7), ("ATan", 2.0), ("ATan", 3.1)])
@pytest.mark.parametrize("name", list(NEURONS))
def test_spikingjelly_bits_of_other_surrogates(name: str, surrogate: str, alpha: float, dtype: torch.dtype) -> None:
    x_seq, grad_output = torch.randn(7, 5, 8, dtype=dtype) + 0.5, torch.randn(7, 5, 8, dtype=dtype)
    ours, oracle = pair(name, {}, surrogate, alpha)
    assert_same_bits(run(ours, x_seq, grad_output, "s"), run(oracle, x_seq, grad_output, "s"))


@pytest.mark.parametrize("name", list(NEURONS))
def test_multi_step_is_the_single_steps(name: str) -> None:
    x_seq, grad_output = torch.randn(7, 5, 8) + 0.5, torch.randn(7, 5, 8)
    assert_same_bits(run(NEURONS[name](), x_seq, grad_output, "m"), run(NEURONS[name](), x_seq, grad_output, "s"))


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize(("name", "arguments"), CONFIGURATIONS)
def test_spikingjelly_kernels(name: str, arguments: dict[str, Any], step_mode: str) -> None:
    x_seq, grad_output = torch.randn(7, 5, 8) + 0.5, torch.randn(7, 5, 8)
    ours, oracle = pair(name, arguments, kernels=True)
    result, expected = run(ours, x_seq, grad_output, step_mode), run(oracle, x_seq, grad_output, step_mode)
    for key in ("spikes", "v"):
        assert torch.equal(result.pop(key), expected.pop(key)), key
    for key, gradient in result.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay_input", [True, False])
def test_non_spiking_lif_follows_its_equation(decay_input: bool) -> None:
    tau, rest = 3.0, -0.2
    node = NonSpikingLIFNode(tau=tau, decay_input=decay_input, v_reset=rest)
    x_seq = torch.randn(7, 3, dtype=torch.float64)
    outputs = torch.stack([node(x) for x in x_seq])
    for column in range(3):
        v = rest
        for t in range(7):
            x = x_seq[t, column].item()
            v += (x - (v - rest)) / tau if decay_input else x - (v - rest) / tau
            assert outputs[t, column].item() == pytest.approx(v, abs=1e-12)
    assert torch.equal(node.v, outputs[-1])


def test_non_spiking_neurons_match_spikingjelly() -> None:
    peer = pytest.importorskip("spikingjelly.activation_based.neuron")
    x_seq = torch.randn(7, 2, 3)
    for ours, oracle in (
        (NonSpikingIFNode(step_mode="m"), peer.NonSpikingIFNode()),
        (NonSpikingLIFNode(tau=3.0, step_mode="m"), peer.NonSpikingLIFNode(tau=3.0)),
    ):
        assert torch.equal(ours(x_seq), torch.stack(oracle(x_seq)))


def test_parametric_lif_starts_at_its_time_constant() -> None:
    node = ParametricLIFNode(init_tau=4.0)
    assert node.w.shape == ()
    assert node.w.item() == pytest.approx(-math.log(3.0))
    assert 1 / node.w.sigmoid().item() == pytest.approx(4.0)
    assert [name for name, _ in node.named_parameters()] == ["w"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(NEURONS))
def test_spikes_and_states_have_the_input_dtype(name: str, dtype: torch.dtype) -> None:
    node = NEURONS[name]()
    spikes = node(torch.tensor([[0.0, 5.0]], dtype=dtype))
    assert spikes.dtype == node.v.dtype == dtype
    assert spikes.tolist() == [[0.0, 1.0]]


def test_a_neuron_fires_exactly_at_its_threshold() -> None:
    below = math.nextafter(1.0, 0.0)
    assert IFNode()(torch.tensor([below, 1.0], dtype=torch.float64)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("node", [IFNode(), LIFNode(), ParametricLIFNode(), NonSpikingIFNode()], ids=repr)
def test_zero_dimensional_input(node: StatefulModule) -> None:
    assert node(torch.tensor(0.5)).shape == ()
    assert node.v.shape == ()


def test_state_lives_until_reset() -> None:
    node = IFNode(v_reset=None)
    assert node.v == 0.0
    node(torch.full((2, 3), 0.4))
    node(torch.full((2, 3), 0.4))
    torch.testing.assert_close(node.v, torch.full((2, 3), 0.8))
    node.reset()
    assert node.v == 0.0
    assert LIFNode(v_reset=-0.5).v == -0.5


def test_two_calls_are_one_longer_call() -> None:
    x_seq = torch.randn(8, 3, 4)
    whole, halves = LIFNode(step_mode="m"), LIFNode(step_mode="m")
    outputs = torch.cat([halves(x_seq[:4]), halves(x_seq[4:])])
    assert torch.equal(whole(x_seq), outputs)
    assert torch.equal(whole.v, halves.v)


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_another_shape_without_reset_is_an_error(step_mode: str) -> None:
    node = LIFNode(step_mode=step_mode)
    time = () if step_mode == "s" else (3,)
    node(torch.zeros(*time, 4, 8))
    before = node.v
    with pytest.raises(ValueError, match=r"state v of LIFNode has shape \(4, 8\), the input has \(2, 8\); call reset"):
        node(torch.zeros(*time, 2, 8))
    assert node.v is before
    node.reset()
    assert node(torch.zeros(*time, 2, 8)).shape == (*time, 2, 8)


def test_a_state_can_be_written() -> None:
    node = IFNode()
    node.v = torch.full((2,), 0.7)
    assert node(torch.full((2,), 0.3)).tolist() == [1.0, 1.0]
    node.v = 0
    assert node.v == 0.0
    with pytest.raises(TypeError, match="state v must be a real number, got str"):
        node.v = "0"


def test_states_follow_to_and_are_not_in_the_state_dict() -> None:
    node = ParametricLIFNode()
    node(torch.randn(2, 3))
    assert list(node.state_dict()) == ["w"]
    node.to(torch.float64)
    assert node.v.dtype == node.w.dtype == torch.float64
    node.to("meta")
    assert node.v.is_meta


def test_a_state_follows_the_input_s_dtype() -> None:
    node = IFNode()
    for dtype in (torch.float32, torch.float64, torch.float32):
        assert node(torch.full((2,), 0.25, dtype=dtype)).dtype == dtype
        assert node.v.dtype == dtype
    assert node.v.tolist() == [0.75, 0.75]


def test_states_keep_the_memory_layout() -> None:
    node = IFNode()
    node(torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    assert node.v.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda node: pickle.loads(pickle.dumps(node))], ids=["deep", "pickle"]
)
def test_copies_carry_the_state_without_its_history(copy_of: Any) -> None:
    node = ParametricLIFNode(init_tau=3.0, v_reset=None)
    node(torch.randn(2, 3, requires_grad=True))
    assert node.v.requires_grad
    twin = copy_of(node)
    assert torch.equal(twin.v, node.v)
    assert not twin.v.requires_grad
    x = torch.randn(2, 3)
    assert torch.equal(twin(x), node(x))
    twin.reset()
    assert isinstance(node.v, Tensor)


def test_detach_states_cuts_the_history() -> None:
    node = IFNode()
    first = torch.zeros(2, requires_grad=True)
    node(first)
    node.detach_states()
    second = torch.zeros(2, requires_grad=True)
    node(second).sum().backward()
    assert first.grad is None
    assert second.grad is not None


def test_detach_reset_changes_the_gradient_only() -> None:
    x_seq, grad_output = torch.randn(7, 5, 8) + 0.5, torch.randn(7, 5, 8)
    attached = run(LIFNode(), x_seq, grad_output, "s")
    detached = run(LIFNode(detach_reset=True), x_seq, grad_output, "s")
    assert torch.equal(attached["spikes"], detached["spikes"])
    assert not torch.equal(attached["x.grad"], detached["x.grad"])


@pytest.mark.parametrize(("name", "arguments"), CONFIGURATIONS)
def test_step_is_pure_and_traces_to_pointwise_operations(name: str, arguments: dict[str, Any]) -> None:
    node = NEURONS[name](**arguments)

    def step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        (spike,), (v,) = node.step((x,), (v,))
        return spike, v

    x, v = torch.randn(3, 4), torch.randn(3, 4)
    graph = make_fx(step)(x, v)
    targets = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    not_arithmetic = {torch.ops.aten._to_copy.default, torch.ops.aten.detach.default}
    assert all(torch.Tag.pointwise in target.tags for target in targets - not_arithmetic)
    fresh_x, fresh_v = torch.randn(3, 4), torch.randn(3, 4)
    before = fresh_x.clone(), fresh_v.clone()
    for traced, direct in zip(graph(fresh_x, fresh_v), step(fresh_x, fresh_v), strict=True):
        assert torch.equal(traced, direct)
    assert torch.equal(fresh_x, before[0])
    assert torch.equal(fresh_v, before[1])
    assert node.v == node.v_rest


class Adaptive(StatefulModule):
    """A user's neuron: two inputs, two states, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state("v", 0.0)
        self.register_state("threshold", 1.0)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def step(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        x, inhibition = inputs
        v, threshold = states
        h = v + x - inhibition
        spike = (h >= threshold).to(x.dtype)
        return (spike, h), (h - spike * threshold, threshold + self.gain * spike)


def test_a_user_s_neuron_with_several_inputs_states_and_outputs() -> None:
    x_seq, inhibition_seq = torch.rand(7, 2, 3), torch.rand(7, 2, 3) * 0.2
    single, multi = Adaptive(), Adaptive()
    assert single.state_names == ("v", "threshold")
    steps = [single(x, inhibition) for x, inhibition in zip(x_seq, inhibition_seq, strict=True)]
    multi.step_mode = "m"
    spikes, charges = multi(x_seq, inhibition_seq)
    assert torch.equal(spikes, torch.stack([spike for spike, _ in steps]))
    assert torch.equal(charges, torch.stack([charge for _, charge in steps]))
    assert torch.equal(multi.threshold, single.threshold)
    assert multi.threshold.max() > 1.0
    with pytest.raises(ValueError, match=r"inputs \[T, N, \*\] of one T >= 1, got shapes"):
        multi(x_seq, inhibition_seq[:3])


def test_state_names_must_be_free() -> None:
    node = IFNode()
    for name in ("v", "step", "training", "surrogate_function", "not a name"):
        with pytest.raises(ValueError, match="needs an unused identifier"):
            node.register_state(name, 0.0)


def test_an_unfinished_neuron_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="StatefulModule must define step"):
        StatefulModule()(torch.zeros(1))
    with pytest.raises(NotImplementedError, match="SpikingNode must define charge"):
        SpikingNode()(torch.zeros(1))


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        ((torch.zeros(2, dtype=torch.int64),), "torch.int64"),
        ((torch.zeros(2, dtype=torch.bool),), "torch.bool"),
        ((torch.zeros(2), [1.0]), "Tensor, list"),
        ((1.0,), "float"),
        ((), "nothing"),
    ],
)
def test_input_must_be_floating_point(inputs: tuple[Any, ...], got: str, step_mode: str) -> None:
    with pytest.raises(TypeError, match=f"IFNode takes floating-point tensors, got {got}"):
        IFNode(step_mode=step_mode)(*inputs)


@pytest.mark.parametrize("shape", [(), (0, 2)])
def test_multi_step_needs_a_step(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match='step_mode "m" takes inputs'):
        IFNode(step_mode="m")(torch.zeros(shape))


@pytest.mark.parametrize(
    ("node_class", "arguments", "error", "message"),
    [
        (IFNode, {"v_threshold": "1"}, TypeError, "v_threshold must be a real number, got str"),
        (IFNode, {"v_threshold": True}, TypeError, "v_threshold must be a real number, got bool"),
        (IFNode, {"v_threshold": math.nan}, ValueError, "v_threshold must be finite, got nan"),
        (IFNode, {"v_reset": math.inf}, ValueError, "v_reset must be finite, got inf"),
        (IFNode, {"detach_reset": 1}, TypeError, "detach_reset must be True or False, got int"),
        (IFNode, {"surrogate_function": 4.0}, TypeError, "surrogate_function must be callable, got float"),
        (IFNode, {"step_mode": "x"}, ValueError, "step_mode must be"),
        (LIFNode, {"tau": 1.0}, ValueError, "tau must be greater than 1 time step, got 1.0"),
        (LIFNode, {"decay_input": None}, TypeError, "decay_input must be True or False, got NoneType"),
        (ParametricLIFNode, {"init_tau": 0.5}, ValueError, "init_tau must be greater than 1 time step, got 0.5"),
        (NonSpikingLIFNode, {"tau": -2}, ValueError, "tau must be greater than 1 time step, got -2"),
        (NonSpikingLIFNode, {"v_reset": None}, TypeError, "v_reset must be a real number, got NoneType"),
    ],
)
def test_wrong_arguments(
    node_class: type[StatefulModule], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        node_class(**arguments)


def test_surrogates_are_not_shared_between_neurons() -> None:
    assert IFNode().surrogate_function is not IFNode().surrogate_function


def test_repr_tells_the_neuron_s_constants() -> None:
    assert "tau=2.0, decay_input=True, v_threshold=1.0, v_reset=None" in repr(LIFNode(v_reset=None))
    node = ParametricLIFNode(init_tau=2, decay_input=False)
    assert "tau=2.0, decay_input=False" in repr(node)
    assert "tau=" in repr(node.to("meta"))
