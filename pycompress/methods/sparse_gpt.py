"""SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774): pruned column after column, the later ones making up for each error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pycompress.methods.inputs import damped_root

BLOCK = 128  # columns that are ranked together


def sparse(w: Tensor, moment: Tensor, project: Callable[[Tensor, int], Tensor], group: int) -> tuple[Tensor, Tensor]:
    """The weight float32 [n, k], and its support, bool [n, k].

    Args:
        w: float32 [n, k], finite.
        moment: float64 [k, k], the second moment of the inputs, not all zero.
        project: saliencies float32 [n, columns] and the number of columns before these -> bool, which weights stay.
        group: how many columns are ranked together: BLOCK, or the M of N:M.
    Raises:
        ValueError: the second moment is that of no inputs: it has negative eigenvalues.
    """
    root = damped_root(moment, "Sparse")
    assert root is not None
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    pivot = upper.diagonal()
    rest = w.T.double().contiguous()  # [k, n]: a column of the weight in each row
    mask = torch.empty(rest.shape, dtype=torch.bool, device="cpu")
    for start in range(0, len(rest), group):
        part = slice(start, min(start + group, len(rest)))
        saliency = rest[part] / pivot[part, None]
        saliency /= saliency.abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
        mask[part] = project(saliency.T.float().contiguous(), start).T
        errors = torch.empty_like(rest[part])
        for i in range(part.stop - start):
            j = start + i
            errors[i] = torch.where(mask[j], 0.0, rest[j]) / pivot[j]
            rest[j].masked_fill_(~mask[j], 0.0)
            rest[j + 1 : part.stop] -= upper[j, j + 1 : part.stop, None] * errors[i]
        rest[part.stop :] -= upper[part, part.stop :].T @ errors
    return rest.T.float().contiguous(), mask.T.contiguous()
