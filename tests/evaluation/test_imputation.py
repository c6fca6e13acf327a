"""Noisy linear imputation against a sparse direct solver of the equations as written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pullback.core.errors import InputError
from pullback.evaluation import NoisyLinear


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(*shape: int, share: float = 0.6, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def directly_solved(plane: Tensor, gone: Tensor) -> Tensor:
    """One equation a removed pixel: it is the mean of its neighbours, 2 parts beside and 1 part across."""
    from scipy.sparse import lil_matrix
    from scipy.sparse.linalg import spsolve

    height, width = plane.shape
    matrix, right = lil_matrix((height * width, height * width)), np.zeros(height * width)
    for i in range(height):
        for j in range(width):
            here = i * width + j
            matrix[here, here] = 1
            if not gone[i, j]:
                right[here] = float(plane[i, j])
                continue
            near = [
                (u, v, 1 if u != i and v != j else 2)
                for u in (i - 1, i, i + 1)
                for v in (j - 1, j, j + 1)
                if (u, v) != (i, j) and 0 <= u < height and 0 <= v < width
            ]
            for u, v, weight in near:
                matrix[here, u * width + v] = -weight / sum(w for _, _, w in near)
    return torch.tensor(spsolve(matrix.tocsr(), right)).reshape(height, width)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.98])
def test_the_result_solves_the_equations(share: float) -> None:
    x, gone = normal(3, 2, 9, 7), chosen(3, 2, 9, 7, share=share)
    gone[..., 0, 0] = False
    filled = NoisyLinear(noise=0.0).fill(x, gone)
    for row in range(3):
        for channel in range(2):
            expected = directly_solved(x[row, channel], gone[row, channel])
            torch.testing.assert_close(filled[row, channel], expected, rtol=0, atol=1e-6)
    assert torch.equal(filled[~gone], x[~gone])


def test_series_are_joined_by_straight_lines() -> None:
    x = torch.tensor([[[0.0, 9.0, 9.0, 9.0, 4.0, 9.0]]], dtype=torch.float64)
    gone = torch.tensor([[[False, True, True, True, False, True]]])
    filled = NoisyLinear(noise=0.0).fill(x, gone)
    assert filled.flatten().tolist() == pytest.approx([0, 1, 2, 3, 4, 4], abs=1e-6)


def test_noise_is_added_where_removed_and_only_there() -> None:
    x, gone = normal(1, 1, 40, 40), chosen(1, 1, 40, 40)
    plain, noisy = (NoisyLinear(noise=noise).fill(x, gone) for noise in (0.0, 0.5))
    difference = (noisy - plain)[gone]
    # about 960 draws: the standard error of a standard deviation of .5 is .011
    assert float(difference.std()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(noisy[~gone], x[~gone])
    assert torch.equal(NoisyLinear(noise=0.5).fill(x, gone), noisy)
    assert not torch.equal(NoisyLinear(noise=0.5, seed=1).fill(x, gone), noisy)


def test_nothing_and_everything_removed() -> None:
    x = normal(1, 2, 4, 4)
    none = torch.zeros_like(x, dtype=torch.bool)
    assert torch.equal(NoisyLinear().fill(x, none), x)
    filled = NoisyLinear(noise=0.0).fill(x, ~none)
    torch.testing.assert_close(filled, x.mean((2, 3), keepdim=True).expand_as(x))


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    x, gone = normal(4, 1, 12, 12), chosen(4, 1, 12, 12, share=0.9)
    x[2] *= 1e6
    whole = NoisyLinear().fill(x, gone)
    for row in range(4):
        alone = NoisyLinear().fill(x[row : row + 1], gone[row : row + 1])[0]
        torch.testing.assert_close(alone, whole[row], rtol=1e-12, atol=1e-12)


def test_single_precision_stays_single() -> None:
    x, gone = normal(1, 1, 8, 8), chosen(1, 1, 8, 8)
    filled = NoisyLinear().fill(x.float(), gone)
    assert filled.dtype == torch.float32
    torch.testing.assert_close(filled.double(), NoisyLinear().fill(x, gone), rtol=1e-5, atol=1e-5)


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(InputError, match=r"noise=-1 was given. Expected a standard deviation, 0 or more"):
        NoisyLinear(noise=-1)
    with pytest.raises(
        InputError, match=r"shape \(2, 3\). Expected images \(B, C, H, W\) or series \(B, C, T\)"
    ):
        NoisyLinear().fill(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
