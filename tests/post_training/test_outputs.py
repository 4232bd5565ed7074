"""How far gates move the outputs: random signs have the Gauss-Newton matrix as their mean, and need no labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CalibratedImportance, FisherAccumulator, compress_after_training, discover
from lightning_compress.post_training.calibration import Calibration, default_call, default_loss, real_tokens
from lightning_compress.post_training.outputs import output_probes
from lightning_compress.structures import Structures


def network(outputs: int) -> tuple[nn.Module, Structures]:
    torch.manual_seed(outputs)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double().eval()
    return model, discover(model, (torch.randn(2, 3).double(),), prove=True)


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Of the outputs by gates on the hidden units, (examples, outputs, units)."""
    hidden = torch.tanh(model[0](x))  # type: ignore[index]
    return (hidden.unsqueeze(1) * model[2].weight).detach()  # type: ignore[index]


def found(model: nn.Module, structures: Structures, batches: list[Any], probes: int = 1) -> Tensor:
    fisher = FisherAccumulator(model, structures, full=True)
    calibration = Calibration(tuple(batches), default_call, default_loss, real_tokens)
    for batch, probe in output_probes(calibration, probes):
        fisher.update(batch, probe)
    assert not fisher.alone  # examples have in their batch the gradients that they have alone
    return fisher.matrices()[structures[0].name]


def test_of_one_output_it_is_exact() -> None:
    model, structures = network(1)
    x = torch.randn(7, 3).double()
    j = jacobian(model, x)[:, 0]
    torch.testing.assert_close(found(model, structures, [x[:4], x[4:]]), j.T @ j / 7)


def test_of_two_classes_it_is_what_moves_their_difference() -> None:
    model, structures = network(2)
    x, labels = torch.randn(6, 3).double(), torch.randint(2, (6,))
    j = jacobian(model, x)
    difference = j[:, 1] - j[:, 0]
    torch.testing.assert_close(found(model, structures, [(x, labels)]), difference.T @ difference / 6)


@pytest.mark.parametrize("classes", [True, False])
def test_the_mean_over_signs_is_the_gauss_newton_matrix(classes: bool) -> None:
    model, structures = network(4)
    x, labels = torch.randn(6, 3).double(), torch.randint(4, (6,))
    j = jacobian(model, x)
    if classes:  # what all classes share does not matter
        j = j - j.mean(1, keepdim=True)
    expected = torch.einsum("ncu,ncv->uv", j, j) / 6
    mean = found(model, structures, [(x, labels) if classes else x], probes=3000)
    if classes:  # signs that are all equal are drawn anew, which scales all of it
        mean = mean * (expected.trace() / mean.trace())
    assert float((mean - expected).norm() / expected.norm()) < 0.1


class Tokens(nn.Module):
    """Outputs for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(9, 3), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"count": attention_mask.sum(1), "scores": self.down(torch.tanh(self.up(self.table(input_ids))))}


def test_padding_is_left_out() -> None:
    model = Tokens().double().eval()
    ids, mask = torch.randint(9, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    mask[:, 4:] = 0
    structures = discover(model, (ids, mask), prove=True)
    results = []
    for end in (0, 8):
        padded = ids.clone()
        padded[:, 4:] = torch.tensor([end, 3])  # two that differ: opposite signs would cancel equal ones
        results.append(found(model, structures, [{"input_ids": padded, "attention_mask": mask}]))
    torch.testing.assert_close(results[0], results[1])
    assert float(results[0].diagonal().min()) > 0


def test_it_is_what_compresses_without_labels() -> None:
    model = network(3)[0].float()
    model[0], model[2] = nn.Linear(3, 16), nn.Linear(16, 3)  # type: ignore[index]
    with torch.no_grad():  # half of the units move nothing
        model[2].weight[:, ::2] *= 1e-4  # type: ignore[index]
    result = compress_after_training(model, [torch.randn(8, 3) for _ in range(3)], units=0.5, repair=None)
    assert tuple(next(iter(result.plan.kept.values()))) == tuple(range(1, 16, 2))
    assert result.report.error < 1e-6


def test_outputs_that_say_nothing_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    structures = discover(model, (torch.randn(2, 3),))
    importance = CalibratedImportance([torch.randn(4, 3)], "outputs", call=lambda m, batch: m(batch).argmax(-1))
    message = r"Expected a floating-point output with a dim for the examples, but Sequential returned none"
    with pytest.raises(ValueError, match=message):
        importance.of_all(model, structures)
