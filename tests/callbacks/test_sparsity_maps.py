"""Maps drawn in fits: when, where they go, and that training does not notice."""

from __future__ import annotations

import json
import logging
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    FinalizeCompression,
    ModelMaps,
    QuantizationAwareTraining,
    SparsityMaps,
    StructuredSparsity,
    TokenPruning,
)
from lightning_compress.callbacks import sparsity_maps
from lightning_compress.callbacks.map_sinks import COLUMNS
from tests.callbacks.modules import Classifier, Save, Transformer, fit, loader, trainer
from tests.callbacks.processes import in_processes, parallel
from tests.callbacks.test_overhead import Clock
from tests.callbacks.token_modules import Reader, sentences

pytest.importorskip("matplotlib", reason="needs the extra `report`")
pytest.importorskip("jinja2", reason="needs the extra `report`")

BEGIN, BEFORE, AFTER, END = "begin of the fit", "before removal", "after removal", "end of the fit"


class Validated(Classifier):
    """Logs an accuracy that falls with the epochs, so that it can be told which is which."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.model(batch[0])
        self.log("accuracy", 1.0 / (1 + self.current_epoch))


def module() -> Validated:
    torch.manual_seed(0)
    return Validated(Transformer())


def run(own: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Five epochs of eight steps."""
    return fit(own, *callbacks, data=loader(sequences=True), **options)


def moments(callback: SparsityMaps) -> list[tuple[str, int]]:
    return [(name, maps.step) for name, maps in callback.history.moments]


def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays are made, pictures are not: they take most of the time of these tests."""
    monkeypatch.setattr(sparsity_maps, "draw_maps", lambda maps: {})


def test_alone_it_shows_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = SparsityMaps(every=7, max_overhead=1e9, html=False, folder=tmp_path)
    run(module(), maps, max_epochs=1)
    assert moments(maps) == [(BEGIN, 0), (END, 8)]
    assert maps.history.steps == [0, 7, 8]
    assert maps.report_path is None
    kinds = ("bits", "blocks", "heads", "layers", "norms")
    drawn = [f"{n:03d}_step{step}_{kind}.png" for n, step in enumerate(maps.history.steps) for kind in kinds]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*drawn, "maps.json"])
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    records = json.loads((tmp_path / "maps.json").read_text(encoding="utf-8"))
    assert [(r["moment"], r["step"]) for r in records] == [(BEGIN, 0), (None, 7), (END, 8)]
    last = ModelMaps.from_dict(records[-1])
    assert last.to_dict() == maps.history.moments[-1][1].to_dict()
    assert {u.kind for u in last.structures} >= {"head", "ffn"}
    # another fit replaces its files, and no others
    (tmp_path / "007_own.png").touch()
    undrawn(monkeypatch)
    run(module(), SparsityMaps(every=99, html=False, folder=tmp_path), max_epochs=1)
    assert len(json.loads((tmp_path / "maps.json").read_text(encoding="utf-8"))) == 2
    assert [path.name for path in tmp_path.glob("*.png")] == ["007_own.png"]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("validated", [False, True])
def test_beside_a_removal_the_model_thins_out(
    reverse: bool, validated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn(monkeypatch)
    maps, finalize = (
        SparsityMaps(every=100, html=False, folder=tmp_path),
        FinalizeCompression(macs=0.4, at=0.6, rounds=2),
    )
    callbacks = [maps, StructuredSparsity(start=0.1), finalize]
    own, data = module(), loader(sequences=True)
    dense = {n: p.detach().clone() for n, p in own.model.named_parameters()}
    trainer(*(reversed(callbacks) if reverse else callbacks)).fit(own, data, data if validated else None)
    names, steps = zip(*moments(maps), strict=True)
    assert names == (BEGIN, BEFORE, AFTER, BEFORE, AFTER, END)
    removals = [r.step for r in finalize.report.rounds] if finalize.report is not None else []
    assert steps == (0, removals[0], removals[0], removals[1], removals[1], 40)
    assert maps.history.removals == removals
    begin, before, after, again, last, end = (m for _, m in maps.history.moments)
    assert begin.sparsity == sum(int((w == 0).sum()) for w in dense.values() if w.dim() > 1) == 0
    assert {m.name: m.shape for m in begin.matrices} == {m.name: m.shape for m in end.matrices}
    assert before.sparsity > 0 and before.removed == 0  # driven to zero, and there
    assert 0 < after.removed == again.removed < last.removed == end.removed
    # every unit that was removed is gone, at its place, and no other
    plan = finalize.plan
    assert plan is not None
    for units in end.structures:
        kept = plan.kept.get(units.name, range(units.units))
        assert torch.nonzero(~units.norms.isnan()).reshape(-1).tolist() == list(kept)
    left = sum(p.numel() for p in own.model.parameters() if p.dim() > 1)
    total = sum(w.numel() for w in dense.values() if w.dim() > 1)
    assert end.removed == pytest.approx(1 - left / total)


def test_the_report_has_the_whole_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)
    maps, finalize = SparsityMaps(every=100), FinalizeCompression(macs=0.4, at=0.6)
    data = loader(sequences=True)
    trainer(maps, StructuredSparsity(), finalize, default_root_dir=tmp_path).fit(module(), data, data)
    assert maps.report_path == tmp_path / "sparsity_maps" / "report.html"
    text = maps.report_path.read_text(encoding="utf-8")
    assert finalize.report is not None
    for number in (finalize.report.error, *finalize.report.params, finalize.report.rounds[0].after.seconds):  # type: ignore[union-attr]
        assert f'value="{number}"' in text
    accuracy = maps.history.metrics["accuracy"]
    assert accuracy == [(8 * (n + 1), pytest.approx(1 / (n + 1))) for n in range(5)]
    assert all(f"<h3>{name}" in text for name in (BEGIN, BEFORE, AFTER, END))
    assert str(tmp_path) not in text


def outcome(*callbacks: pl.Callback) -> tuple[dict[str, Tensor], Tensor, Any, list[float]]:
    """Weights, random states and losses of a fit with random numbers in it."""
    torch.manual_seed(0)
    random.seed(0)
    own = module()
    own.model = nn.Sequential(own.model, nn.Dropout(0.3))
    run(own, *callbacks, max_epochs=2)
    return own.state_dict(), torch.get_rng_state(), random.getstate(), own.losses


@pytest.mark.parametrize("beside", [False, True])
def test_training_is_left_as_it_is(beside: bool, tmp_path: Path) -> None:
    def others() -> list[pl.Callback]:
        return [StructuredSparsity(), FinalizeCompression(macs=0.4, at=0.6, report=False)] if beside else []

    weights, state, other_state, losses = outcome(*others())
    maps = SparsityMaps(every=9, max_overhead=1e9, folder=tmp_path, html=not beside)
    found, found_state, found_other, found_losses = outcome(maps, *others())
    assert len(maps.history.steps) >= 3
    assert losses == found_losses
    assert found.keys() == weights.keys() and all(torch.equal(found[n], weights[n]) for n in weights)
    assert torch.equal(state, found_state) and other_state == found_other


def test_gradients_modes_and_hooks_are_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)
    own = module()
    own.model.blocks[0].eval()

    class Look(pl.Callback):
        seen: list[Any]

        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            grads = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
            self.seen.append(([m.training for m in pl_module.modules()], grads))

    before, after = Look(), Look()
    before.seen, after.seen = [], []
    run(own, before, SparsityMaps(every=1, max_overhead=1e9, html=False, folder=tmp_path), after, max_epochs=1)
    for (modes, grads), (other_modes, other_grads) in zip(before.seen, after.seen, strict=True):
        assert modes == other_modes
        assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True) if a is not None)
    assert not any(m._forward_pre_hooks for m in own.modules())


@pytest.mark.parametrize("epoch", [2, 4])  # before and after the removal
def test_a_resumed_fit_tells_the_whole_story(epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)

    def callbacks(folder: str) -> tuple[SparsityMaps, list[pl.Callback]]:
        maps = SparsityMaps(every=6, max_overhead=1e9, html=False, folder=tmp_path / folder)
        return maps, [StructuredSparsity(), FinalizeCompression(macs=0.4, at=0.6, report=False), maps]

    data = loader(sequences=True)
    straight, own = callbacks("straight")
    trainer(*own).fit(module(), data, data)
    _, own = callbacks("broken")
    with pytest.raises(RuntimeError, match="crash"):
        trainer(*own, Save(tmp_path / "last.ckpt", epoch)).fit(module(), data, data)
    resumed, own = callbacks("broken")
    trainer(*own).fit(module(), data, data, ckpt_path=str(tmp_path / "last.ckpt"))
    again = ("fit resumed", 8 * epoch)
    assert [m for m in moments(resumed) if m != again] == moments(straight)
    assert again in moments(resumed)
    assert resumed.history.metrics["accuracy"] == straight.history.metrics["accuracy"]
    assert resumed.history.removals == straight.history.removals == [24]
    assert resumed.history.moments[-1][1].to_dict() == straight.history.moments[-1][1].to_dict()
    records = json.loads((tmp_path / "broken" / "maps.json").read_text(encoding="utf-8"))
    assert [r["step"] for r in records] == resumed.history.steps


def test_bits_and_tokens_of_the_callbacks_beside_it(tmp_path: Path) -> None:
    maps = SparsityMaps(every=100, html=False, folder=tmp_path)
    pruning = TokenPruning(macs=0.6, method="top_k")
    quantize = QuantizationAwareTraining("int8", start=0.5, backend="packed")
    own = Reader()
    trainer(quantize, pruning, maps, max_epochs=3).fit(own, sentences())
    begin, end = (m for _, m in maps.history.moments)
    assert {m.bits for m in begin.matrices} == {32}
    bits = {m.name: m.bits for m in end.matrices}
    assert bits["layers.0.up.weight"] == bits["layers.2.o.weight"] == 8  # packed by now
    assert bits["places.weight"] == 32
    assert end.tokens == pruning.summary and end.tokens is not None
    assert end.structures and not any(u.dead or u.removed for u in end.structures)
    assert [path for path in tmp_path.iterdir() if path.name.endswith("_tokens.png")]


def test_it_draws_less_often_where_that_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch takes a second, the pictures ten: once in 50 batches is 20 %."""
    clock = Clock()

    def slow(maps: ModelMaps) -> dict[str, Any]:
        clock.now += 10
        return {}

    class Tick(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            clock.now += 1

    monkeypatch.setattr(sparsity_maps, "draw_maps", slow)
    maps = SparsityMaps(every=5, max_overhead=0.2, html=False, folder=tmp_path)
    maps._clock = clock
    with caplog.at_level(logging.INFO):
        fit(Classifier(), Tick(), maps, max_epochs=-1, max_steps=220)
    said = [r.message for r in caplog.records if "SparsityMaps draws every" in r.message]
    assert said == [
        "SparsityMaps draws every 50 optimizer steps now, not every 5: more often it would take more than 20.0% of "
        "the time of the fit."
    ]
    assert maps.history.steps == [0, 100, 150, 200, 220]  # that at the begin counts
    assert maps.overhead == pytest.approx(50 / 220)


def _tensors() -> tuple[Tensor, ...]:
    data = loader(sequences=True).dataset
    assert isinstance(data, TensorDataset)
    return data.tensors


def distributed(folder: Path, beside: bool) -> tuple[list[int], list[str], float]:
    """Two epochs in this process: what it has seen, and its weights."""
    sparsity_maps.draw_maps = lambda maps: {}  # type: ignore[assignment]
    maps = SparsityMaps(every=3, max_overhead=1e9, html=False, folder=folder)
    others = [StructuredSparsity(), FinalizeCompression(macs=0.4, at=0.6, report=False)] if beside else []
    own = module()
    # in float64, as the other tests in several processes
    data = DataLoader(TensorDataset(*(t.double() if t.is_floating_point() else t for t in _tensors())), 8)
    trainer(maps, *others, max_epochs=2, **parallel(seconds=240)).fit(own.double(), data)
    names = [name for name, _ in moments(maps)]
    return maps.history.steps, names, sum(float(p.double().sum()) for p in own.parameters())


@pytest.mark.parametrize("beside", [False, True])
def test_the_first_of_two_processes_draws(beside: bool, tmp_path: Path) -> None:
    one, other = in_processes(distributed, tmp_path / "maps", beside, seconds=300)
    assert not isinstance(one, BaseException) and not isinstance(other, BaseException), (one, other)
    assert one[1] == ([BEGIN, BEFORE, AFTER, END] if beside else [BEGIN, END])
    assert other[:2] == ([], [])
    assert one[2] == other[2]
    records = json.loads((tmp_path / "maps" / "maps.json").read_text(encoding="utf-8"))
    assert [r["step"] for r in records] == one[0]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: a log of blocks of 32 KiB, in which a record may be cut into pieces."""
    from wandb.proto import wandb_internal_pb2

    data, place, block, parts = path.read_bytes(), 7, 32768, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        if place + 7 + length > len(data):
            return  # it is being written
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def items(pairs: Any) -> dict[str, Any]:
    """Keys with their values; a value that is an object comes in parts."""
    found: dict[str, Any] = {}
    for pair in pairs:
        *outer, last = list(pair.nested_key) or [pair.key]
        inside = found
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = json.loads(pair.value_json)
    return found


def test_an_offline_run_of_weights_and_biases_read_back(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the extra `wandb`")
    from matplotlib.image import imread

    # a busy machine is no failure
    patient = wandb.Settings(init_timeout=300, x_service_wait=300)
    logger = WandbLogger(project="maps", save_dir=tmp_path, offline=True, settings=patient)
    maps, finalize = SparsityMaps(every=30, max_overhead=1e9), FinalizeCompression(macs=0.4, at=0.6)
    run(module(), maps, StructuredSparsity(), finalize, logger=logger, default_root_dir=tmp_path)
    folder = Path(logger.experiment.dir)
    wandb.finish()
    (file,) = folder.parent.glob("*.wandb")
    records, deadline = list(wandb_records(file)), time.monotonic() + 60
    while not any(r.WhichOneof("record_type") == "exit" for r in records) and time.monotonic() < deadline:
        time.sleep(0.2)  # another process writes the file
        records = list(wandb_records(file))
    history = [items(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    shown = [h for h in history if "sparsity_maps/blocks" in h]
    assert [h["trainer/global_step"] for h in shown] == maps.history.steps == [0, 24, 24, 30, 40]
    for kind in ("blocks", "heads", "norms", "layers", "bits"):
        panel = [h[f"sparsity_maps/{kind}"] for h in shown]
        assert {image["_type"] for image in panel} == {"image-file"}
        assert len({image["path"] for image in panel}) == len(shown)
        for image in panel:
            assert imread(folder / image["path"]).shape[:2] == (image["height"], image["width"])
            assert image["width"] == 1000
    captions = [h["sparsity_maps/blocks"]["caption"] for h in shown]
    assert captions[1:3] == ["before removal, step 24", "after removal, step 24"]
    assert [h["sparsity_maps/mean_bits"] for h in shown] == [32] * 5
    sparsity = [h["sparsity_maps/removed"] for h in shown]
    assert sparsity[:2] == [0, 0] and sparsity[2] == sparsity[-1] > 0.3
    end = maps.history.moments[-1][1]
    table = json.loads((folder / shown[-1]["sparsity_maps/matrices"]["path"]).read_text(encoding="utf-8"))
    assert table["columns"] == list(COLUMNS)
    assert [row[:5] for row in table["data"]] == [[m.name, *m.shape, m.sparsity, m.removed] for m in end.matrices]
    ffn = {u.name: u for u in end.structures if u.kind == "ffn"}
    for name, units in ffn.items():
        histogram = shown[-1][f"sparsity_maps/norms_of/{name}"]
        assert histogram["_type"] == "histogram" and sum(histogram["values"]) == units.alive
    (page,) = [h["sparsity_maps/report"] for h in history if "sparsity_maps/report" in h]
    assert maps.report_path is not None
    assert (folder / page["path"]).read_text(encoding="utf-8") == maps.report_path.read_text(encoding="utf-8")
    summary: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary.update(items(record.summary.update))
    assert finalize.report is not None
    assert summary["sparsity_maps/sparsity"] == pytest.approx(end.sparsity)
    assert summary["compression/params"] == finalize.report.params[1]
    assert summary["sparsity_maps/overhead"] > 0
    assert not list((tmp_path / "sparsity_maps").glob("*.png"))  # the logger has them


def test_tensorboard_read_back_beside_a_logger_that_takes_no_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(tmp_path, name="board")
    maps = SparsityMaps(every=100, folder=tmp_path / "files", html=False)
    callbacks = [maps, StructuredSparsity(), FinalizeCompression(macs=0.4, at=0.6, report=False)]
    run(module(), *callbacks, logger=[board, CSVLogger(tmp_path)])
    found = EventAccumulator(board.log_dir, size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    steps = maps.history.steps
    for kind in ("blocks", "heads", "norms", "layers", "bits"):
        images = found.Images(f"sparsity_maps/{kind}")
        assert [image.step for image in images] == steps
        for image in images:
            assert image.encoded_image_string.startswith(b"\x89PNG") and image.width == 1000
    removed = found.Scalars("sparsity_maps/removed")
    end = maps.history.moments[-1][1]
    assert [s.step for s in removed] == [*steps, 40]  # and once more when the fit is over
    assert removed[-1].value == pytest.approx(end.removed)
    for matrix in end.matrices:
        assert found.Scalars(f"sparsity_maps/sparsity_of/{matrix.name}")[-1].value == pytest.approx(matrix.sparsity)
    assert len(list((tmp_path / "files").glob("*.png"))) == 5 * len(steps)  # a folder that was named is used, too


def test_a_forward_that_cannot_be_traced_is_shown_without_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn(monkeypatch)

    class Moody(Transformer):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("only in training")
            return super().forward(x)

    maps = SparsityMaps(folder=tmp_path, html=False)
    with pytest.warns(
        UserWarning, match=r"could not discover the structures of 'model' \(RuntimeError: only in training"
    ):
        run(Classifier(Moody()), maps, max_epochs=1)
    assert maps.history.moments[-1][1].structures == ()
    maps = SparsityMaps(folder=tmp_path, html=False, discover=False)
    run(Classifier(Moody()), maps, max_epochs=1)  # does not try
    assert maps.history.moments[0][1].matrices[0].name == "model.embed.weight"  # all of the LightningModule
    maps = SparsityMaps(folder=tmp_path, html=False, discover=False, module="model.blocks", parameters=("0.*",))
    run(Classifier(Moody()), maps, max_epochs=1)
    assert {m.name.partition(".")[0] for m in maps.history.moments[0][1].matrices} == {"0"}


def test_a_full_disk_ends_no_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    maps, own = SparsityMaps(folder=tmp_path, html=False), module()
    with pytest.warns(
        UserWarning, match="SparsityMaps could not write its pictures, and goes on without: .*No space left"
    ):
        run(own, maps, max_epochs=1)
    assert len(own.losses) == 8
    monkeypatch.setattr(sparsity_maps, "write_html", full)
    monkeypatch.setattr(sparsity_maps, "sinks_for", lambda *args: [])
    maps = SparsityMaps(folder=tmp_path)
    with pytest.warns(UserWarning, match="SparsityMaps could not write its report: .*No space left"):
        run(module(), maps, max_epochs=1)
    assert maps.report_path is None


def test_a_development_run_leaves_no_files(tmp_path: Path) -> None:
    maps = SparsityMaps()
    run(module(), maps, fast_dev_run=True, default_root_dir=tmp_path)
    assert [name for name, _ in moments(maps)] == [BEGIN, END]
    assert not list(tmp_path.iterdir())


def test_twenty_pictures_or_every_five_hundred_steps() -> None:
    interval = sparsity_maps._default_interval
    t = run(module(), max_epochs=5)
    assert interval(t) == 2  # 40 steps
    t.fit_loop.max_epochs, t.fit_loop.epoch_loop.max_steps = -1, -1
    assert interval(t) == 500
    t.fit_loop.epoch_loop.max_steps = 10_000
    assert interval(t) == 500
    t.fit_loop.epoch_loop.max_steps = 100
    assert interval(t) == 5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "Expected every to be an integer of at least 1, but got 0"),
        ({"max_overhead": 0.0}, ValueError, r"Expected max_overhead, .* to be above 0, but got 0.0. Two percent"),
        ({"threshold": -1.0}, ValueError, "Expected threshold, a root mean square of elements, to be at least 0"),
        ({"block_shape": (2, 2), "block_grid": (2, 2)}, ValueError, "Expected block_shape or block_grid, but got both"),
        ({"block_shape": (0, 2)}, ValueError, "Expected the numbers of block_shape to be at least 1"),
        ({"block_grid": "all"}, TypeError, "Expected block_grid to be two integers"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparsityMaps(**options)
    assert SparsityMaps(block_grid=[2, 8]).block_grid == (2, 8)  # type: ignore[arg-type]  # as YAML has it


def test_bad_fits_are_refused_at_their_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = module()
    with pytest.raises(
        ValueError, match=r"Expected module to be the dotted name of a sub-module .* Did you mean 'model'"
    ):
        run(own, SparsityMaps(module="modle", folder=tmp_path))
    own = module()
    with pytest.raises(ValueError, match="Expected parameters to match matrices of Transformer, but 'head' matches no"):
        run(own, SparsityMaps(parameters=("head",), folder=tmp_path))
    own = module()
    monkeypatch.setattr(sparsity_maps, "is_sharded", lambda module: True)
    with pytest.raises(
        ValueError, match="Expected whole parameters for SparsityMaps, but those of this module are shard"
    ):
        run(own, SparsityMaps(folder=tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-compress\[report\]'"):
        run(own, SparsityMaps(folder=tmp_path))
    assert len(own.losses) <= 1
