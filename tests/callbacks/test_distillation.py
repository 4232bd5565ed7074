"""The teacher's part of the loss, against the loss written out; and that nothing of it is left in the module."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import Distillation, FinalizeCompression, StructuredSparsity
from lightning_compress.callbacks.distillation import block_names
from tests.callbacks.modules import MLP, Classifier, Transformer, fit, loader


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum of p log(p / q) over classes, mean over examples, times T squared."""
    p, q = (torch.softmax(x / temperature, dim=-1) for x in (teacher, student))
    return (p * (p / q).log()).sum(-1).mean() * temperature**2


class Recorder(pl.Callback):
    """Losses as the Trainer sees them."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].detach())


def reference(
    student: nn.Module, teacher: nn.Module, alpha: float, temperature: float, hidden: float, sequences: bool
) -> list[Tensor]:
    """Losses of a loop that distils from a fixed teacher."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    teacher.eval()
    losses = []
    states: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
    for who, model in (("student", student), ("teacher", teacher)):
        for name in block_names(model):
            model.get_submodule(name).register_forward_hook(
                lambda m, a, o, who=who, name=name: states[who].update({name: o})
            )
    for x, y in loader(sequences):
        logits = student(x)
        with torch.no_grad():
            answer = teacher(x)
        loss = (1 - alpha) * F.cross_entropy(logits, y) + alpha * kl(logits, answer, temperature)
        if hidden:
            loss = loss + hidden * sum(
                ((states["student"][n] - states["teacher"][n]) ** 2).mean() for n in states["student"]
            ) / len(states["student"])
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize(("alpha", "temperature", "hidden"), [(0.5, 2.0, 0.0), (1.0, 4.0, 0.0), (0.3, 1.0, 0.7)])
def test_the_loss_is_the_mixture(alpha: float, temperature: float, hidden: float) -> None:
    torch.manual_seed(0)
    student, teacher = Transformer(), Transformer()
    copy = Transformer()
    copy.load_state_dict(student.state_dict())
    recorder = Recorder()
    distil = Distillation(alpha, temperature, hidden, teacher=teacher, module="model")
    fit(Classifier(student), distil, recorder, data=loader(True), max_epochs=1)
    for got, expected in zip(recorder.losses, reference(copy, teacher, alpha, temperature, hidden, True), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_teacher_is_the_model_when_sparsifying_begins() -> None:
    module = Classifier(Transformer())
    seen: dict[int, list[Tensor]] = {}
    teachers: dict[int, Any] = {}
    distil = Distillation()

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            seen[trainer.global_step] = [p.detach().clone() for p in pl_module.model.parameters()]

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            teachers[trainer.global_step] = distil.teacher

    fit(
        module,
        StructuredSparsity(start=0.2),
        FinalizeCompression(macs=0.5, report=False),
        distil,
        Look(),
        data=loader(True),
    )
    assert next(s for s, t in teachers.items() if t is not None) == 8  # 20 % of 40 steps
    teacher = teachers[8]
    assert teacher is teachers[40]  # one and the same, before and after the removal
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), seen[7], strict=True))
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert distil.teacher is None  # let go of after the fit


def test_alone_with_a_removal_the_dense_model_teaches_the_small_one() -> None:
    distil, sizes = Distillation(), {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            sizes[trainer.global_step] = (
                None if distil.teacher is None else sum(p.numel() for p in distil.teacher.parameters())
            )

    module = Classifier(MLP(24, 20))
    dense = sum(p.numel() for p in module.model.parameters())
    fit(module, FinalizeCompression(units=0.5, at=0.5, report=False), distil, Look(), max_epochs=2)
    assert sizes[7] is None
    assert sizes[8] == sizes[16] == dense


def test_the_teacher_is_no_part_of_the_module(tmp_path: Any) -> None:
    module = Classifier()
    names = set(module.state_dict())
    step = module.training_step
    states = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            states.append(set(pl_module.state_dict()))
            assert "training_step" in vars(pl_module)
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    trainer = fit(module, Distillation(teacher=MLP()), Look(), max_epochs=1)
    assert states == [names]
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert set(checkpoint["state_dict"]) == names
    assert sum(len(g["params"]) for g in trainer.optimizers[0].param_groups) == len(names)
    assert module.training_step == step
    assert "training_step" not in vars(module)


def test_the_step_is_given_back_after_an_error() -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, Distillation(teacher=MLP()))
    assert "training_step" not in vars(module)
    assert not module.model._forward_pre_hooks
    assert not module.model._forward_hooks


class Output(dict):
    """What models of some libraries return: a mapping with attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Wrapping(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.inner, self.wrap = MLP(), wrap

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.wrap(self.inner(x) * scale)


class Flexible(Classifier):
    """Returns a mapping from its step, calls its model with a keyword, and takes the logits out of whatever comes."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.model(batch[0], scale=2.0)
        logits = (
            out[0]
            if isinstance(out, tuple)
            else out
            if isinstance(out, Tensor)
            else out["logits"]
            if isinstance(out, Mapping)
            else out.logits
        )
        return {"loss": F.cross_entropy(logits, batch[1]), "extra": 1}


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (lambda x: x, {}),
        (lambda x: {"logits": x}, {}),
        (lambda x: Output(logits=x, loss=None), {}),
        (lambda x: SimpleNamespace(logits=x), {}),
        (lambda x: (x, 1), {"outputs": lambda out: out[0]}),
    ],
    ids=["tensor", "dict", "mapping", "object", "chosen"],
)
def test_outputs_of_many_kinds(wrap: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, teacher = Flexible(Wrapping(wrap), optimizer="sgd"), Wrapping(wrap)
    x, y = next(iter(loader()))
    own, other = module.model.inner(x) * 2, teacher.inner(x) * 2
    recorder = Recorder()
    fit(module, Distillation(0.5, 3.0, teacher=teacher, module="model", **options), recorder, max_epochs=1)
    torch.testing.assert_close(recorder.losses[0], (0.5 * F.cross_entropy(own, y) + 0.5 * kl(own, other, 3.0)).detach())


def test_a_tuple_needs_to_be_told_what_is_distilled() -> None:
    with pytest.raises(
        ValueError, match=r"'model' to return a tensor .* but got tuple. .*outputs=lambda output: output\[0\]"
    ):
        fit(Flexible(Wrapping(lambda x: (x, 1))), Distillation(teacher=Wrapping(lambda x: (x, 1)), module="model"))


def test_regression() -> None:
    torch.manual_seed(0)

    class Regression(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self.model(batch[0]), torch.zeros(8, 3))

    module, teacher = Regression(), MLP()
    x, _ = next(iter(loader()))
    own, other = module.model(x), teacher(x)
    recorder = Recorder()
    fit(module, Distillation(0.25, loss="mse", teacher=teacher), recorder, max_epochs=1)
    torch.testing.assert_close(
        recorder.losses[0], (0.75 * own.square().mean() + 0.25 * (own - other).square().mean()).detach()
    )


def test_the_first_step_is_distilled_though_the_module_is_not_known_before() -> None:
    torch.manual_seed(0)
    module = Classifier()
    recorder = Recorder()
    fit(
        module,
        StructuredSparsity(kinds=("ffn",), start=0.0, strength=0.1),
        Distillation(alpha=1.0),
        recorder,
        max_epochs=1,
    )
    # the teacher is the student itself: nothing to learn in the first step
    assert abs(float(recorder.losses[0])) < 1e-6
    assert float(recorder.losses[-1]) > 1e-6


def test_distillation_under_bf16_and_accumulation() -> None:
    module = Classifier(Transformer())
    fit(
        module,
        StructuredSparsity(start=0.0),
        FinalizeCompression(macs=0.5, report=False),
        Distillation(hidden=0.1),
        data=loader(True),
        precision="bf16-mixed",
        accumulate_grad_batches=2,
    )
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_blocks_are_the_members_of_outermost_lists() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(1, 1)])}) for _ in range(2))
    model.others = nn.ModuleList([nn.Linear(1, 1)])
    assert block_names(model) == ["layers.0", "layers.1", "others.0"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": 1.5}, ValueError, r"Expected alpha, .* to be in \[0, 1\], but got 1.5"),
        ({"temperature": 0.0}, ValueError, "Expected temperature to be above 0, but got 0.0"),
        ({"hidden": -1.0}, ValueError, "Expected hidden, .* to be at least 0, but got -1.0"),
        ({"loss": "kld"}, ValueError, "Expected loss to be 'kl' or 'mse', but got 'kld'"),
        ({"teacher": "bert"}, TypeError, "Expected teacher to be a torch.nn.Module, but got str"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Distillation(**arguments)


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OneLogit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Binary(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.model(batch[0])[:, 0], (batch[1] > 1).float())


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (
            Manual,
            [Distillation(teacher=MLP())],
            "Expected automatic optimization for Distillation, but Manual optimizes manually",
        ),
        (Classifier, [Distillation()], r"Add one, or pass a trained module: Distillation\(teacher=...\)"),
        (
            lambda: Binary(OneLogit()),
            [Distillation(teacher=OneLogit(), module="model")],
            "Expected logits of two classes or more",
        ),
        (
            Classifier,
            [Distillation(teacher=nn.Linear(5, 4), module="model")],
            r"to have one shape, but got \(8, 3\) and \(8, 4\)",
        ),
        (Classifier, [Distillation(teacher=MLP(), hidden=1.0, module="model")], None),
        (
            Classifier,
            [Distillation(teacher=MLP()), Distillation(loss="mse", teacher=MLP())],
            "Use one Distillation in a Trainer",
        ),
    ],
    ids=["manual", "no teacher", "one class", "shapes", "no blocks", "two"],
)
def test_bad_fits(module: Any, callbacks: list[pl.Callback], message: str | None) -> None:
    if message is None:
        message = "Expected repeated blocks"
    with pytest.raises(ValueError, match=message):
        fit(module(), *callbacks)
