"""Failures of a posed model's forward and backward, said with what to type next."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pullback as pb
from tests.single_input import only


class Patches(nn.Module):
    """Two patches belong to each example but have no row of their own, as in Qwen2-VL."""

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        return torch.tanh(x * patches.reshape(len(x), 2, 3).sum(1))


def test_inputs_without_rows_say_which_chunk_to_pass() -> None:
    inputs = {"x": torch.ones(2, 3), "patches": pb.Shared(torch.arange(12.0).reshape(4, 3) / 12)}
    method = pb.IntegratedGradients(steps=4)
    message = (
        r"failed for \d+ rows though not for the batch of 2: .*patches \(4, 3\) has no row .*Pass chunk=2"
    )
    with pytest.raises(pb.InputError, match=message):
        pb.explain(Patches(), inputs, method=method, target=1)
    found = only(pb.explain(Patches(), inputs, method=method, target=1, chunk=2))
    for row in range(2):
        own = {
            "x": inputs["x"][row : row + 1],
            "patches": pb.Shared(inputs["patches"].value[2 * row : 2 * row + 2]),
        }  # type: ignore[index, union-attr]
        alone = only(pb.explain(Patches(), own, method=method, target=1, chunk=1))
        torch.testing.assert_close(found[row], alone[0], rtol=0, atol=1e-6)


def test_errors_of_the_batch_itself_are_passed_on() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        pb.explain(Patches(), {"x": torch.ones(2, 3), "patches": torch.ones(5, 3)}, target=1)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block, self.read = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), nn.Linear(3, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.read(checkpoint(self.block, x, use_reentrant=self.reentrant))  # type: ignore[no-any-return]


def test_a_site_inside_a_checkpointed_block() -> None:
    net, x = Checkpointed(reentrant=False), torch.ones(2, 3)
    with pytest.raises(
        pb.SiteError, match=r'"block.1" lies inside a checkpointed block.*gradient_checkpointing_disable'
    ):
        pb.explain(net, x, method="gradient", target=1, site="block.1")
    assert only(pb.explain(net, x, method="gradient", target=1)).any()


def test_reentrant_checkpoints() -> None:
    with pytest.raises(pb.ModelError, match=r"re-entrant gradient checkpoints.*use_reentrant=False"):
        pb.explain(Checkpointed(reentrant=True), torch.ones(2, 3), method="gradient", target=1)
