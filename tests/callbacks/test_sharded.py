"""A fit of sharded processes (FSDP2) is the fit of one, and ends with a small model in a folder."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Distillation, FinalizeCompression, StructuredSparsity, TokenPruning, load_compressed
from lightning_compress.callbacks.plain_copy import is_sharded, plain_copy
from lightning_compress.report import count_parameters
from lightning_compress.shards import Part, local, whole, zero_positions
from lightning_compress.structures import Slice, Structure
from lightning_compress.unit_groups import UnitGroups
from tests.callbacks.modules import Classifier, Transformer, loader, trainer
from tests.callbacks.processes import in_processes, processes, rank, sharding
from tests.callbacks.test_processes import FailsAt, Save, assert_close

# so few units that a budget cannot be met to one per cent
pytestmark = pytest.mark.filterwarnings("ignore::lightning_compress.budget.BudgetWarning")


def shared() -> DataLoader[Any]:
    """Batches of which every process takes its part: together they are those of one process, in its order."""
    data = TensorDataset(*(t.double() if t.is_floating_point() else t for t in loader(True).dataset.tensors))
    return DataLoader(data, 8 // processes(), sampler=range(rank(), len(data), processes()))


def model() -> Transformer:
    """Odd sizes: two processes have unequal shards of almost everything."""
    return Transformer(width=12, heads=3, ffn=25).double()


class Usual(Classifier):
    """Shards its blocks, then all of its model."""

    def __init__(self) -> None:
        super().__init__(model(), lr=5e-3)

    def configure_model(self) -> None:
        if self.device_mesh is None or is_sharded(self):
            return
        from torch.distributed.fsdp import fully_shard

        for block in self.model.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.sharded_root(), mesh=self.device_mesh["data_parallel"])

    def sharded_root(self) -> nn.Module:
        return self.model


class Itself(Usual):
    """Is sharded and called as a whole, and is built where it is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            torch.manual_seed(0)
            self.model = model()
        super().configure_model()

    def sharded_root(self) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def teacher() -> nn.Module:
    torch.manual_seed(3)
    return model()


@dataclass
class Outcome:
    """What is left of a fit."""

    kept: Mapping[str, tuple[int, ...]]
    weights: dict[str, Tensor]
    moments: list[Tensor]
    error: float
    strength: float
    steps: int
    dead: int
    zeroed: Tensor
    saved: Path
    report: str


def compress(
    folder: Path,
    *callbacks: pl.Callback,
    module: Callable[[], Classifier] = Usual,
    sparsity: dict[str, Any] | None = None,
    removing: dict[str, Any] | None = None,
    validate: bool = False,
    taught: bool = False,
    resume: Path | None = None,
    alone: bool = False,
    many: dict[str, Any] | None = None,
    **options: Any,
) -> Outcome:
    """Sparsify in shards and remove at the end, in one process or in all those that call this."""
    torch.manual_seed(0)
    own = module()
    sparsifier = StructuredSparsity(**(sparsity or {}))
    finalize = FinalizeCompression(**{"macs": 0.4, "at": 1.0, "report": False, **(removing or {})})
    others = [*([] if alone else [sparsifier]), *([Distillation(teacher=teacher())] if taught else []), *callbacks]
    spread = {} if many is None else {**sharding(**many), "use_distributed_sampler": False}
    fitting = trainer(finalize, *others, **{"max_epochs": 2, "default_root_dir": folder, **spread, **options})
    data = shared()
    fitting.fit(own, data, data if validate else None, ckpt_path=resume)
    assert finalize.plan is not None and finalize.saved is not None
    done = finalize.surgery_reports[-1]
    return Outcome(
        kept=finalize.plan.kept,
        weights={n: whole(p).detach().clone() for n, p in own.named_parameters()},
        moments=[whole(s["exp_avg"]).clone() for s in fitting.optimizers[0].state.values()],
        error=max(done.error or 0.0, done.perturbed_error or 0.0),
        strength=sparsifier.strength,
        steps=fitting.global_step,
        dead=0 if alone else sum(int(units.sum()) for units in sparsifier.sparsifier.dead.values()),
        zeroed=own.eval()(example()).detach() if module is Itself else own.eval().model(example()).detach(),
        saved=finalize.saved,
        report="" if finalize.report is None else finalize.report.to_json(),
    )


def example() -> Tensor:
    return torch.randn(5, 4, 5, generator=torch.Generator().manual_seed(7)).double()


def built() -> nn.Module:
    module = Itself()
    module.configure_model()
    return module


FITS: dict[str, dict[str, Any]] = {
    "validated": {"validate": True},
    "accumulated": {"accumulate_grad_batches": 2, "module": Itself, "validate": True},
    "taylor": {"sparsity": {"importance": "taylor"}, "taught": True},
    "loss": {"sparsity": {"mode": "loss", "strength": 1e-3, "regularizer": "hoyer_square"}},
    "alone": {"alone": True, "removing": {"importance": "taylor", "report": True}},
}


def all_fits(folder: Path) -> dict[str, Outcome]:
    return {name: compress(folder, many={}, **options) for name, options in FITS.items()}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
    """The fits in both of two processes."""
    first, second = in_processes(all_fits, tmp_path_factory.mktemp("sharded"))
    for found in (first, second):
        if isinstance(found, BaseException):
            raise found
    return first, second


@pytest.mark.parametrize("name", FITS)
def test_two_processes_with_shards_do_what_one_does(
    name: str, both: tuple[dict[str, Outcome], dict[str, Outcome]], tmp_path: Path
) -> None:
    first, second = both[0][name], both[1][name]
    assert_close(first, second, 0.0)
    assert (first.saved, first.report) == (second.saved, second.report)
    removing = {**FITS[name].get("removing", {}), "folder": tmp_path / "one"}
    one = compress(tmp_path, **{**FITS[name], "removing": removing})
    assert first.kept == one.kept
    assert first.steps == one.steps
    assert first.strength == pytest.approx(one.strength, rel=1e-8)
    assert first.dead == one.dead
    # the sharded module has the shape that it had, with zeros; it computes what the small one of one process does
    assert sum(w.numel() for w in first.weights.values()) == count_parameters(model())
    torch.testing.assert_close(first.zeroed, one.zeroed, rtol=0, atol=1e-9)
    # zeroed == removed
    assert first.error <= 1e-10
    small = load_compressed(first.saved, built if FITS[name].get("module") is Itself else model)
    torch.testing.assert_close(small(example()), first.zeroed, rtol=0, atol=1e-10)
    assert count_parameters(small) < 0.7 * count_parameters(model())
    for saved, own in zip(small.state_dict().values(), one_state(one.saved, name), strict=True):
        torch.testing.assert_close(saved, own, rtol=0, atol=1e-9)


def one_state(folder: Path, name: str) -> list[Tensor]:
    small = load_compressed(folder, built if FITS[name].get("module") is Itself else model)
    return list(small.state_dict().values())


def test_units_are_really_driven_to_zero_in_shards(both: tuple[dict[str, Outcome], dict[str, Outcome]]) -> None:
    for name in ("validated", "accumulated", "taylor"):
        outcome = both[0][name]
        assert outcome.dead > 0
    assert len({outcome.saved for outcome in both[0].values()}) == len(FITS)  # a folder that is taken stays as it is


def resumed(folder: Path) -> list[Outcome]:
    single, parts, end = (folder / name for name in ("single.ckpt", "parts.ckpt", "end.ckpt"))
    short: dict[str, Any] = {"limit_train_batches": 5}
    straight = compress(folder, Save(parts, 5), Save(end, 10), many={}, **short)
    compress(folder, Save(single, 5), many={"save_distributed_checkpoint": False}, **short)
    from_single = compress(folder, resume=single, many={"save_distributed_checkpoint": False}, **short)
    from_parts = compress(folder, resume=parts, many={}, **short)
    longer = compress(folder, resume=end, many={}, max_epochs=3, **short)
    return [straight, from_single, from_parts, longer]


def test_a_sharded_fit_is_resumed(tmp_path: Path) -> None:
    first, second = in_processes(resumed, tmp_path)
    for found in (first, second):
        if isinstance(found, BaseException):
            raise found
        assert_close(found[0], found[1], 1e-9)
        assert_close(found[0], found[2], 1e-9)
    assert (tmp_path / "parts.ckpt").is_dir() and (tmp_path / "single.ckpt").is_file()
    # a fit that goes on after its removal removes again at its new end
    assert first[3].steps == 15
    torch.testing.assert_close(load_compressed(first[3].saved, model)(example()), first[3].zeroed, rtol=0, atol=1e-10)


# One process fails


def falls_over(folder: Path, how: str) -> str:
    def importance(module: nn.Module, structure: Structure) -> Tensor:
        if rank() == 1 and how == "raises":
            raise KeyError("no scores here")
        return torch.arange(1.0, structure.units + 1)

    callbacks = [FailsAt(3, "dies")] if how == "dies" else []
    try:
        compress(folder, *callbacks, sparsity={"importance": importance}, many={"seconds": 10.0})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_when_one_process_fails_the_other_ends(how: str, tmp_path: Path) -> None:
    first, second = in_processes(falls_over, tmp_path, how, seconds=40)
    assert "Error: " in first
    if how == "dies":
        assert second == -signal.SIGKILL
    else:
        assert "process 1 failed" in first and "no scores here" in second
    assert not (tmp_path / "compressed").exists()


# What is refused


class Whole(Usual):
    """Forgets to shard."""

    def configure_model(self) -> None:
        pass


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "at": ({"removing": {"at": 0.6}}, r"one removal at the end.*got at=0.6 and rounds=1.*Use at=1.0, and fine-tune"),
    "epoch": ({"removing": {"at": None, "at_epoch": 2}}, r"FinalizeCompression\(at=1.0\).*got at_epoch=2"),
    "rounds": ({"removing": {"rounds": 2}}, r"got at=1 and rounds=2: sharded parameters.*strategy='ddp'"),
    "latency": ({"removing": {"macs": None, "latency": 0.5}}, "budget in macs, params or units .* got latency"),
    "kinds": ({"sparsity": {"kinds": ("ffn", "hidden")}}, r"for a sharded module, but got \['hidden'\]: zero weights"),
    "groups": ({"sparsity": {"groups": "rows"}}, "groups='coupled' for the sharded parameters .*got groups='rows'"),
    "whole": ({"module": Whole}, r"configure_model of Whole to shard .*fully_shard\(module, mesh=self.device_mesh"),
    "tensors": (
        {"many": {"data_parallel_size": 1, "tensor_parallel_size": 2}},
        r"ModelParallelStrategy\(tensor_parallel_size=1\) for FinalizeCompression, but got 2: the parts of a",
    ),
    "folder": ({"removing": {"folder": "taken"}}, "FileExistsError: Expected .* to be empty or not to exist"),
    "tokens": ({"beside": lambda: TokenPruning(macs=0.5)}, r"whole parameters for TokenPruning.*strategy='ddp'"),
    "teacher": (
        {"beside": Distillation},
        r"a teacher for Distillation beside a sharded.*Distillation\(teacher=",
    ),
}


def refused(folder: Path) -> dict[str, str]:
    found = {}
    for name, (options, _) in REFUSED.items():
        given = {"many": {}, **options}
        if given.get("removing", {}).get("folder"):
            given["removing"] = {"folder": folder}
        beside = given.pop("beside", None)
        others = [] if beside is None else [beside()]
        try:
            compress(folder, *others, **given)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_what_shards_cannot_do_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    for found in in_processes(refused, tmp_path):
        for name, (_, message) in REFUSED.items():
            assert re.search(message, found[name], re.DOTALL), f"{name}: {found.get(name)}"


# Parts


def parts() -> None:
    """Norms, scores and scaling of tensors in blocks, as they are of whole ones; the last process has nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", rank=rank(), world_size=processes())
    mesh = init_device_mesh("cpu", (processes(),))
    torch.manual_seed(0)
    plain = {"a": torch.randn(4, 3), "b": torch.randn(5, 4), "c": torch.randn(4), "d": torch.randn(4, 2)}
    plain = {name: tensor.double() for name, tensor in plain.items()}
    placed = {"a": Shard(0), "b": Shard(0), "c": Replicate(), "d": Shard(1)}
    spread = {name: distribute_tensor(plain[name].clone(), mesh, [placement]) for name, placement in placed.items()}
    spread["c"] = plain["c"].clone()  # whole in every process, as parameters that are not sharded
    units = torch.tensor([[0], [3]])
    slices = [Slice(n, 1 if n == "b" else 0, 4, units, "producer", zero=False) for n in plain]
    structure = Structure("s", "ffn", 2, tuple(slices))
    one, many = UnitGroups(plain, [structure]), UnitGroups(spread, [structure])
    torch.testing.assert_close(many.norms(), one.norms(), rtol=1e-14, atol=0)
    assert torch.equal(many.sizes, one.sizes)
    factors = torch.tensor([0.5, 0.0]).double()
    for groups, tensors in ((one, plain), (many, spread)):
        groups.scale_(factors)
        groups.add_scaled_(tensors, torch.tensor([2.0, 0.0]).double())
        groups.zero_(torch.tensor([False, True]), {n: [t] for n, t in tensors.items()})
        for name, axis in (("a", 0), ("b", 1), ("d", 1)):
            zero_positions([tensors[name]], axis, torch.tensor([1]))
    for name, tensor in plain.items():
        torch.testing.assert_close(whole(spread[name]), tensor, rtol=1e-14, atol=0)
    assert local(spread["a"]).shape[0] == (2, 2, 0)[rank()]
    assert Part.of(spread["a"]).along(0, 4) == (slice(0, 2), slice(2, 4), slice(4, 4))[rank()]
    partial = DTensor.from_local(plain["a"], mesh, [Partial()])
    with pytest.raises(ValueError, match=r"Expected 'w' to be split in blocks along one axis.*Partial.*strategy='ddp'"):
        Part.of(partial, "w")


class Odd(nn.Module):
    """Shares a weight, has a buffer, an attribute that is a tensor, and a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.side = nn.Linear(3, 5), nn.Linear(3, 5)
        self.down, self.again = nn.Linear(5, 3), nn.Linear(5, 3)
        self.again.weight = self.down.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.shifts = [torch.tensor(1.0)]
        self.up.register_forward_hook(_doubled)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x) + self.side(x)
        return (self.down(y) - self.again(y.square())) * self.scale + self.shifts[0]


def _doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def copied() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", rank=rank(), world_size=processes())
    mesh = init_device_mesh("cpu", (processes(),))
    torch.manual_seed(0)
    module, x = Odd(), torch.randn(2, 3)
    expected = module(x)
    fully_shard([module.up, module.side], mesh=mesh)
    fully_shard(module, mesh=mesh)
    torch.testing.assert_close(module(x), expected)
    copy = plain_copy(module, keep=rank() == 0)
    assert (copy is None) == (rank() != 0)
    if copy is not None:
        assert type(copy) is Odd and type(copy.up) is nn.Linear and not copy.training
        assert copy.again.weight is copy.down.weight
        assert {type(p) for p in copy.parameters()} == {nn.Parameter}
        torch.testing.assert_close(copy(x), expected, rtol=0, atol=0)
        with torch.no_grad():
            for tensor in (*copy.parameters(), copy.scale, copy.shifts[0]):
                tensor.zero_()
        assert vars(copy).keys() == vars(Odd()).keys()
        assert not any(h for part in copy.modules() if part is not copy.up for h in part._forward_hooks)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(("work", "count"), [(parts, 3), (copied, 2)], ids=["parts", "copied"])
def test_parts_and_copies(work: Callable[[], None], count: int) -> None:
    for found in in_processes(work, count=count):
        if isinstance(found, BaseException):
            raise found
