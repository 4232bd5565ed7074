import pytest
import torch
from torch import nn

from lightning_compress.surgery.slicing import cut, is_torch_layer, owners_of, repair, select


def test_select_keeps_positions_on_several_axes() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    kept = {0: torch.tensor([1]), 2: torch.tensor([0, 3])}
    assert select(tensor, kept).tolist() == [[[12.0, 15.0], [16.0, 19.0], [20.0, 23.0]]]
    assert tensor.shape == (2, 3, 4)


def test_select_without_axes_is_the_same_data() -> None:
    tensor = torch.arange(3.0)
    assert select(tensor, {}).data_ptr() == tensor.data_ptr()


def test_channels_last_weights_stay_channels_last() -> None:
    weight = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    small = select(weight, {0: torch.tensor([0, 2, 5])})
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(small, weight[[0, 2, 5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cut_keeps_the_parameter_object_its_dtype_and_cuts_the_gradient(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.arange(6.0).reshape(3, 2).to(dtype))
    parameter.grad = torch.arange(6.0, 12.0).reshape(3, 2).to(dtype)
    same = parameter
    cut(parameter, {0: torch.tensor([0, 2])})
    assert same is parameter and parameter.dtype == dtype and parameter.requires_grad and parameter.is_leaf
    assert parameter.tolist() == [[0, 1], [4, 5]]
    assert parameter.grad is not None and parameter.grad.tolist() == [[6, 7], [10, 11]]
    (parameter * 2).sum().backward()  # autograd accepts the new shape
    assert parameter.grad.tolist() == [[8, 9], [12, 13]]


def test_cut_can_leave_the_gradient_alone() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    cut(parameter, {0: torch.tensor([1])}, gradient=False)
    assert parameter.shape == (1,) and parameter.grad.shape == (3,)


def test_owners_of_a_tied_weight_are_all_its_modules() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    found = owners_of(dict(model.named_modules()), [model["a"].weight])
    assert [path for path, _ in found] == ["a", "b"]


KEEP = torch.tensor([0, 2])
LAYERS = {
    "linear out": (lambda: nn.Linear(5, 4), {"weight": {0: KEEP}, "bias": {0: KEEP}}, (3, 5), (3, 2)),
    "linear in": (lambda: nn.Linear(4, 5), {"weight": {1: KEEP}}, (3, 2), (3, 5)),
    "convolution": (
        lambda: nn.Conv2d(4, 6, 3, padding=1),
        {"weight": {0: KEEP, 1: KEEP}, "bias": {0: KEEP}},
        (1, 2, 5, 5),
        (1, 2, 5, 5),
    ),
    "depthwise convolution": (
        lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
        {"weight": {0: KEEP}, "bias": {0: KEEP}},
        (1, 2, 5, 5),
        (1, 2, 5, 5),
    ),
    "depthwise convolution with two outputs per channel": (
        lambda: nn.Conv1d(3, 6, 3, padding=1, groups=3),
        {"weight": {0: torch.tensor([0, 1, 4, 5])}, "bias": {0: torch.tensor([0, 1, 4, 5])}},
        (1, 2, 7),
        (1, 4, 7),
    ),
    "grouped convolution, fewer inputs in every group": (
        lambda: nn.Conv2d(8, 4, 1, groups=2),
        {"weight": {1: torch.tensor([1, 3])}},
        (1, 4, 5, 5),
        (1, 4, 5, 5),
    ),
    "transposed convolution": (
        lambda: nn.ConvTranspose2d(4, 6, 2, stride=2),
        {"weight": {0: KEEP, 1: torch.tensor([1, 2, 5])}, "bias": {0: torch.tensor([1, 2, 5])}},
        (1, 2, 3, 3),
        (1, 3, 6, 6),
    ),
    "batch norm": (
        lambda: nn.BatchNorm2d(4),
        {name: {0: KEEP} for name in ("weight", "bias", "running_mean", "running_var")},
        (3, 2, 4, 4),
        (3, 2, 4, 4),
    ),
    "batch norm without weights": (
        lambda: nn.BatchNorm1d(4, affine=False),
        {name: {0: KEEP} for name in ("running_mean", "running_var")},
        (3, 2),
        (3, 2),
    ),
    "group norm": (
        lambda: nn.GroupNorm(2, 4),
        {"weight": {0: torch.tensor([2, 3])}, "bias": {0: torch.tensor([2, 3])}},
        (3, 2, 5),
        (3, 2, 5),
    ),
    "layer norm": (lambda: nn.LayerNorm(4), {"weight": {0: KEEP}, "bias": {0: KEEP}}, (3, 2), (3, 2)),
    "rms norm": (lambda: nn.RMSNorm(4), {"weight": {0: KEEP}}, (3, 2), (3, 2)),
    "prelu": (lambda: nn.PReLU(4), {"weight": {0: KEEP}}, (3, 2, 5), (3, 2, 5)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_cut_layer_runs_and_reports_its_new_sizes(case: str) -> None:
    build, cuts, input_shape, output_shape = LAYERS[case]
    layer = build()
    for name, kept in cuts.items():
        cut(getattr(layer, name), kept)
    repair(layer)
    assert layer(torch.randn(input_shape)).shape == output_shape
    fresh = eval(f"nn.{layer!r}", {"nn": nn})  # what it says of itself
    shapes = {name: tensor.shape for name, tensor in layer.state_dict().items()}
    assert {name: tensor.shape for name, tensor in fresh.state_dict().items() if name in shapes} == shapes
    repair(layer)  # repairing twice changes nothing
    assert layer(torch.randn(input_shape)).shape == output_shape


def test_embedding_and_bilinear_sizes() -> None:
    table = nn.Embedding(10, 4)
    cut(table.weight, {1: KEEP})
    repair(table)
    assert (table.num_embeddings, table.embedding_dim) == (10, 2)
    bilinear = nn.Bilinear(4, 5, 3)
    cut(bilinear.weight, {1: KEEP})
    repair(bilinear)
    assert bilinear(torch.randn(2, 2), torch.randn(2, 5)).shape == (2, 3)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(kind: type[nn.RNNBase], gates: int) -> None:
    layer = kind(3, 4, batch_first=True)
    rows = torch.cat([KEEP + 4 * gate for gate in range(gates)])
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        cut(getattr(layer, name), {0: rows, 1: KEEP} if name == "weight_hh_l0" else {0: rows})
    repair(layer)
    assert layer.hidden_size == 2 and layer(torch.randn(2, 5, 3))[0].shape == (2, 5, 2)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projected_lstm() -> None:
    layer = nn.LSTM(3, 5, proj_size=4)
    cut(layer.weight_hr_l0, {0: KEEP})
    cut(layer.weight_hh_l0, {1: KEEP})
    repair(layer)
    assert (layer.hidden_size, layer.proj_size) == (5, 2)
    assert layer(torch.randn(6, 1, 3))[0].shape == (6, 1, 2)


def test_modules_of_somebody_s_own_are_not_torch_layers() -> None:
    class Mine(nn.Linear):
        pass

    assert is_torch_layer(nn.Linear(1, 1)) and not is_torch_layer(Mine(1, 1))
    layer = Mine(4, 3)
    cut(layer.weight, {1: KEEP})
    repair(layer)
    assert layer.in_features == 2  # but a subclass of one is repaired like it
