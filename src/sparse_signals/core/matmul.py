"""Many rows, each times the matrix of its group, without a loop over rows or groups."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROWS = 16  # of a group that are multiplied at once in the first round


def grouped_matmul(
    x: Float[Tensor, "row n"], matrices: Float[Tensor, "group n m"], group: Int[Tensor, "row"]
) -> Float[Tensor, "row m"]:
    """x_i M_g(i) for every row i.

    A round takes the next rows of every group that has any left, and multiplies all these tiles
    at once; each takes twice as many as the one before. So the number of rounds grows with the
    logarithm of the largest group, and at most twice the rows are multiplied (and `ROWS` more).
    """
    count = torch.bincount(group, minlength=len(matrices))
    order = group.argsort(stable=True)
    ordered, rank = group[order], torch.arange(len(x), device=x.device)
    rank = rank - (count.cumsum(0) - count)[ordered]
    product = x.new_empty(len(x), matrices.shape[-1])
    first, size, largest = 0, ROWS, int(count.max()) if len(x) else 0
    while first < largest:
        here = (count > first).nonzero().flatten()
        whole = 2 * len(here) > len(matrices)  # then picking costs more than empty rows
        here = torch.arange(len(matrices), device=x.device) if whole else here
        now = (rank >= first) & (rank < first + size)
        slot = torch.searchsorted(here, ordered[now]), rank[now] - first
        tiles = x.new_zeros(len(here), size, x.shape[-1])
        tiles[slot] = x[order[now]]
        # few rows on the right are several times faster than on the left
        times = (matrices if whole else matrices[here]).mT @ tiles.mT
        product[order[now]] = times.mT[slot]
        first, size = first + size, 2 * size
    return product
