"""What token pruning leaves, at the end of a fit: printed and logged once, in the report where there is one."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_compress import CompressionReport, FinalizeCompression, TokenPruning
from lightning_compress.callbacks.token_calls import KEPT
from tests.callbacks.modules import trainer
from tests.callbacks.processes import in_processes, parallel
from tests.callbacks.test_token_pruning import Save
from tests.callbacks.token_modules import LENGTH, Reader, sentences

HEAD = "Tokens that stay by"
CLASSIFY = 16 * 2  # multiply-accumulates of the encoder beside its layers


def fit(*callbacks: pl.Callback, data: DataLoader | None = None, resume: Path | None = None, **options: Any) -> None:
    torch.manual_seed(0)
    own = trainer(*callbacks, **{"max_epochs": 6, **options})
    own.fit(Reader(), sentences() if data is None else data, ckpt_path=None if resume is None else str(resume))


def whole_sentences() -> DataLoader:
    """Nothing is padding, so that the report and the summary count the same."""
    data = sentences()
    for example in data.dataset:
        example["mask"][:] = True
    return data


def logged(folder: Path) -> list[str]:
    return (folder / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()


def test_alone_it_prints_and_logs_its_own_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = TokenPruning(macs=0.6)
    assert callback.summary is None
    fit(callback, logger=CSVLogger(tmp_path))
    found = callback.summary
    assert found is not None
    assert found.macs_kept == pytest.approx(callback.relative_macs, rel=1e-12)
    assert found.kept_per_layer == callback.kept_per_layer
    assert (found.policy, found.examples, found.dense_macs) == ("thresholds", 8 * KEPT, None)
    assert callback.policy is not None
    assert list(found.values) == callback.policy.state()["values"]
    assert capsys.readouterr().out.count(str(found)) == 1
    header, *rows = (line.split(",") for line in logged(tmp_path))
    for name, value in found.metrics().items():
        assert [float(row[header.index(name)]) for row in rows if row[header.index(name)]] == [value]


@pytest.mark.parametrize("reverse", [False, True])
def test_beside_structured_removal_it_is_in_the_report(
    reverse: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [TokenPruning(macs=0.6), FinalizeCompression(macs=0.5, at=0.5)]
    pruning, finalize = callbacks
    assert isinstance(pruning, TokenPruning) and isinstance(finalize, FinalizeCompression)
    fit(*(reversed(callbacks) if reverse else callbacks), data=whole_sentences(), logger=CSVLogger(tmp_path))
    report = finalize.report
    assert report is not None and report.tokens is not None
    assert report.tokens == pruning.summary
    assert report.tokens.tokens == LENGTH
    assert report.tokens.dense_macs is not None
    assert report.macs == (report.tokens.dense_macs + CLASSIFY, report.tokens.macs[0] + CLASSIFY)
    assert report.tokens.macs_kept == pytest.approx(0.6, rel=0.01)
    assert report.tokens.macs_kept_overall == pytest.approx(0.5 * 0.6, rel=0.03)
    assert CompressionReport.from_json(report.to_json()) == report
    assert capsys.readouterr().out.count(str(report.tokens)) == 1
    header, *rows = (line.split(",") for line in logged(tmp_path))
    place = header.index("token_pruning/macs_kept_overall")
    assert [float(row[place]) for row in rows if row[place]] == [report.tokens.macs_kept_overall]


def test_without_a_report_it_prints_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    pruning, finalize = TokenPruning(macs=0.6, method="top_k"), FinalizeCompression(macs=0.5, at=0.5, report=False)
    fit(finalize, pruning)
    assert finalize.report is None
    assert pruning.summary is not None
    assert pruning.summary.policy == "top_k"
    assert pruning.summary.macs_kept_overall is not None  # structures have gone all the same
    assert capsys.readouterr().out.count(str(pruning.summary)) == 1


def test_before_hard_decisions_there_is_nothing_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    pruning, finalize = TokenPruning(macs=0.6), FinalizeCompression(macs=0.5, at=0.3)
    with pytest.warns(UserWarning, match="thresholds are not calibrated"):
        fit(pruning, finalize, Stop())
    assert pruning.summary is None
    assert finalize.report is not None and finalize.report.tokens is None
    assert HEAD not in capsys.readouterr().out


def resumable(
    *more: pl.Callback, data: DataLoader | None = None, resume: Path | None = None
) -> tuple[TokenPruning, FinalizeCompression]:
    own = TokenPruning(macs=0.6), FinalizeCompression(macs=0.5, at=0.5)
    fit(*own, *more, data=data, resume=resume)
    return own


@pytest.mark.parametrize("epoch", [1, 5])  # before the removal, and after the thresholds are fixed
def test_straight_equals_crash_and_resume(epoch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight, finalize = resumable()
    with pytest.raises(RuntimeError, match="crash"):
        resumable(Save(tmp_path / "last.ckpt", epoch))
    capsys.readouterr()
    resumed, again = resumable(resume=tmp_path / "last.ckpt")
    assert resumed.summary == straight.summary
    assert resumed.summary is not None and resumed.summary.dense_macs is not None
    assert finalize.report is not None and again.report is not None
    assert again.report.tokens == finalize.report.tokens
    assert capsys.readouterr().out.count(HEAD) == 1


def test_the_dense_layers_are_remembered_between_the_removal_and_the_first_token_that_leaves(tmp_path: Path) -> None:
    data = whole_sentences()
    with pytest.raises(RuntimeError, match="crash"):
        resumable(Save(tmp_path / "last.ckpt", 3), data=data)
    resumed, finalize = resumable(data=data, resume=tmp_path / "last.ckpt")
    assert finalize.report is not None and resumed.summary is not None and resumed.summary.dense_macs is not None
    assert resumed.summary.dense_macs + CLASSIFY == finalize.report.macs[0]


def distributed(alone: bool) -> tuple[Any, ...]:
    pruning, finalize = TokenPruning(macs=0.6), FinalizeCompression(macs=0.5, at=0.4)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fit(pruning, *([] if alone else [finalize]), data=sentences(examples=96), **parallel())
    return pruning.summary, finalize.report, printed.getvalue().count(HEAD)


@pytest.mark.parametrize("alone", [True, False])
def test_all_processes_have_one_summary_and_the_first_prints_it(alone: bool) -> None:
    one, other = in_processes(distributed, alone)
    assert not isinstance(one, BaseException), one
    assert one[:2] == other[:2]
    assert (one[2], other[2]) == (1, 0)
    summary, report, _ = one
    assert summary.examples == 2 * 8 * KEPT  # the last batches of 8 examples in both
    assert alone or report.tokens == summary
