"""Notices when torch moves or changes one of its private interfaces that snncompile relies on."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from snncompile import torch_private


@pytest.mark.parametrize("name", torch_private.__all__)
def test_name_exists(name: str) -> None:
    assert getattr(torch_private, name) is not None


def test_fake_tensors_have_shapes_devices_and_storage_sizes_but_no_data() -> None:
    mode = torch_private.fake_mode()
    twin = torch_private.fake_twin(mode, torch.zeros(3, 4))
    with mode:
        result = twin @ twin.T
    assert isinstance(result, torch_private.FakeTensor)
    assert (result.shape, result.device.type) == ((3, 3), "cpu")
    assert result.untyped_storage().nbytes() == 36
    assert result.untyped_storage().device.type == "meta"


def test_storage_key_is_shared_by_views_and_by_nothing_else() -> None:
    tensor = torch.zeros(4)
    other = torch.zeros(4)
    assert torch_private.storage_key(tensor) == torch_private.storage_key(tensor.view(2, 2))
    assert torch_private.storage_key(tensor) != torch_private.storage_key(other)


def test_hooks_on_what_autograd_saves_may_be_forbidden() -> None:
    assert torch_private.may_hook_saved_tensors()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not torch_private.may_hook_saved_tensors()


def test_a_storage_is_finalised_when_its_last_tensor_goes() -> None:
    tensor = torch.zeros(4)
    freed: list[bool] = []
    weakref.finalize(tensor.untyped_storage(), freed.append, True)
    view = tensor[1:]
    del tensor
    assert not freed
    del view
    assert freed


def test_dispatch_mode_sees_every_operation_backward_included() -> None:
    class Names(torch_private.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.zeros(2, requires_grad=True)
    with Names() as seen:
        y = x.sigmoid().sum()
        y.backward()
    assert {"sigmoid.default", "sigmoid_backward.default"} <= set(seen.names)
    with Names() as outer, torch_private.no_modes():
        torch.zeros(2).sigmoid()
    assert not outer.names


def test_schemas_tell_randomness_and_writes() -> None:
    assert torch.Tag.nondeterministic_seeded in torch.ops.aten.bernoulli_.float.tags
    assert torch.Tag.nondeterministic_seeded not in torch.ops.aten.relu_.default.tags
    written = [
        a.alias_info is not None and a.alias_info.is_write for a in torch.ops.aten.relu_.default._schema.arguments
    ]
    assert written == [True]


def test_batch_norm_operations_say_whether_they_train() -> None:
    names = {argument.name for argument in torch.ops.aten.native_batch_norm.default._schema.arguments}
    assert "training" in names


def test_module_keeps_what_the_optimised_module_shares() -> None:
    assert {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"} <= set(vars(nn.Module()))


def test_addcmul_in_order_reads_what_it_wrote_before_in_one_operation() -> None:
    results = torch.zeros(4, 3).unbind()
    half = torch.full((3,), 0.5)
    torch_private.addcmul_in_order(results, (torch.ones(3), *results[:-1]), [half] * 4)
    assert torch.stack(results)[:, 0].tolist() == [0.5, 0.25, 0.125, 0.0625]


@pytest.mark.skipif(not torch_private.packs_convolutions(), reason="torch was built without oneDNN")
def test_a_convolution_by_a_packed_weight_is_the_convolution_channels_last() -> None:
    x, convolution = torch.randn(2, 4, 5, 5), nn.Conv2d(4, 6, 3)
    settings = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
    with torch.no_grad():
        packed = torch_private.packed_weight(convolution.weight.detach(), x.shape, *settings)
        result = torch_private.packed_convolution(x, packed, convolution.bias, *settings)
        torch.testing.assert_close(result, convolution(x), rtol=0.0, atol=1e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_writes_are_counted_but_for_tensors_of_inference_mode() -> None:
    tensor = torch.zeros(2)
    before = torch_private.writes_to(tensor)
    tensor.add_(1.0)
    assert torch_private.writes_to(tensor) > before
    with torch.inference_mode():
        assert torch_private.writes_to(torch.zeros(2)) == 0
