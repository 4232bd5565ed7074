import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.structures import ShimEdit
from lightning_compress.surgery import SurgeryError
from lightning_compress.surgery.shim import BUFFERS, GatherInput, ScatterOutput, find_shim, place_shim, shims_of
from lightning_compress.surgery.slicing import cut, repair

KEPT = torch.tensor([0, 3, 4])


def scattered(layer: nn.Linear, kept: Tensor = KEPT, **native: tuple[Tensor, tuple[int, ...]]) -> nn.Linear:
    size = layer.out_features
    cut(layer.weight, {0: kept})
    cut(layer.bias, {0: kept})
    repair(layer)
    edit = ShimEdit("layer", "output", -1)
    place_shim(layer, edit, parameter="weight", axis=0, size=size, kept=kept, native=native)
    return layer


def gathered(layer: nn.Linear, kept: Tensor = KEPT) -> nn.Linear:
    size = layer.in_features
    cut(layer.weight, {1: kept})
    repair(layer)
    place_shim(layer, ShimEdit("layer", "input", -1), parameter="weight", axis=1, size=size, kept=kept, native={})
    return layer


def test_scatter_writes_the_output_into_zeros() -> None:
    layer, x = nn.Linear(2, 5), torch.randn(3, 7, 2)
    expected = layer(x) * torch.tensor([1, 0, 0, 1, 1])
    small = scattered(copy.deepcopy(layer))
    assert small.weight.shape == (3, 2)
    torch.testing.assert_close(small(x), expected)
    assert repr(small) == "Linear(in_features=2, out_features=3, bias=True)"


def test_gather_reads_the_kept_positions() -> None:
    layer, x = nn.Linear(5, 2), torch.randn(3, 7, 5)
    with torch.no_grad():
        layer.weight[:, [1, 2]] = 0
    small = gathered(copy.deepcopy(layer))
    torch.testing.assert_close(small(x), layer(x))
    torch.testing.assert_close(small(input=x), layer(x))  # as a keyword argument, too


def test_convolution_channels() -> None:
    layer, x = nn.Conv2d(2, 5, 3), torch.randn(3, 2, 6, 6)
    expected = layer(x) * torch.tensor([1, 0, 0, 1, 1]).view(5, 1, 1)
    cut(layer.weight, {0: KEPT})
    cut(layer.bias, {0: KEPT})
    repair(layer)
    place_shim(layer, ShimEdit("layer", "output", -3), parameter="weight", axis=0, size=5, kept=KEPT, native={})
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[0]), expected[0])  # unbatched


def test_gradients_flow_and_parameters_train() -> None:
    layer = scattered(nn.Linear(2, 5))
    layer(torch.randn(3, 2)).square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.shape == (3, 2) and layer.weight.grad.any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_shimmed_layer_can_be_copied(copied) -> None:  # type: ignore[no-untyped-def]
    layer, x = scattered(nn.Linear(2, 5)), torch.randn(3, 2)
    twin = copied(layer)
    torch.testing.assert_close(twin(x), layer(x))
    with torch.no_grad():
        twin.weight.zero_()
        twin.bias.zero_()
    assert not twin(x).any() and layer(x).any()


def test_torch_save_of_the_whole_layer() -> None:
    layer, x, buffer = gathered(nn.Linear(5, 2)), torch.randn(3, 5), io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), layer(x))


def test_positions_follow_the_module_but_stay_out_of_its_state_dict() -> None:
    layer = scattered(nn.Linear(2, 5)).to(torch.bfloat16)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert dict(layer.named_buffers())[BUFFERS["output"]].dtype == torch.int64
    assert layer(torch.randn(3, 2).bfloat16()).dtype == torch.bfloat16
    assert layer.to("meta").get_buffer(BUFFERS["output"]).device.type == "meta"


def test_hooks_of_the_users_see_the_original_width() -> None:
    layer, seen = nn.Linear(2, 5), []
    layer.register_forward_hook(lambda _m, _a, output: seen.append(output.shape[-1]))
    scattered(layer)(torch.randn(3, 2))
    assert seen == [5]


def test_a_second_removal_updates_the_one_hook() -> None:
    layer, x = nn.Linear(2, 5), torch.randn(3, 2)
    expected = layer(x) * torch.tensor([1, 0, 0, 0, 1])
    scattered(layer)
    scattered(layer, torch.tensor([0, 2]))  # of the kept 0, 3, 4
    assert len(layer._forward_hooks) == 1 and layer.weight.shape == (2, 2)
    torch.testing.assert_close(layer(x), expected)
    consumer = gathered(gathered(nn.Linear(5, 2)), torch.tensor([0, 2]))
    assert len(consumer._forward_pre_hooks) == 1
    assert consumer.get_buffer(BUFFERS["input"]).tolist() == [0, 4]


# Two heads of three dims: position = 3 * head + dim
HEAD = torch.tensor([0, 0, 0, 1, 1, 1])


def test_heads_that_go_natively_narrow_the_interface() -> None:
    layer, x = nn.Linear(2, 6), torch.randn(4, 2)
    wide = layer(x)
    # dims 0 and 2 stay (shim), head 1 stays (native): rows 3 and 5
    scattered(layer, torch.tensor([3, 5]), head=(HEAD, (1,)))
    expected = torch.stack([wide[:, 3], torch.zeros(4), wide[:, 5]], -1)
    torch.testing.assert_close(layer(x), expected)


def test_heads_can_go_after_the_dims() -> None:
    layer, x = nn.Linear(2, 6), torch.randn(4, 2)
    wide = layer(x)
    scattered(layer, torch.tensor([0, 2, 3, 5]), head=(HEAD, (0, 1)))  # dim 1 of both heads goes
    assert layer(x).shape == (4, 6)
    # rows are now head 0 dims 0, 2 and head 1 dims 0, 2; head 0 goes
    scattered(layer, torch.tensor([2, 3]), head=(torch.tensor([0, 0, 1, 1]), (1,)))
    torch.testing.assert_close(layer(x), torch.stack([wide[:, 3], torch.zeros(4), wide[:, 5]], -1))
    # units were numbered anew: the one head that is left is head 0
    shim = find_shim(layer, "output")
    assert shim is not None and shim.owners["head"].tolist() == [0, 0, 0] and shim.width == 3


def test_a_native_removal_that_the_shim_does_not_know_is_refused() -> None:
    layer = scattered(nn.Linear(2, 6), torch.tensor([0, 2, 3, 5]))
    with pytest.raises(SurgeryError, match="Expected 'head' to be known to the output shim of 'layer'"):
        scattered(layer, torch.tensor([2, 3]), head=(torch.tensor([0, 0, 1, 1]), (1,)))


def test_a_structure_that_loses_nothing_need_not_be_known() -> None:
    layer = scattered(nn.Linear(2, 6), torch.tensor([0, 2, 3, 5]))
    scattered(layer, torch.tensor([0, 2]), head=(torch.tensor([0, 0, 1, 1]), (0, 1)))
    assert layer(torch.randn(1, 2)).shape == (1, 6)


def test_shims_are_found() -> None:
    layer = gathered(scattered(nn.Linear(5, 5)))
    assert [(side, type(shim)) for side, shim in shims_of(layer)] == [("output", ScatterOutput), ("input", GatherInput)]
    assert shims_of(nn.Linear(1, 1)) == []


def test_the_first_tensor_of_a_tuple_is_scattered() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> tuple[None, Tensor, float]:  # type: ignore[override]
            return None, super().forward(x), 0.5

    nothing, made, scale = scattered(Scaled(3, 5))(torch.randn(2, 3))
    assert nothing is None and scale == 0.5 and made.shape == (2, 5)
    assert not made[:, [1, 2]].any() and made[:, KEPT].all()


def test_a_call_without_a_tensor_is_an_error() -> None:
    layer = gathered(nn.Linear(5, 2))
    with pytest.raises(TypeError, match="Expected a tensor among the inputs of Linear"):
        layer()
