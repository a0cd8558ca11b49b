"""The weight of a support that changes a layer's outputs least (optimal brain surgeon, Hassibi & Stork 1993, for many weights).

For inputs with the second moment M, an error E [n, k] of the weight changes the outputs by ||E X||_F^2 = the sum of (E M) * E.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-3  # of the moment, whose diagonal is 1 here: errors where calibration never looked cost a little
_DEAD = 1e-10  # a feature whose root mean square is below this share of the largest one's says nothing
_STEPS = 24  # of conjugate gradients: more lower the error of MiniLM's layers by less than 1 %
_SWEEPS = 2  # of rounding
_BLOCK = 64  # columns that are rounded before the others are told


class Outputs:
    """A layer, its features scaled to one root mean square each and its largest weight to one, so that float32 is enough.

    Attributes:
        weight: float32 [n, k], the scaled one; zero where a feature is dead.
        moment: float32 [k, k], of the scaled inputs, damped: its diagonal is 1 + DAMPING, DAMPING where a feature is dead.
    """

    def __init__(self, w: Tensor, moment: Tensor, kind: str) -> None:
        """
        Args:
            w: float32 [n, k], finite.
            moment: float64 [k, k], the second moment of the inputs.
        Raises:
            ValueError: a diagonal with negative numbers, which no inputs have; ``kind``: who asks.
        """
        squares, reach = moment.diagonal(), w.abs().amax().double()
        if bool((squares < 0).any()):
            raise ValueError(f"{kind}: the second moment of the inputs has a negative diagonal, expected none")
        size = (squares / squares.amax()).sqrt() if float(squares.amax()) > 0 else torch.zeros_like(squares)
        self._live = size > _DEAD
        self._size = torch.where(self._live, size, 0.0) / (reach if float(reach) > 0 else 1.0)
        each = torch.where(self._live, squares.sqrt(), 1.0)
        scaled = moment / each[:, None] / each * self._live[:, None] * self._live
        self.moment = scaled.float() + DAMPING * torch.eye(len(squares), dtype=torch.float32, device="cpu")
        self.weight = (w.double() * self._size).float()
        self._given, self._kind = w, kind

    def unscaled(self, x: Tensor, mask: Tensor) -> Tensor:
        """A scaled weight as it was given, float32 [n, k]; of dead features, the given weights."""
        size = torch.where(self._live, self._size, 1.0)
        back = torch.where(self._live, x.double() / size, self._given.double())
        return torch.where(mask, back, 0.0).clamp(*_FINITE).float()

    def inverse(self, extra: float) -> Tensor:
        """float32 [k, k]: extra * (moment + extra * 1)^-1."""
        eye = torch.eye(len(self.moment), dtype=torch.float64, device="cpu")
        root, failed = torch.linalg.cholesky_ex(self.moment.double() + extra * eye)
        if int(failed):
            raise ValueError(f"{self._kind}: the second moment of the inputs has negative eigenvalues, expected none")
        inverse: Tensor = torch.cholesky_inverse(root)
        return (inverse * extra).float()

    def refitted(self, x: Tensor, mask: Tensor) -> Tensor:
        """The least squares solution of each row on its support, by conjugate gradients from x (float32 [n, k], zero elsewhere).

        A row that has arrived stays; none ends worse than it began.
        """
        stays = mask.float()
        rest = ((self.weight - x) @ self.moment) * stays
        way, squares = rest.clone(), rest.square().sum(dim=1, keepdim=True)
        for _ in range(_STEPS):
            ahead = (way @ self.moment) * stays
            curve = (way * ahead).sum(dim=1, keepdim=True)
            step = torch.where(curve > 0, squares / curve, 0.0)
            x = x + step * way
            rest = rest - step * ahead
            new = rest.square().sum(dim=1, keepdim=True)
            way = rest + torch.where(squares > 0, new / squares, 0.0) * way
            squares = new
        return x

    def rounded(self, x: Tensor, mask: Tensor, scale: Tensor, top: int) -> Tensor:
        """Integers float32 [n, k] in [-top, top], zero off the support, whose multiples of scale change the outputs least.

        Coordinate descent: each column in turn takes the integers that are best for what the others are now, so that no row ends
        worse than by rounding x.

        Args:
            x: float32 [n, k], not scaled.
            scale: float32 [n], of the rows.
        """
        k, grid = x.shape[1], (scale.double()[:, None] * self._size).float()  # zero where a feature is dead
        now = (x / scale[:, None]).round().clamp(-top, top) * mask
        for _ in range(_SWEEPS):
            for start in range(0, k, _BLOCK):
                part = slice(start, min(start + _BLOCK, k))
                pull = (self.weight - now * grid) @ self.moment[:, part]  # minus half of the gradient
                inner = self.moment[part, part]
                for i in range(part.stop - start):
                    step, column = grid[:, start + i], now[:, start + i]
                    wanted = column + pull[:, i] / (inner[i, i] * step)
                    moves = mask[:, start + i] & (step > 0) & torch.isfinite(wanted)
                    new = torch.where(moves, wanted.round().clamp(-top, top), column)
                    pull -= ((new - column) * step)[:, None] * inner[i]
                    now[:, start + i] = new
        return now


_FINITE = (-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
