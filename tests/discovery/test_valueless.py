"""Models on the meta device and under FakeTensorMode: found is what is found on real weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_compress.analysis import discover
from lightning_compress.budget import make_plan
from lightning_compress.discovery import trace_structures, valueless
from lightning_compress.plan import PruningPlan
from lightning_compress.structures import Structures
from lightning_compress.surgery import SurgeryError, apply_plan
from tests.zoo import DECODER, MODELS, SEQUENCE, Example

X = torch.randn(3, 4)


def same(a: Structures, b: Structures) -> bool:
    return (
        list(a) == list(b)
        and (a.weight_macs, a.activation_macs, a.params) == (b.weight_macs, b.activation_macs, b.params)
        and a.pinned == b.pinned
    )


def on_meta(example: Example) -> nn.Module:
    with torch.device("meta"):
        return example.build().eval()


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


def meta_mlp() -> nn.Module:
    with torch.device("meta"):
        return mlp()


KINDS_OF_MODELS = ("nn.Transformer", "depthwise CNN", "ResNet", "LSTM", "BERT", "GPT-2", "Llama", "T5", "BART", "Swin")


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_the_same_is_found_on_meta(name: str) -> None:
    example = MODELS[name]
    expected = trace_structures(example.model(), example.args, example.kwargs)
    assert same(trace_structures(on_meta(example), example.args, example.kwargs), expected)


@pytest.mark.parametrize("name", ["BERT", "Llama", "Swin", "LSTM"])
def test_inputs_may_be_on_meta_or_fake_too(name: str) -> None:
    example = MODELS[name]
    expected = trace_structures(example.model(), example.args, example.kwargs)
    args = tuple(tensor.to("meta") for tensor in example.args)
    kwargs = {key: v.to("meta") if isinstance(v, Tensor) else v for key, v in (example.kwargs or {}).items()}
    assert same(trace_structures(on_meta(example), args, kwargs), expected)

    with FakeTensorMode() as mode:
        model = example.build().eval()
        args = tuple(mode.from_tensor(tensor) for tensor in example.args)
        kwargs = {key: mode.from_tensor(v) if isinstance(v, Tensor) else v for key, v in (example.kwargs or {}).items()}
        fake = trace_structures(model, args, kwargs)
        real_inputs = trace_structures(model, example.args, example.kwargs)  # these keep their values
    assert same(fake, expected) and same(real_inputs, expected)
    assert same(trace_structures(model, example.args, example.kwargs), expected)


def test_tables_are_real_where_the_caller_makes_meta_tensors() -> None:
    with torch.device("meta"):
        found = trace_structures(mlp(), (X,))
    assert found[0].slices[0].indices.tolist() == [[u] for u in range(8)]
    with FakeTensorMode():
        found = trace_structures(mlp(), (X,))
    assert found[0].slices[0].indices.tolist() == [[u] for u in range(8)]


def test_the_model_is_left_as_it_was() -> None:
    example = MODELS["LSTM"]
    model = on_meta(example)
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    flat = [id(weight) for weight in model.lstm._flat_weights]
    trace_structures(model, example.args)
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == before
    assert {id(tensor): name for name, tensor in model.named_parameters()} == names
    assert [id(weight) for weight in model.lstm._flat_weights] == flat
    assert all(tensor.is_meta for tensor in model.parameters())


class ReadsData(nn.Module):
    """Two weights of one shape, read behind autograd's back: only their storages tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6, 4))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x @ self.a.data.t()) + (x @ self.b.data.t())[..., :2]


def test_weights_without_an_address_are_not_confused() -> None:
    expected = trace_structures(ReadsData(), (X,))
    assert [s.parameters for s in expected] == [("a", "out.weight")]
    with torch.device("meta"):
        model = ReadsData()
    assert same(trace_structures(model, (X,)), expected)


class ReadsValues(nn.Module):
    """The forward asks how large an activation is, and for which rows a router decides."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.router = mlp(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if bool((y > 1e9).any()):
            return y * 0
        chosen = self.router(x).argmax(-1)
        for expert in range(2):
            (rows,) = torch.where(chosen == expert)
            y = y.index_add(0, rows, y[rows])
        return y


def test_values_that_nobody_knows_are_made_up_with_a_warning() -> None:
    with torch.device("meta"):
        model = ReadsValues()
    with pytest.warns(UserWarning, match=r"reads values that they decide \(_local_scalar_dense\).*were all ones"):
        trace_structures(model, (X,))


def test_a_router_decides_which_experts_run() -> None:
    def build() -> nn.Module:
        import transformers

        config = transformers.MixtralConfig(**DECODER, num_local_experts=4)
        config._experts_implementation = "eager"
        return transformers.MixtralForCausalLM(config)

    example = Example(build, (), MODELS["Llama"].kwargs)
    expected = trace_structures(example.model(), kwargs=example.kwargs)
    with pytest.warns(UserWarning, match="nonzero"):
        assert list(trace_structures(on_meta(example), kwargs=example.kwargs)) == list(expected)


def test_what_cannot_do_without_values_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(valueless, "LARGEST_GUESS", 0)
    with torch.device("meta"):
        model = ReadsValues()
    with pytest.raises(ValueError, match=r"to run without values.*but _local_scalar_dense does not.*on real weights"):
        trace_structures(model, (X,))
    assert all(tensor.is_meta for tensor in model.parameters())


@torch.library.custom_op("lightning_compress_tests::half", mutates_args=())
def half(x: Tensor) -> Tensor:
    return x / 2


class CallsCustomOperation(nn.Module):
    """An operation of somebody's own that only says what it does to real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = mlp(), mlp()
        self.link = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(half(self.link(self.first(x))))


def test_an_operation_without_a_description_runs_on_made_up_values() -> None:
    expected = trace_structures(CallsCustomOperation(), (X,))
    assert [s.units for s in expected] == [8, 2, 8]
    with torch.device("meta"):
        model = CallsCustomOperation()
    with pytest.warns(UserWarning, match="half"):
        assert same(trace_structures(model, (X,)), expected)


def test_a_wrong_call_fails_as_it_does_with_weights() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        trace_structures(mlp(), (torch.randn(3, 5),))
    with pytest.raises(RuntimeError, match=r"must have same reduction dim|shapes"):
        trace_structures(meta_mlp(), (torch.randn(3, 5),))


class WritesInPlace(nn.Module):
    """Activations are written into a tensor that the forward makes on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(3, 8, device="cpu")
        hidden[:] = self.up(x)
        hidden += self.up(x)
        return self.down(hidden)


def test_real_tensors_may_be_written_into() -> None:
    expected = trace_structures(WritesInPlace(), (X,))
    with torch.device("meta"):
        model = WritesInPlace()
    assert same(trace_structures(model, (X,)), expected)


def test_proof_and_verification_need_weights() -> None:
    model = meta_mlp()
    with pytest.raises(SurgeryError, match=r"weights with values for the proof.*'0.weight' has none.*3 others.*verify"):
        discover(model, (X,), prove=True)
    plan = make_plan(model, discover(model, (X,)), units=0.5, scores={"ffn": torch.arange(8.0)})
    assert plan.kept["ffn"] == (4, 5, 6, 7)
    with pytest.raises(SurgeryError, match="weights with values for verification"):
        apply_plan(model, plan, verify=((X,), {}))
    with pytest.raises(SurgeryError, match="no way to remove 'ffn' is known yet"):
        apply_plan(model, plan, unverified=True)


@pytest.mark.parametrize("importance", ["norm", "taylor"])
def test_scores_of_weights_need_weights(importance: str) -> None:
    model = meta_mlp()
    with pytest.raises(ValueError, match=rf"to score units by '{importance}', but '0.weight' has none.*scores="):
        make_plan(model, discover(model, (X,)), units=0.5, importance=importance)


@pytest.mark.parametrize("name", ["nn.TransformerEncoder", "packed attention, literal sizes"])
def test_a_proven_plan_is_replayed_on_meta(name: str) -> None:
    example = MODELS[name]
    model = example.model()
    structures = discover(model, example.args, prove=True)
    plan = PruningPlan.of(model, structures, {s.name: range(0, s.units, 2) for s in structures})
    apply_plan(model, plan, unverified=True)
    small = on_meta(example)
    apply_plan(small, plan, unverified=True)
    small.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(small(SEQUENCE), model(SEQUENCE))
