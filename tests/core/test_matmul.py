"""Rows times the matrix of their group: against a loop, for all sizes of groups."""

import pytest
import torch

from sparse_signals.core.matmul import ROWS, grouped_matmul


@pytest.mark.parametrize(
    "sizes",
    [[1], [0, 3, 0], [ROWS, ROWS + 1, 2], [5 * ROWS] + [0] * 9, [3 * ROWS + 1, 7 * ROWS] + [1] * 9],
)
def test_every_row_meets_the_matrix_of_its_group(sizes):
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    group = group[torch.randperm(len(group), generator=generator)]
    x = torch.randn(len(group), 5, dtype=torch.float64, generator=generator)
    matrices = torch.randn(3, len(sizes), 5, dtype=torch.float64, generator=generator)
    looped = torch.stack([row @ matrices[:, g].mT for row, g in zip(x, group, strict=True)])
    found = grouped_matmul(x, matrices.permute(1, 2, 0), group)  # not contiguous
    torch.testing.assert_close(found, looped, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("groups", [0, 2])
def test_no_rows(groups):
    nobody = torch.empty(0, dtype=torch.long)
    assert grouped_matmul(torch.empty(0, 5), torch.ones(groups, 5, 3), nobody).shape == (0, 3)
