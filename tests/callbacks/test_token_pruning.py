"""Token pruning in a fit: its stages, its budget, what it composes with, and what it refuses."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_compress import (
    Distillation,
    FinalizeCompression,
    StructuredSparsity,
    TokenPruning,
    apply_plan,
    discover,
    load_from_checkpoint,
    make_plan,
)
from lightning_compress.callbacks.example import ExampleCall
from lightning_compress.callbacks.token_calls import KEPT
from lightning_compress.token_policies import Thresholds, TopK
from lightning_compress.tokens.install import token_runtime
from lightning_compress.tokens.runtime import TokenRuntime
from tests.callbacks.modules import MLP, Classifier, Save, trainer
from tests.callbacks.processes import in_processes, parallel
from tests.callbacks.token_modules import Encoder, Reader, sentences


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    own = trainer(*callbacks, **{"max_epochs": 6, **options})
    own.fit(module, sentences())
    return own


def runtime_of(module: Any) -> TokenRuntime:
    runtime = token_runtime(module.model)
    assert runtime is not None
    return runtime


class Diary(pl.Callback):
    """What holds in every step."""

    def __init__(self, callback: TokenPruning) -> None:
        self.callback = callback
        self.stages: list[str] = []
        self.temperatures: list[float] = []
        self.straight: list[bool] = []
        self.thresholds: list[tuple[float, ...]] = []
        self.metrics: dict[str, float] = {}

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.stages.append(self.callback.stage)
        runtime = token_runtime(pl_module.model)
        if runtime is not None and runtime.soft is not None:
            assert isinstance(runtime.soft.temperature, Tensor)
            assert self.callback._learner is not None
            self.temperatures.append(float((runtime.soft.temperature / self.callback._learner.scales)[-1]))
            self.straight.append(runtime.soft.straight_through)
            self.thresholds.append(tuple(runtime.soft.thresholds.tolist()))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.metrics.update({k: float(v) for k, v in trainer.callback_metrics.items()})


def test_thresholds_are_learned_fixed_and_the_budget_is_met() -> None:
    module = Reader()
    step = module.training_step
    callback = TokenPruning(macs=0.6)
    diary = Diary(callback)
    own = fit(module, callback, diary)
    assert diary.stages == ["before"] + ["soft"] * 31 + ["hard"] * 16  # the first step shows what is called
    assert diary.temperatures == sorted(diary.temperatures, reverse=True)
    assert diary.temperatures[-1] == pytest.approx(0.1, rel=0.1)
    assert diary.straight == [False] * 6 + [True] * 25  # from a fifth of the soft stage on
    # from where hardly any token is touched up to where the budget is met
    assert all(first < last for first, last in zip(diary.thresholds[0], diary.thresholds[-1], strict=True))
    runtime = runtime_of(module)
    assert [runtime.mode, runtime.train_mode, runtime.soft] == ["gather", "gather", None]
    assert isinstance(callback.policy, Thresholds)
    assert callback.policy.among_rest
    assert callback.relative_macs == pytest.approx(0.6, rel=0.01)
    assert callback.relative_macs <= 0.6
    kept = callback.kept_per_layer
    assert kept is not None
    assert kept[0] == 1.0
    assert kept[0] >= kept[1] >= kept[2] > 0
    assert callback.distribution is not None
    assert callback.distribution.entering.shape == (3, 8 * KEPT)
    assert len(callback.distribution.kept_per_example) == 8 * KEPT
    assert {"token_pruning/macs", "token_pruning/temperature", "token_pruning/threshold_1"} <= set(diary.metrics)
    assert module.training_step == step
    assert "training_step" not in vars(module)
    own.validate(module, sentences(seed=2), verbose=False)
    assert runtime.counts is not None
    assert float(runtime.counts.entering[1:].sum()) < float(runtime.counts.real.sum()) * 2


@pytest.mark.parametrize(("method", "kind"), [("top_k", TopK), ("linear", Thresholds)])
def test_baselines_are_hard_from_the_start(method: Any, kind: type) -> None:
    callback = TokenPruning(macs=0.795, method=method)
    diary = Diary(callback)
    fit(Reader(), callback, diary)
    assert diary.stages == ["before"] + ["hard"] * 47
    assert isinstance(callback.policy, kind)
    assert callback.relative_macs == pytest.approx(0.795, rel=0.01)


def test_faithful_is_as_published() -> None:
    callback = TokenPruning(mode="faithful", strength=0.1)
    module, soft = Reader(Encoder(layers=4)), []

    class Look(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
            runtime = token_runtime(pl_module.model)
            if runtime is not None and runtime.soft is not None:
                soft.append(runtime.soft)
                first.append(runtime.soft.thresholds.tolist())

    first: list[list[float]] = []
    fit(module, callback, Look())
    assert not any(s.cumulative or s.straight_through for s in soft)
    assert [s.temperature.tolist() for s in soft] == [pytest.approx([0.128] * 3)] * len(soft)
    assert not any(s.among_rest for s in soft)
    assert first[0] == pytest.approx([-1e4, 0.32, 0.64])
    assert [row[0] for row in first] == [-1e4] * len(first)  # the first layer lets every token through
    assert first[1][1] != first[0][1]
    assert callback.stage == "hard"
    assert callback.relative_macs is not None  # measured, and left as it came out


def test_a_greater_strength_prunes_more() -> None:
    macs = []
    for strength in (0.0, 10.0):
        torch.manual_seed(0)
        callback = TokenPruning(strength=strength, learning_rate=0.1)
        fit(Reader(), callback)
        assert callback.relative_macs is not None
        macs.append(callback.relative_macs)
    assert macs[1] < macs[0] - 0.1


def test_thresholds_are_no_parameters_of_the_module_and_move_with_real_steps_only() -> None:
    callback = TokenPruning(strength=5.0)
    diary = Diary(callback)
    module = Reader()
    names = set(module.state_dict())
    fit(module, callback, diary, accumulate_grad_batches=4, gradient_clip_val=1e-6)
    assert set(module.state_dict()) == names
    # 2 steps an epoch in 4 epochs; the last one is followed by the hard stage
    assert len(set(diary.thresholds)) == 8
    assert abs(diary.thresholds[-1][1] - diary.thresholds[0][1]) > 0.1  # not clipped with the weights


def test_protected_tokens_stay() -> None:
    callback = TokenPruning(macs=0.49, protected_mask="keep", method="top_k")
    module = Reader()
    fit(module, callback)
    runtime = runtime_of(module)
    assert runtime.protected_mask is None
    batch = next(iter(sentences()))
    runtime.protected_mask = batch["keep"]
    module.eval()
    module.model(batch["ids"], batch["mask"])
    assert runtime.counts is not None
    assert (runtime.counts.layers_of_tokens()[batch["keep"]] == 3).all()


def test_tokens_are_pruned_after_structures_are_removed() -> None:
    callback = TokenPruning(macs=0.6)
    diary = Diary(callback)
    module = Reader()
    finalize = FinalizeCompression(macs=0.5, at=0.5, report=False)
    fit(module, callback, StructuredSparsity(start=0.0), finalize, Distillation(), diary)
    assert diary.stages == ["before"] * 24 + ["soft"] * 16 + ["hard"] * 8
    assert finalize.plan is not None
    assert module.model.layers[0].up.out_features < 48
    assert callback.relative_macs == pytest.approx(0.6, rel=0.01)


def test_a_teacher_that_is_copied_late_sees_all_tokens() -> None:
    distillation, seen = Distillation(), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if distillation.teacher is not None:
                seen.append((token_runtime(pl_module.model) is None, token_runtime(distillation.teacher) is None))

    sparsity = StructuredSparsity(strength=1e-4, start=0.5)
    fit(Reader(), TokenPruning(macs=0.6), distillation, sparsity, Look())
    assert set(seen) == {(False, True)}


def test_distillation_and_token_pruning_wrap_one_step() -> None:
    losses = []
    for reverse in (False, True):
        torch.manual_seed(0)
        module = Reader()
        teacher = Encoder()
        own: list[pl.Callback] = [TokenPruning(macs=0.6), Distillation(teacher=teacher, hidden=0.1)]
        fit(module, *(reversed(own) if reverse else own))
        assert token_runtime(teacher) is None
        losses.append(module.losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Expected a target, macs or strength, but got none"),
        ({"macs": 0.0}, r"in \(0, 1\], but got 0.0"),
        ({"macs": 0.5, "strength": 0.1}, "the target sets the strength"),
        ({"strength": -1.0}, "to be at least 0, got -1.0"),
        ({"macs": 0.5, "method": "topk"}, "'learned', 'top_k' or 'linear', but got 'topk'"),
        ({"macs": 0.5, "mode": "paper"}, "'recommended' or 'faithful', but got 'paper'"),
        ({"strength": 0.5, "method": "top_k"}, "because nothing is learned"),
        ({"macs": 0.5, "start": 1.0}, r"to be in \[0, 1\), but got 1.0"),
        ({"macs": 0.5, "start": 0.5, "hard_at": 0.4}, "a fraction of the fit after start=0.5"),
        ({"macs": 0.5, "learning_rate": 0.0}, "to be above 0, but got 0.0"),
        ({"macs": 0.5, "temperature": (0.1, 0.0)}, r"two numbers above 0, first and last, but got \(0.1, 0.0\)"),
        ({"macs": 0.5, "min_keep": 0}, "at least 1, but got 0"),
        ({"macs": 0.5, "fill": "zero"}, r"Expected fill to be None or one of \['state', 'mean'\], but got 'zero'"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenPruning(**options)


def test_a_fit_without_a_stack_is_refused_at_the_first_batch() -> None:
    module = Classifier(MLP())
    with pytest.raises(ValueError, match="no attention"):
        trainer(TokenPruning(macs=0.5)).fit(module, torch.utils.data.DataLoader([(torch.randn(5), 1)] * 4, 2))
    assert "training_step" not in vars(module)


def test_tokens_before_the_last_removal_are_refused() -> None:
    with pytest.raises(ValueError, match=r"start=0.2\) and FinalizeCompression\(at=0.5\), which is at 0.50"):
        fit(Reader(), TokenPruning(macs=0.5, start=0.2), FinalizeCompression(macs=0.5, at=0.5))
    with pytest.raises(ValueError, match=r"got hard_at=0.4 and a start at 0.5"):
        fit(Reader(), TokenPruning(macs=0.5, hard_at=0.4), FinalizeCompression(macs=0.5, at=0.5))


def test_manual_optimization_is_refused() -> None:
    class Manual(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match="automatic optimization for TokenPruning, but Manual"):
        fit(Manual(), TokenPruning(macs=0.5))


def test_a_second_one_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected one TokenPruning in a Trainer, but got two"):
        fit(Reader(), TokenPruning(macs=0.5), TokenPruning(macs=0.6))


def test_a_batch_without_the_protected_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="a tensor under 'span', the protected_mask of TokenPruning, but got"):
        fit(Reader(), TokenPruning(macs=0.5, protected_mask="span"))


def test_a_budget_below_what_stays_anyway_is_told() -> None:
    with pytest.warns(UserWarning, match="Expected token pruning to meet macs=0.2 within 1 %"):
        fit(Reader(), TokenPruning(macs=0.2, method="top_k"))


def test_a_fit_that_ends_early_says_so() -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    with pytest.warns(UserWarning, match="thresholds are not calibrated"):
        fit(Reader(), TokenPruning(macs=0.6), Stop())


def test_a_fit_that_breaks_off_in_the_soft_stage_leaves_the_module_as_it_was() -> None:
    class Crash(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            raise RuntimeError("crash")

    module = Reader()
    with pytest.raises(RuntimeError, match="crash"):
        fit(module, TokenPruning(macs=0.6), Crash())
    assert token_runtime(module.model) is None
    assert "training_step" not in vars(module)


# from half on, and with a removal there, the checkpoint lies between the moment and the first step with pruned tokens
@pytest.mark.parametrize(
    ("options", "removes", "epoch"),
    [
        *(({"method": method}, False, epoch) for epoch in (1, 3, 4, 5) for method in ("learned", "top_k")),
        *(({"method": method, "start": 0.5}, False, 3) for method in ("learned", "top_k")),
        ({}, True, 3),
    ],
)
def test_straight_equals_crash_and_resume(options: dict[str, Any], removes: bool, epoch: int, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"

    def run(*more: pl.Callback, resume: Path | None = None) -> tuple[Reader, TokenPruning]:
        torch.manual_seed(0)
        module, callback = Reader(), TokenPruning(macs=0.6, hard_at=0.62, **options)
        removal = [FinalizeCompression(macs=0.5, at=0.5, report=False)] if removes else []
        own = trainer(callback, *removal, *more, max_epochs=6)
        own.fit(module, sentences(), ckpt_path=None if resume is None else str(resume))
        return module, callback

    straight, callback = run()
    with pytest.raises(RuntimeError, match="crash"):
        run(Save(path, epoch))
    resumed, again = run(resume=path)
    assert again.policy == callback.policy
    assert again.relative_macs == callback.relative_macs
    for (name, one), (_, other) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)


def test_a_checkpoint_is_loaded_and_tested_with_its_token_pruning(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    callback, module = TokenPruning(macs=0.6, protected=(0, 1), min_keep=2), Reader()
    fit(module, callback, FinalizeCompression(macs=0.5, at=0.3, report=False), Save(path, 6))
    batch = next(iter(sentences(seed=3)))
    module.eval()
    expected = module.model(batch["ids"], batch["mask"])

    loaded = load_from_checkpoint(Reader, path)
    assert runtime_of(loaded).policy == callback.policy
    assert (runtime_of(loaded).protected, runtime_of(loaded).min_keep) == ((0, 1), 2)
    assert torch.equal(loaded.eval().model(batch["ids"], batch["mask"]), expected)

    fresh = Reader()
    for _ in range(2):  # the second time it has one already
        own = [TokenPruning(macs=0.6, protected=(0, 1), min_keep=2), FinalizeCompression(macs=0.5, at=0.3)]
        trainer(*own).test(fresh, sentences(seed=3), ckpt_path=str(path), verbose=False)
        assert torch.equal(fresh.eval().model(batch["ids"], batch["mask"]), expected)
        assert "on_load_checkpoint" not in vars(fresh)


def test_structures_are_found_and_removed_with_all_tokens() -> None:
    module = Reader()
    fit(module, TokenPruning(macs=0.6, method="top_k"), max_epochs=2)
    batch = next(iter(sentences()))
    example = ExampleCall.copied((batch["ids"], batch["mask"]), {})
    calls: list[int] = []
    runtime = runtime_of(module)
    original = runtime.policy.keep

    class Counting:
        layers, accumulated = None, False

        def keep(self, *args: Any) -> Tensor:
            calls.append(1)
            return original(*args)

    runtime.policy = Counting()  # type: ignore[assignment]
    structures = discover(module.model, example.args, kinds=("head", "ffn"), prove=True)
    plan = make_plan(module.model, structures, macs=0.5)
    report = apply_plan(module.model, plan, verify=(example.args, {}))
    assert not calls
    assert (report.error or 0.0) < 1e-10
    module.eval().model(*example.args)
    assert len(calls) == 2  # and on they go


def distributed() -> tuple[Any, ...]:
    torch.manual_seed(0)
    module, callback = Reader(), TokenPruning(macs=0.6)
    diary = Diary(callback)
    trainer(callback, diary, **parallel(), max_epochs=6).fit(module, sentences(examples=96))
    return callback.policy, callback.relative_macs, diary.thresholds[-1], [p.sum().item() for p in module.parameters()]


def test_all_processes_have_one_set_of_thresholds() -> None:
    one, other = in_processes(distributed)
    assert not isinstance(one, BaseException), one
    assert one == other
    assert one[1] == pytest.approx(0.6, rel=0.01)
