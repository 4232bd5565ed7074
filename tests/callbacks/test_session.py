"""Which module is traced, with which example, and what the callbacks of a fit share."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import FinalizeCompression, StructuredSparsity
from lightning_compress.callbacks.example import ExampleCall, smallest_example, undisturbed
from lightning_compress.callbacks.session import CompressionSession
from tests.callbacks.modules import MLP, Classifier, Transformer, fit, loader, trainer


class WithForward(Classifier):
    """The step calls the module itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Parts(Classifier):
    """The step calls two sub-modules, one after the other."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3))
        self.encoder = MLP(30, 20)
        self.encoder.layers[4] = nn.Linear(20, 4)
        self.unused = nn.Linear(1000, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(self.encoder(batch[0])), batch[1]) + 0 * self.unused.bias.sum()


class Keywords(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(x=batch[0]), batch[1])


class Direct(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model.forward(batch[0]), batch[1])


def session_after(lightning_module: pl.LightningModule, **options: Any) -> CompressionSession:
    finalize = FinalizeCompression(units=0.5, at=0.5, kinds=("ffn",), report=False, **options)
    fit(lightning_module, finalize, max_epochs=1)
    assert finalize._session is not None
    return finalize._session


@pytest.mark.parametrize(
    ("module", "options", "name"),
    [
        (Classifier, {}, "model"),
        (WithForward, {}, ""),
        (WithForward, {"module": "model"}, "model"),
        (Keywords, {}, "model"),
        (lambda: Classifier(nn.Sequential(MLP())), {"module": "model.0"}, "model.0"),
    ],
    ids=["child", "itself", "named", "keywords", "deep"],
)
def test_the_traced_module(module: Any, options: dict[str, Any], name: str) -> None:
    lightning_module = module()
    session = session_after(lightning_module, **options)
    assert session.traced_name == name
    assert session.traced is (lightning_module.get_submodule(name) if name else lightning_module)
    assert session.structures is not None
    prefix = "" if name else "model."
    assert session.structures[0].parameters[0].startswith(f"{prefix}layers")


class Late(Classifier):
    """Makes its model when the strategy is there."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = nn.Sequential(MLP())


def test_a_module_that_is_made_in_configure_model_can_be_named() -> None:
    lightning_module = Late()
    assert session_after(lightning_module, module="model.0").traced is lightning_module.model[0]
    with pytest.raises(ValueError, match=r"dotted name of a sub-module of Late, but got 'model.1'.*mean 'model.0'"):
        session_after(Late(), module="model.1")


def test_the_example_is_the_call_before_hooks_of_the_user() -> None:
    lightning_module, seen = Classifier(), []
    lightning_module.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]) or (args[0] + 100,))
    finalize = FinalizeCompression(units=0.5, at=1.0, kinds=("ffn",), report=False)

    class Looks(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            batch = finalize._session.batch
            if batch is not None:
                assert torch.equal(batch.args[0], seen[0])
                self.looked = True

    looks = Looks()
    fit(lightning_module, finalize, looks, max_epochs=1)
    assert looks.looked


def test_the_largest_part_is_traced_and_the_others_are_named() -> None:
    with pytest.warns(UserWarning, match=r"trace the sub-module 'encoder'.*\['model'\] are left whole.*module='model'"):
        assert session_after(Parts()).traced_name == "encoder"


def test_a_module_that_is_never_called_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Expected a step of Direct to call itself or one of its sub-modules .* module='model'"
    ):
        session_after(Direct())
    with pytest.raises(ValueError, match="Expected a step of Direct to call model"):
        session_after(Direct(), module="model")


def test_a_compiled_child_is_traced_through_its_original() -> None:
    module = Classifier()
    module.model = torch.compile(module.model, backend="eager")
    session = session_after(module)
    assert session.traced is module.model._orig_mod
    assert module.model.layers[0].out_features + module.model.layers[2].out_features == 11


def test_the_sanity_check_gives_the_example() -> None:
    module, finalize = Classifier(Transformer()), FinalizeCompression(units=0.5, report=False)
    seen: list[int] = []

    class Look(pl.Callback):
        def on_train_start(self, t: pl.Trainer, pl_module: pl.LightningModule) -> None:
            session = finalize._session
            assert session is not None and session.structures is not None and session.example is not None
            seen.extend([session.batch.size, session.example.size])  # type: ignore[union-attr, list-item]
            assert not any(a.is_inference() for a in session.example.args)
            assert pl_module.training

    data = loader(sequences=True)
    trainer(finalize, Look()).fit(module, data, data)
    assert seen == [8, 2]


def test_sessions_are_let_go_of() -> None:
    module = Classifier()
    session = session_after(module)
    assert session.example is None
    assert not module.model._forward_pre_hooks
    other = session_after(Classifier())
    assert other is not session


def test_examples_are_independent_of_what_happens_to_their_tensors() -> None:
    with torch.inference_mode():
        x = torch.ones(4, 2)
        call = ExampleCall.copied((x, {"y": x[:, 0]}), {"flag": True})
        x.zero_()
    assert call.args[0].sum() == 8
    assert call.args[1]["y"].sum() == 4
    assert not call.args[0].is_inference()
    assert call.kwargs == {"flag": True}


@pytest.mark.parametrize(
    ("sizes", "narrow"),
    [((8, 8), 2), ((8,), 2), ((2,), None), ((8, 4), None), ((), None)],
    ids=["two tensors", "one", "small already", "different", "none"],
)
def test_narrowing_needs_one_leading_size(sizes: tuple[int, ...], narrow: int | None) -> None:
    call = ExampleCall(tuple(torch.zeros(n, 3) for n in sizes), {"scale": torch.tensor(2.0)}).narrowed(2)
    assert (None if call is None else call.size) == narrow


def test_a_module_that_refuses_a_narrow_batch_gets_all_of_it() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(8, -1)

    call = ExampleCall((torch.zeros(8, 3),))
    assert smallest_example(Fixed(), call) is call
    assert smallest_example(nn.Linear(3, 1), call).size == 2


def test_modes_and_random_numbers_are_left_alone() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()).eval())
    state = torch.get_rng_state()
    with undisturbed(module):
        assert not module.training
        torch.rand(3)
    assert module.training and module[0].training and not module[1].training
    assert torch.equal(torch.get_rng_state(), state)


def test_kinds_of_all_callbacks_are_discovered() -> None:
    module = Classifier(Transformer())
    finalize = FinalizeCompression(units=0.5, kinds=("ffn",), report=False)
    fit(module, StructuredSparsity(kinds=("head",)), finalize, data=loader(sequences=True))
    assert finalize.plan is not None
    assert {s.kind for s in finalize.plan.structures} == {"head", "ffn"}
