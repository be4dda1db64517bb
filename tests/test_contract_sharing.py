"""An optimised network and the network it was made from are two views of one thing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import snncompile
from snncompile import functional, neuron

from .contract import SCHEDULES, assert_same_states, conv_net, dense_net, states_of, step_loop, twin

T = 4


def dense_input(seed: int = 3) -> Tensor:
    return torch.randn(T, 5, 6, generator=torch.Generator().manual_seed(seed))


class Scaled(nn.Module):
    """A traced forward that reads Python attributes of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.node = neuron.IFNode(v_threshold=0.5)
        self.gain = nn.Parameter(torch.full((6,), 1.5))
        self.register_buffer("offset", torch.full((6,), 0.1))
        self.scale = 1.0
        self.repeat = 1
        self.scales = [1.0, 2.0]
        self.table = {"out": 1.0}
        self.config = SimpleNamespace(scale=1.0, inner=SimpleNamespace(shift=0.0))
        self.activation: Callable[[Tensor], Tensor] = torch.relu
        self.tensor = torch.tensor(1.0)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.repeat):
            x = self.fc(x) * self.gain + self.offset
        x = self.activation(x) * self.scale * self.scales[0] * self.tensor
        return self.node(x * self.config.scale + self.config.inner.shift) * self.table["out"] * self.scales[1]


def assert_follows(net: nn.Module, opt: Any, x_seq: Tensor, change: Callable[[Any], None]) -> None:
    """After `change(net)` the compiled network gives the step loop's new result, which differs from the old one."""
    old = opt(x_seq)
    opt.reset()
    change(net)
    expected = step_loop(twin(net), x_seq)
    assert not torch.equal(old, expected), "the change makes no difference, so this test shows nothing"
    assert torch.equal(opt(x_seq), expected)
    opt.reset()


# What is shared


def test_parameters_buffers_and_modules_are_the_same_objects_under_the_same_names() -> None:
    net = conv_net()
    opt = snncompile.optimize(net, T)
    assert [(n, id(p)) for n, p in opt.named_parameters()] == [(n, id(p)) for n, p in net.named_parameters()]
    assert [(n, id(b)) for n, b in opt.named_buffers()] == [(n, id(b)) for n, b in net.named_buffers()]
    assert [(n, id(m)) for n, m in opt.named_modules()][1:] == [(n, id(m)) for n, m in net.named_modules()][1:]
    assert opt.get_parameter("0.weight") is net[0].weight
    assert opt.get_submodule("2") is net[2]


def test_checkpoints_interchange_both_ways() -> None:
    net, other = conv_net(1).eval(), conv_net(2).eval()
    opt, other_opt = snncompile.optimize(net, T), snncompile.optimize(other, T)
    assert list(opt.state_dict()) == list(net.state_dict())
    x_seq = torch.rand(T, 5, 2, 6, 6)
    before = opt(x_seq)
    opt.reset()

    opt.load_state_dict(other.state_dict())
    expected = step_loop(twin(other), x_seq)
    assert not torch.equal(before, expected)
    assert torch.equal(opt(x_seq), expected)
    opt.reset()

    fresh = conv_net(3).eval()
    fresh.load_state_dict(opt.state_dict())
    assert torch.equal(step_loop(fresh, x_seq), other_opt(x_seq))

    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        opt.load_state_dict({})


def test_a_checkpoint_with_assign_replaces_the_parameters_of_both() -> None:
    net = dense_net(1)
    opt = snncompile.optimize(net, T)
    weights = dense_net(2).state_dict()
    assert_follows(net, opt, dense_input(), lambda _: opt.load_state_dict(weights, assign=True))
    assert opt.get_parameter("0.weight") is net[0].weight


# Weights that change


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_optimiser_step_after_compiling_is_honoured(schedule: str | int) -> None:
    net = dense_net()
    opt = snncompile.optimize(net, T, schedule=schedule)
    optimiser = torch.optim.SGD(opt.parameters(), lr=5.0)

    def train_once(_: Any) -> None:
        step_loop(net, dense_input(4)).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        functional.reset_net(net)

    assert_follows(net, opt, dense_input(), train_once)


def _in_place(net: Any) -> None:
    with torch.no_grad():
        net[0].weight.mul_(-1.0)


def _through_data(net: Any) -> None:
    net[0].weight.data = net[0].weight.data * -1.0


def _new_parameter(net: Any) -> None:
    net[0].weight = nn.Parameter(net[0].weight.detach() * -1.0)


def _no_bias(net: Any) -> None:
    net[0].bias = None


def _new_layer(net: Any) -> None:
    net[0] = nn.Linear(6, 16)


def _new_neuron(net: Any) -> None:
    net[1] = neuron.IFNode(v_threshold=2.0, v_reset=None)


def _new_kind_of_layer(net: Any) -> None:
    net[1] = nn.Sequential(nn.Tanh(), neuron.IFNode(0.2))


def _longer(net: Any) -> None:
    net.append(nn.Linear(3, 2))


def _shorter(net: Any) -> None:
    del net[3]


def _threshold(net: Any) -> None:
    net[1].v_threshold = 0.05


def _soft_reset(net: Any) -> None:
    net[1].v_reset = None


def _time_constant(net: Any) -> None:
    net[1].tau = 7.0


CHANGES = [
    _in_place,
    _through_data,
    _new_parameter,
    _no_bias,
    _new_layer,
    _new_neuron,
    _new_kind_of_layer,
    _longer,
    _shorter,
    _threshold,
    _soft_reset,
    _time_constant,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("schedule", ["depth-first", 3])
def test_a_change_to_the_network_after_compiling_is_honoured(change: Any, schedule: str | int) -> None:
    net = dense_net()
    assert_follows(net, snncompile.optimize(net, T, schedule=schedule), dense_input(), change)


ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "number": lambda net: setattr(net, "scale", 3.0),
    "loop count": lambda net: setattr(net, "repeat", 2),
    "list item": lambda net: net.scales.__setitem__(0, 0.1),
    "list": lambda net: setattr(net, "scales", [0.5, 0.5]),
    "dictionary item": lambda net: net.table.__setitem__("out", 7.0),
    "attribute of a configuration object": lambda net: setattr(net.config, "scale", 3.0),
    "attribute of a nested configuration object": lambda net: setattr(net.config.inner, "shift", 0.4),
    "function": lambda net: setattr(net, "activation", torch.sigmoid),
    "tensor": lambda net: setattr(net, "tensor", torch.tensor(3.0)),
    "tensor in place": lambda net: net.tensor.mul_(3.0),
    "parameter of the root": lambda net: setattr(net, "gain", nn.Parameter(torch.full((6,), 4.0))),
    "buffer in place": lambda net: net.offset.fill_(0.3),
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_a_changed_attribute_that_a_traced_forward_reads_is_honoured(kind: str) -> None:
    torch.manual_seed(1)
    net = Scaled()
    assert_follows(net, snncompile.optimize(net, T, schedule=2), dense_input(), ATTRIBUTES[kind])


MODULE_ATTRIBUTES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None]]] = {
    "batch norm eps": (lambda: nn.BatchNorm1d(6).eval(), lambda m: setattr(m, "eps", 30.0)),
    "leaky slope": (lambda: nn.LeakyReLU(0.1), lambda m: setattr(m, "negative_slope", -2.0)),
    "leaky slope in place": (lambda: nn.LeakyReLU(0.1, inplace=True), lambda m: setattr(m, "negative_slope", -2.0)),
    "flatten": (lambda: nn.Flatten(1), lambda m: setattr(m, "start_dim", 0)),
    "softmax dim": (lambda: nn.Softmax(1), lambda m: setattr(m, "dim", 0)),
}


@pytest.mark.parametrize("kind", MODULE_ATTRIBUTES)
def test_a_changed_attribute_of_a_library_module_is_honoured(kind: str) -> None:
    make, change = MODULE_ATTRIBUTES[kind]
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 6), make(), neuron.NonSpikingIFNode())
    opt = snncompile.optimize(net, T, schedule=2)
    assert_follows(net, opt, dense_input(), lambda net: change(net[1]))


def test_an_activation_switched_to_in_place_after_compiling_is_honoured() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu, self.node = nn.Linear(6, 6), nn.ReLU(), neuron.NonSpikingIFNode()

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return self.node(self.relu(y) + y)

    net = Residual()
    opt = snncompile.optimize(net, T, schedule=2)
    assert_follows(net, opt, dense_input(), lambda net: setattr(net.relu, "inplace", True))


def test_a_step_mode_changed_after_compiling_is_honoured_and_back_again_works() -> None:
    net = dense_net()
    opt = snncompile.optimize(net, T)
    expected = opt(dense_input())
    opt.reset()
    functional.set_step_mode(net, "m")
    assert torch.equal(opt(dense_input()), expected)
    assert net[1].step_mode == "m"
    opt.reset()
    functional.set_step_mode(net, "s")
    assert torch.equal(opt(dense_input()), expected)


def test_a_hook_added_after_compiling_sees_every_step_and_may_be_removed_again() -> None:
    net, x_seq = dense_net(), dense_input()
    opt = snncompile.optimize(net, T, schedule="breadth-first")
    expected = opt(x_seq)
    for layer in (0, 1):
        opt.reset()
        seen: list[Tensor] = []
        handle = net[layer].register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        assert torch.equal(opt(x_seq), expected)
        assert [tuple(output.shape) for output in seen] == [(5, 16)] * T
        handle.remove()
        opt.reset()
        assert torch.equal(opt(x_seq), expected)
        assert len(seen) == T


# Modes, devices, dtypes


@pytest.mark.parametrize("through", ["net", "opt", "parent"])
def test_train_and_eval_on_either_reach_both(through: str) -> None:
    net = conv_net()
    opt = snncompile.optimize(net, T)
    switch = {"net": net, "opt": opt, "parent": nn.Sequential(opt)}[through]
    x_seq = torch.rand(T, 5, 2, 6, 6)
    for mode in (True, False, True):
        assert switch.train(mode) is switch
        assert opt.training is net.training is net[1].training is mode
        reference = twin(net)
        opt.reset()
        functional.reset_net(reference)
        torch.testing.assert_close(opt(x_seq), step_loop(reference, x_seq))
        torch.testing.assert_close(net[1].running_mean, reference[1].running_mean, rtol=0, atol=0)
    assert net[1].num_batches_tracked == 2 * T


@pytest.mark.parametrize("through", ["net", "opt", "parent"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype_on_either_reaches_both(through: str, dtype: torch.dtype) -> None:
    net = dense_net()
    opt = snncompile.optimize(net, T)
    opt(dense_input())
    opt.reset()
    {"net": net, "opt": opt, "parent": nn.Sequential(opt)}[through].to(dtype)
    assert net[0].weight.dtype is dtype
    x_seq = dense_input().to(dtype)
    got = opt(x_seq)
    assert got.dtype is dtype
    assert torch.equal(got, step_loop(twin(dense_net().to(dtype)), x_seq))


def test_freezing_parameters_after_compiling_is_honoured() -> None:
    net, x_seq = dense_net(), dense_input()
    opt = snncompile.optimize(net, T)
    assert opt(x_seq).requires_grad
    opt.reset()
    opt.requires_grad_(False)
    assert not net[0].weight.requires_grad
    assert not opt(x_seq).requires_grad
    opt.reset()
    net[2].bias.requires_grad_(True)
    opt(x_seq).sum().backward()
    assert net[2].bias.grad is not None
    assert net[0].weight.grad is None


# Copies


def _through_pickle(opt: Any) -> Any:
    return pickle.loads(pickle.dumps(opt))


def _through_torch_save(opt: Any) -> Any:
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, _through_pickle, _through_torch_save]


@pytest.mark.parametrize("duplicate", COPIES, ids=lambda f: f.__name__.strip("_"))
def test_a_copy_has_weights_and_states_of_its_own(duplicate: Callable[[Any], Any]) -> None:
    net, x_seq = dense_net(), dense_input()
    opt = snncompile.optimize(net, T, "10MiB", schedule=2)
    opt(x_seq)
    other = duplicate(opt)
    reference = twin(net)
    assert other.options == opt.options

    assert torch.equal(other(x_seq), step_loop(reference, x_seq))  # goes on from the copied states
    assert not torch.equal(states_of(net)["1"], states_of(other)["1"])
    with torch.no_grad():
        other.get_parameter("0.weight").zero_()
    other.reset()
    assert net[0].weight.abs().sum() > 0
    assert isinstance(net[1].v, Tensor)
    assert snncompile.verify(net, opt, x_seq).ok


def test_a_copy_made_before_the_first_call_and_a_copy_of_a_copy_work() -> None:
    net = dense_net()
    other = copy.deepcopy(_through_pickle(snncompile.optimize(net, T)))
    assert torch.equal(other(dense_input()), step_loop(net, dense_input()))


def test_copying_a_parent_of_both_keeps_them_sharing() -> None:
    net = dense_net()
    both = copy.deepcopy(nn.ModuleDict({"net": net, "opt": snncompile.optimize(net, T)}))
    assert both["opt"].get_parameter("0.weight") is both["net"][0].weight
    both["opt"](dense_input())
    assert both["net"][1].v.shape == (5, 16)
    assert net[1].v == 0.0


class AddOne:
    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + 1


@pytest.mark.parametrize("duplicate", COPIES, ids=lambda f: f.__name__.strip("_"))
def test_a_copy_keeps_hooks_and_attributes_of_the_optimised_module(duplicate: Callable[[Any], Any]) -> None:
    opt = snncompile.optimize(dense_net(), T)
    opt.note = "mine"
    opt.register_forward_hook(AddOne())
    other = duplicate(opt)
    assert other.note == "mine"
    assert torch.equal(other(dense_input()), opt(dense_input()))
    assert opt(dense_input()).max() == 2


# As a module among modules


def test_as_a_part_of_a_bigger_module() -> None:
    class Classifier(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body
            self.head = nn.Linear(3, 2)

        def forward(self, x_seq: Tensor) -> Tensor:
            return self.head(self.body(x_seq).mean(0))

    net = conv_net()
    plain, parent = Classifier(net), Classifier(snncompile.optimize(net, T))
    assert list(parent.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in parent.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in parent.named_modules()] == [n for n, _ in plain.named_modules()]

    weights = {name: value * 0.5 if value.is_floating_point() else value for name, value in plain.state_dict().items()}
    assert parent.load_state_dict(weights).missing_keys == []
    assert torch.equal(net[0].weight, weights["body.0.weight"])
    missing = parent.load_state_dict({k: v for k, v in weights.items() if k != "body.5.bias"}, strict=False)
    assert missing.missing_keys == ["body.5.bias"]

    parent(torch.rand(T, 5, 2, 6, 6)).sum().backward()
    assert all(p.grad is not None for p in parent.parameters())
    parent.zero_grad()
    assert net[0].weight.grad is None
    parent.eval()
    assert not net[1].training
    functional.reset_net(parent)
    assert net[2].v == 0.0


def test_forward_hooks_of_the_optimised_module_run_once_a_call() -> None:
    opt, x_seq, calls = snncompile.optimize(dense_net(), T), dense_input(), []
    opt.register_forward_pre_hook(lambda module, args: calls.append(("before", args[0].shape)))
    opt.register_forward_hook(lambda module, args, output: calls.append(("after", output.shape)))
    opt.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append(("grad", None)))
    opt(x_seq.requires_grad_()).sum().backward()
    assert calls == [("before", (T, 5, 6)), ("after", (T, 5, 3)), ("grad", None)]


def test_attributes_of_the_network_are_read_and_written_through_the_optimised_module() -> None:
    class Tagged(Scaled):
        @property
        def halved(self) -> float:
            return self.scale / 2

        @halved.setter
        def halved(self, value: float) -> None:
            self.scale = 2 * value

    net = Tagged()
    opt = snncompile.optimize(net, T)
    assert opt.gain is net.gain
    assert opt.fc is net.fc
    assert opt.halved == 0.5
    opt.scale = 3.0
    assert net.scale == 3.0
    opt.halved = 4.0
    assert net.scale == 8.0
    opt.fc = nn.Linear(6, 6)
    assert net.fc is opt.fc
    opt.unrelated = 1
    assert not hasattr(net, "unrelated")
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = opt.nothing_of_that_name


def test_names_of_the_network_do_not_collide_with_our_own_private_ones() -> None:
    class Unlucky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.node = nn.Linear(6, 3), neuron.IFNode(0.2)
            self._options, self._plans, self._lock, self._latest, self._compiler = 2.0, {}, None, 3, "x"

        def forward(self, x: Tensor) -> Tensor:
            return self.node(self.fc(x) * self._options)

    net = Unlucky()
    opt = snncompile.optimize(net, T)
    expected = step_loop(twin(net), dense_input())
    assert torch.equal(opt(dense_input()), expected)
    assert net._options == 2.0
    assert net._plans == {}


def test_repr_shows_the_options_and_the_network() -> None:
    text = repr(snncompile.optimize(dense_net(), T, schedule=2, readout="sum"))
    assert text.startswith("OptimizedModule(")
    assert "T=4, schedule=2, readout='sum'" in text
    assert "(0): Linear(in_features=6, out_features=16, bias=True)" in text


def test_optimising_twice_or_a_network_that_contains_an_optimised_one_is_an_error_that_says_so() -> None:
    opt = snncompile.optimize(dense_net(), T)
    with pytest.raises(TypeError, match="optimised already"):
        snncompile.optimize(opt, T)
    with pytest.raises(TypeError, match=r"body.*optimised already"):
        snncompile.optimize(nn.ModuleDict({"body": opt}), T)


def test_functional_call_with_other_weights() -> None:
    net, x_seq = dense_net(1), dense_input()
    opt = snncompile.optimize(net, T)
    others = {name: value.detach() for name, value in dense_net(2).named_parameters()}
    assert torch.equal(torch.func.functional_call(opt, others, (x_seq,)), step_loop(dense_net(2), x_seq))
    opt.reset()
    assert torch.equal(opt(x_seq), step_loop(dense_net(1), x_seq))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weight_normalised_layers(schedule: str | int) -> None:
    net = dense_net()
    parametrizations.weight_norm(net[0])
    reference = twin(net)
    opt = snncompile.optimize(net, T, schedule=schedule)
    got, expected = opt(dense_input()), step_loop(reference, dense_input())
    assert torch.equal(got, expected)
    got.sum().backward()
    expected.sum().backward()
    for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5, msg=name)
    opt.reset()
    assert_follows(net, opt, dense_input(), lambda n: n[0].parametrizations.weight.original0.data.mul_(-1.0))


def test_a_parametrisation_added_after_compiling_is_honoured() -> None:
    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    net = dense_net()
    opt = snncompile.optimize(net, T)
    add = torch.nn.utils.parametrize.register_parametrization
    assert_follows(net, opt, dense_input(), lambda n: add(n[0], "weight", Negated()))


def test_spectral_normalised_layers_iterate_once_a_step_in_train_mode() -> None:
    net = dense_net().train()
    parametrizations.spectral_norm(net[0])
    reference = twin(net)
    opt = snncompile.optimize(net, T, schedule="breadth-first")
    assert torch.equal(opt(dense_input()), step_loop(reference, dense_input()))
    for (name, got), expected in zip(net.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(got, expected), name


# Distributed data parallel


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("schedule", ["depth-first", "breadth-first"])
def test_distributed_data_parallel_trains_as_the_step_loop_does(schedule: str) -> None:
    net = conv_net().train()
    reference = twin(net)
    parallel = nn.parallel.DistributedDataParallel(snncompile.optimize(net, T, schedule=schedule))
    optimisers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (parallel, reference)]
    for seed in range(2):
        x_seq = torch.rand(T, 5, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
        got, expected = parallel(x_seq), step_loop(reference, x_seq)
        torch.testing.assert_close(got, expected)
        for output, each, optimiser in zip((got, expected), (net, reference), optimisers, strict=True):
            optimiser.zero_grad()
            output.square().mean().backward()
            optimiser.step()
            functional.reset_net(each)
        for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(net[1].running_var, reference[1].running_var)
    assert_same_states(net, reference)
