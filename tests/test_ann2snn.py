"""Conversion: accuracy on real data, exact graph surgery, thresholds from all data, and refusals that say where."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from snncompile.ann2snn import VoltageScaler, convert
from snncompile.ann2snn.calibration import PercentileRange
from snncompile.errors import CaptureError
from snncompile.functional import reset_net
from snncompile.neuron import IFNode


def neurons(snn: nn.Module) -> dict[str, IFNode]:
    return {name.removesuffix(".neuron"): module for name, module in snn.named_modules() if isinstance(module, IFNode)}


def scale(snn: nn.Module, name: str) -> float:
    scaler = snn.get_submodule(f"{name}.scale_out")
    assert isinstance(scaler, VoltageScaler)
    return scaler.scale.item()


@torch.no_grad()
def mean_output(snn: nn.Module, x: Tensor, T: int) -> Tensor:
    """Rate decoding of a static input, [N, *] -> [N, *]."""
    reset_net(snn)
    total = snn(x)
    for _ in range(T - 1):
        total = total + snn(x)
    return total / T


def quiet(ann: nn.Module, calibration: Any, **options: Any) -> fx.GraphModule:
    return convert(ann, calibration, progress=False, **options)


@torch.no_grad()
def as_ann(snn: fx.GraphModule, x: Tensor) -> Tensor:
    """What the converted network computes if rates were perfect: it must equal the ANN."""
    restored = copy.deepcopy(snn)
    for name in neurons(snn):
        restored.add_submodule(name, nn.ReLU())
    return restored(x)


class Block(nn.Module):
    """Residual block with one ReLU module used at two places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class DigitsNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = Block(16)
        self.pool = nn.AvgPool2d(2)
        self.dropout = nn.Dropout(0.2)
        self.hidden = nn.Linear(16 * 16, 32)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.block(self.stem(x)))
        x = self.dropout(torch.flatten(x, 1))
        return self.head(F.relu(self.norm(self.hidden(x))))


def with_statistics(net: nn.Module, x: Tensor) -> nn.Module:
    """Batch norms with statistics other than their initial ones, and an affine part that does something."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(x)
    return net.eval()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits, 8x8: training images and labels, test images and labels."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1297], y[:1297], x[1297:], y[1297:]


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> nn.Module:
    x, y, _, _ = digits
    torch.manual_seed(0)
    net = DigitsNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(6):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net


@pytest.mark.parametrize("percentile", [100.0, 99.9])
def test_accuracy_on_digits(
    trained: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor], percentile: float
) -> None:
    x_train, y_train, x, y = digits
    batches = list(zip(x_train.split(200), y_train.split(200), strict=True))
    snn = quiet(trained, batches, percentile=percentile)
    trained.eval()
    ann_accuracy = (trained(x).argmax(1) == y).float().mean().item()
    outputs = mean_output(snn, x, T=64)
    assert ann_accuracy > 0.95
    assert (outputs.argmax(1) == y).float().mean().item() >= ann_accuracy - 0.02


def test_more_steps_come_closer(trained: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x_train, _, x, _ = digits
    snn = quiet(trained, x_train)
    expected = trained.eval()(x[:100]).detach()
    errors = [(mean_output(snn, x[:100], T) - expected).abs().mean().item() for T in (16, 64, 256)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_the_graph_is_the_ann_s(trained: nn.Module, digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x = digits[2][:20]
    snn = quiet(trained, x)
    torch.testing.assert_close(as_ann(snn, x), trained.eval()(x).detach(), rtol=1e-4, atol=1e-5)
    assert not any(
        isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d, nn.Dropout, nn.ReLU)) for module in snn.modules()
    )
    assert list(neurons(snn)) == ["stem.2", "block.relu", "block.relu_1", "relu"]
    assert isinstance(snn.get_submodule("block.conv2"), nn.Conv2d)
    assert not any(module.training for module in snn.modules())


def test_each_site_is_one_neuron_with_one_spike_scale() -> None:
    ann = nn.Sequential(nn.Identity(), nn.ReLU())
    snn = quiet(ann, torch.tensor([[-1.0, 0.5, 4.0]]))
    assert scale(snn, "1") == 4.0
    x = torch.tensor([[1.0, 2.0, 5.0, -1.0]])
    outputs = [snn(x) for _ in range(4)]
    # In units of s = 4: 1/4, 1/2 and 5/4 of a spike a step, and none.
    assert torch.cat(outputs).tolist() == [[0, 0, 4, 0], [0, 4, 4, 0], [0, 0, 4, 0], [4, 4, 4, 0]]
    assert snn.get_submodule("1.neuron").v.tolist() == [[0, 0, 1, -1]]


def test_a_relu_used_twice_gets_two_neurons() -> None:
    block = Block(3)
    snn = quiet(nn.Sequential(block, block), torch.randn(8, 3, 4, 4))
    found = neurons(snn)
    assert list(found) == ["0.relu", "0.relu_1", "0.relu_2", "0.relu_3"]
    assert len({id(neuron) for neuron in found.values()}) == 4
    # A convolution called twice keeps its own weights, so the batch norms behind it stay.
    assert torch.equal(snn.get_submodule("0.conv1").weight, block.conv1.weight)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in snn.modules()) == 2


def test_the_ann_is_left_alone() -> None:
    ann = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout()).train()
    state = copy.deepcopy(ann.state_dict())
    x = torch.randn(4, 2, 5, 5)
    before = x.clone()
    snn = quiet(ann, x)
    assert ann.training
    assert all(module.training for module in ann.modules())
    assert all(torch.equal(value, state[name]) for name, value in ann.state_dict().items())
    assert torch.equal(x, before)
    snn(x)
    assert not {id(p) for p in ann.parameters()} & {id(p) for p in snn.parameters()}


def test_calibration_data_is_not_changed_by_an_in_place_relu_on_it() -> None:
    x = torch.tensor([[-1.0, 2.0]])
    quiet(nn.ReLU(inplace=True), x)
    assert x.tolist() == [[-1.0, 2.0]]


class ReLUForm(nn.Module):
    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(x))


@pytest.mark.parametrize(
    "relu",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        lambda x: F.relu(x, inplace=True),
        lambda x: F.relu(x, True),
        F.relu_,
        torch.relu,
        torch.relu_,
        lambda x: x.relu(),
        lambda x: x.relu_(),
        lambda x: F.relu(input=x),
    ],
)
def test_every_form_of_relu(relu: Callable[[Tensor], Tensor]) -> None:
    ann, x = ReLUForm(relu), torch.randn(6, 4)
    snn = quiet(ann, x)
    (name,) = neurons(snn)
    assert name == "relu"
    expected = ann(x).detach()
    assert scale(snn, name) == pytest.approx(expected.max().item())
    torch.testing.assert_close(mean_output(snn, x, 200), expected, rtol=0, atol=scale(snn, name) / 100)


class InPlace(nn.Module):
    """What is changed in place is read again afterwards."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        before = y * 2
        z = self.change(y)
        return before + y + z * 3


@pytest.mark.parametrize(
    "change",
    [
        nn.ReLU(inplace=True),
        torch.relu_,
        lambda y: F.relu(y, True),
        lambda y: y.add_(1.0),
    ],
)
def test_readers_of_a_value_changed_in_place(change: Callable[[Tensor], Tensor]) -> None:
    ann, x = InPlace(change), torch.randn(5, 4)
    torch.testing.assert_close(as_ann(quiet(ann, x), x), ann(x).detach())


def test_an_in_place_flag_that_is_off_redirects_nobody() -> None:
    ann, x = InPlace(lambda y: F.relu(y, False)), torch.randn(5, 4)
    torch.testing.assert_close(as_ann(quiet(ann, x), x), ann(x).detach())


class Affine(nn.Module):
    """The vocabulary of affine operations, in modules, functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.max_pool = nn.MaxPool2d(2)
        self.adaptive = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        self.weight = nn.Parameter(torch.randn(3, 32))
        self.gate = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = torch.cat([x, F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=1)], dim=1)
        x = F.dropout(x, 0.5, self.training) + F.max_pool2d(x, 3, stride=1, padding=1)
        x = torch.add(x, x, alpha=0.5)
        x = x[:, ::2] - x[:, 1::2] / 2
        x = F.adaptive_avg_pool2d(self.adaptive(self.max_pool(x)), 2) * self.gate.sigmoid()
        left, right = x.chunk(2, dim=1)
        x = torch.stack([left, right], dim=1).view(x.size(0), -1)
        x = torch.cat([x, self.flatten(x.unsqueeze(1)).permute(0, 1)], 1).reshape(x.shape[0], 2 * x.shape[1])
        return F.linear(x, self.weight) + x.mean(1, keepdim=True)


def test_affine_operations_are_kept() -> None:
    ann, x = Affine().eval(), torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(as_ann(quiet(ann, x), x), ann(x).detach())


@pytest.mark.parametrize("dropout", [nn.Dropout(), nn.Dropout2d(), F.dropout, F.dropout2d, nn.Identity()])
def test_dropout_is_removed(dropout: Callable[[Tensor], Tensor]) -> None:
    # The functional forms are on by default, in eval mode too.
    snn = quiet(Nested(dropout), torch.randn(3, 4))
    assert [node.op for node in snn.graph.nodes] == ["placeholder", "call_module", "output"]
    assert [name for name, _ in snn.named_children()] == ["linear"]


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)], (6, 3, 9)),
        ([nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)], (6, 3, 7, 7)),
        ([nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4, affine=False)], (6, 3, 4, 4, 4)),
        ([nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)], (6, 5)),
    ],
    ids=["conv1d", "conv2d", "conv3d", "linear"],
)
def test_batch_norm_is_folded(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    ann = with_statistics(nn.Sequential(*layers, nn.ReLU()), x)
    snn = quiet(ann, x)
    assert not any("BatchNorm" in type(module).__name__ for module in snn.modules())
    torch.testing.assert_close(as_ann(snn, x), ann(x).detach(), rtol=1e-4, atol=1e-5)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(self.norm(y)) + y


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Conv2d(2, 3, 1))


@pytest.mark.parametrize(
    ("ann", "shape"),
    [
        (TwoReaders(), (6, 2, 3, 3)),
        # L = C = 4: the norm's features are the linear layer's batch, not its features.
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (6, 4, 5)),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 1)), nn.BatchNorm2d(3)), (6, 2, 3, 3)),
        (nn.Sequential(weight_normed(), nn.BatchNorm2d(3)), (6, 2, 3, 3)),
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False)), (6, 5)),
        (nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()), (6, 2, 3, 3)),
    ],
    ids=["two-readers", "linear-3d", "parametrized", "hooked", "linear-without-affine", "no-layer"],
)
def test_batch_norm_stays_where_it_cannot_be_folded(ann: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with_statistics(ann, x)
    snn = quiet(ann, x)
    assert any("BatchNorm" in type(module).__name__ for module in snn.modules())
    torch.testing.assert_close(as_ann(snn, x), ann(x).detach(), rtol=1e-4, atol=1e-5)


def test_names_do_not_collide() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.relu(F.relu(x)))

    snn = quiet(Clash(), torch.randn(4, 3))
    assert list(neurons(snn)) == ["relu_1", "relu_2"]
    assert isinstance(snn.relu, nn.Linear)


def test_thresholds_are_over_all_batches_and_forms_of_calibration_data() -> None:
    ann = nn.Sequential(nn.ReLU())
    batches = [torch.tensor([[1.0]]), torch.tensor([[7.0]]), torch.tensor([[3.0]])]
    labelled = [(batch, torch.zeros(1)) for batch in batches]

    def generated() -> Iterator[Tensor]:
        yield from batches

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(batches)), batch_size=2)
    for calibration in (batches, labelled, generated(), torch.cat(batches), loader, tuple(batches)):
        assert scale(quiet(ann, calibration), "0") == 7.0


@pytest.mark.parametrize("percentile", [0.01, 10.0, 50.0, 99.0, 99.9])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e5])
def test_percentile_of_the_positive_outputs(percentile: float, magnitude: float) -> None:
    # Growing batches make the histogram widen again and again; half of the values are negative and do not count.
    batches = [torch.randn(500, 4) * magnitude * 3.0**k for k in range(-4, 3)]
    snn = quiet(nn.Sequential(nn.ReLU()), batches, percentile=percentile)
    values = torch.cat(batches).flatten().double()
    positive = values[values > 0]
    expected = positive.quantile(percentile / 100).item()
    maximum = positive.max().item()
    # The definition of a quantile between two samples is a convention; the histogram adds one bin.
    gap = (positive.sort().values.diff().max() if percentile > 98 else positive.new_zeros(())).item()
    assert scale(snn, "0") == pytest.approx(expected, abs=maximum / 4096 + gap)


def test_percentile_does_not_depend_on_the_order_or_on_batches() -> None:
    values = torch.rand(1000) * torch.logspace(-3, 3, 1000)
    ascending, descending = PercentileRange(90.0), PercentileRange(90.0)
    for batch in values.split(10):
        ascending.observe(batch)
    descending.observe(values.flip(0))
    assert ascending.scale == descending.scale
    assert ascending.scale == pytest.approx(values.quantile(0.9).item(), abs=2 * values.max().item() / 4096)


def test_percentile_after_a_silent_batch_keeps_its_resolution() -> None:
    observed = PercentileRange(50.0)
    observed.observe(torch.zeros(5))
    observed.observe(torch.linspace(1e-6, 2e-6, 101))
    assert observed.scale == pytest.approx(1.5e-6, rel=2 / 101)


def test_percentile_100_is_the_maximum() -> None:
    x = torch.rand(1000, 1)
    observed = PercentileRange(100.0)
    observed.observe(x)
    assert scale(quiet(nn.Sequential(nn.ReLU()), x), "0") == observed.scale == x.max().item()


def test_a_silent_relu_warns_and_gets_scale_one() -> None:
    ann = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad():
        ann[0].bias.fill_(-100.0)
    for percentile in (100.0, 99.0):
        with pytest.warns(UserWarning, match="1 was never active on the calibration data") as caught:
            snn = quiet(ann, torch.rand(3, 2), percentile=percentile)
        assert caught[0].filename == __file__
        assert scale(snn, "1") == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_must_be_finite(value: float) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
            nn.init.constant_(self.body[0].weight, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    batches = [torch.ones(2, 1), torch.tensor([[1.0], [value]])]
    with pytest.raises(ValueError, match=rf"must be finite, got {value} at body\.1; check"):
        quiet(Named(), batches, percentile=99.0)


class Nested(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


@pytest.mark.parametrize(
    ("activation", "what", "where"),
    [
        (nn.GELU(), "GELU", "1.act"),
        (nn.SiLU(inplace=True), "SiLU", "1.act"),
        (nn.Sigmoid(), "Sigmoid", "1.act"),
        (nn.Tanh(), "Tanh", "1.act"),
        (nn.LeakyReLU(), "LeakyReLU", "1.act"),
        (nn.ELU(), "ELU", "1.act"),
        (nn.ReLU6(), "ReLU6", "1.act"),
        (nn.Softmax(1), "Softmax", "1.act"),
        (nn.LayerNorm(4), "LayerNorm", "1.act"),
        (nn.BatchNorm1d(4, track_running_stats=False), "BatchNorm1d", "1.act"),
        (F.gelu, "the function gelu", "1"),
        (torch.sigmoid, "the function sigmoid", "1"),
        (F.leaky_relu, "the function leaky_relu", "1"),
        (lambda x: x.tanh(), "the method tanh", "1"),
        (lambda x: x.softmax(1), "the method softmax", "1"),
        (lambda x: x * x, "the function mul", "1"),
        (lambda x: F.linear(x, x), "the function linear", "1"),
        (lambda x: x @ x.t(), "the method t", "1"),
        (lambda x: 1 / x, "the function truediv", "1"),
        (lambda x: x**2, "the function pow", "1"),
        (lambda x: x.mT.relu(), "the function getattr", "1"),
        (torch.abs, "the function abs", "1"),
    ],
)
def test_what_rates_cannot_carry_is_refused(activation: Callable[[Tensor], Tensor], what: str, where: str) -> None:
    ann = nn.Sequential(nn.Linear(4, 4), Nested(activation))
    with pytest.raises(CaptureError, match="supported are ReLU, conv") as caught:
        quiet(ann, torch.randn(4, 4))
    assert caught.value.where == where
    assert caught.value.message.startswith(what)
    assert "cannot be converted" in caught.value.message


def test_a_module_is_not_taken_for_a_method_of_its_name() -> None:
    ann = nn.Sequential()
    ann.add_module("size", nn.GELU())
    with pytest.raises(CaptureError, match="GELU"):
        quiet(ann, torch.randn(4, 4))


def test_refusal_at_the_top_names_the_network() -> None:
    with pytest.raises(CaptureError) as caught:
        quiet(Nested(F.silu), torch.randn(4, 4))
    assert caught.value.where == "Nested"


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_an_untraceable_network_names_the_module_and_keeps_the_cause() -> None:
    ann = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Branches()))
    with pytest.raises(CaptureError, match="cannot be traced") as caught:
        quiet(ann, torch.randn(4, 4))
    assert caught.value.where == "1.1"
    assert isinstance(caught.value.__cause__, fx.proxy.TraceError)
    with pytest.raises(CaptureError) as caught:
        quiet(Branches(), torch.randn(4, 4))
    assert caught.value.where == "Branches"


def test_one_input_only() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(CaptureError, match=r"Two takes 2 inputs \(x, y\), conversion needs exactly one"):
        quiet(Two(), torch.randn(4, 4))


class MustNotRun(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the network was run or traced")


@pytest.mark.parametrize(
    ("calibration", "options", "error", "message"),
    [
        (torch.ones(1, 1), {"percentile": 0.0}, ValueError, r"percentile must be in \(0, 100\], got 0.0"),
        (torch.ones(1, 1), {"percentile": 100.1}, ValueError, r"percentile must be in \(0, 100\], got 100.1"),
        (torch.ones(1, 1), {"percentile": math.nan}, ValueError, r"percentile must be in \(0, 100\], got nan"),
        (torch.ones(1, 1), {"percentile": "max"}, TypeError, "percentile must be a number, got str"),
        (torch.ones(1, 1), {"percentile": True}, TypeError, "percentile must be a number, got bool"),
        ([], {}, ValueError, "calibration has no batch"),
        (iter(()), {}, ValueError, "calibration has no batch"),
        (torch.ones(0, 1), {}, ValueError, r"batch 0 of the calibration data is empty, its shape is \(0, 1\)"),
        (3, {}, TypeError, "calibration must be a tensor or an iterable of batches, got int"),
        (
            [{"x": torch.ones(1)}],
            {},
            TypeError,
            "batch 0 of the calibration data must be a tensor or start with one, got",
        ),
        ([()], {}, TypeError, "must be a tensor or start with one, got tuple"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(
    calibration: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quiet(MustNotRun(), calibration, **options)


def test_a_bad_batch_later_on_is_named() -> None:
    with pytest.raises(TypeError, match="batch 1 of the calibration data must be a tensor"):
        quiet(nn.ReLU(), [torch.ones(1, 1), "x"])


def test_the_ann_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"ann must be a torch\.nn\.Module, got function"):
        quiet(lambda x: x, torch.ones(1, 1))


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda snn: pickle.loads(pickle.dumps(snn))], ids=["deep", "pickle"]
)
def test_the_result_is_copied_with_its_states(copy_of: Callable[[fx.GraphModule], fx.GraphModule]) -> None:
    x = torch.randn(5, 4)
    snn = quiet(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), x)
    snn(x)
    twin = copy_of(snn)
    assert torch.equal(twin(x), snn(x))
    assert torch.equal(twin.get_submodule("1.neuron").v, snn.get_submodule("1.neuron").v)


def test_scales_are_saved_and_move_with_the_network() -> None:
    x = torch.rand(5, 4)
    snn = quiet(nn.Sequential(nn.ReLU()), 2 * x)
    other = quiet(nn.Sequential(nn.ReLU()), x)
    other.load_state_dict(snn.state_dict())
    assert scale(other, "0") == 2 * x.max().item()
    assert set(snn.state_dict()) == {"0.scale_in.scale", "0.scale_out.scale"}
    snn.to(torch.float64)
    assert snn(x.double()).dtype == torch.float64


def test_a_double_precision_network() -> None:
    x = torch.randn(20, 4, dtype=torch.float64)
    ann = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).double()
    outputs = mean_output(quiet(ann, x), x, 100)
    assert outputs.dtype == torch.float64
    torch.testing.assert_close(outputs, ann(x).detach(), rtol=0, atol=ann(x).max().item() / 50)


@pytest.mark.gpu
def test_conversion_on_a_gpu() -> None:
    x = torch.randn(20, 4)
    ann = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).cuda()
    for percentile in (100.0, 99.0):
        snn = quiet(ann, x, percentile=percentile)
        assert {tensor.device.type for tensor in (*snn.parameters(), *snn.buffers())} == {"cuda"}
        assert snn(x.cuda()).device.type == "cuda"


def test_progress_bar_can_be_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    quiet(nn.ReLU(), torch.ones(1, 1))
    assert capsys.readouterr().err == ""
    convert(nn.ReLU(), [torch.ones(1, 1)] * 3)
    assert "3/3" in capsys.readouterr().err


def test_spikingjelly_s_conversion_gives_the_same_spikes() -> None:
    peer = pytest.importorskip("spikingjelly.activation_based.ann2snn")
    torch.manual_seed(1)
    ann = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(10, 1, 4, 4)
    recipe = peer.RateCodingRecipe(dataloader=[(x, torch.zeros(10))], mode="Max")
    theirs = peer.FXConverter(recipe).convert(copy.deepcopy(ann))
    ours = quiet(ann, x)
    for _ in range(20):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
