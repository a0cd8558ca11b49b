"""Scales that are learned with the weights on them: learned step sizes (LSQ, Esser et al. 2020, arXiv:1902.08153)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def logarithms(scale: Tensor) -> nn.Parameter:
    """What is learned: the logarithm of that by which each scale is multiplied, 0 in the beginning. So a scale stays positive, and
    a step of the optimizer changes it by a share of itself, however large it is."""
    return nn.Parameter(torch.zeros_like(scale, dtype=torch.float32))


def learned_scale(start: Tensor, log: Tensor) -> Tensor:
    """float32, a normal number; ``start`` itself as long as nothing was learned."""
    return (start * log.detach().exp()).clamp_(_SMALLEST, _LARGEST)


class _OnLearnedScale(torch.autograd.Function):
    """The image of rows of weights. Where a row's grid reaches, the gradient goes to the weight as it is, and the scale moves the
    image by ``image - weight``; beyond the ends of the grid it goes to the scale alone, which moves them.

    What stays until the way back is the image, which the layer keeps anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, log: Tensor, image: Tensor, scale: Tensor, zero_point: Tensor, top: int
    ) -> Tensor:
        del log
        ctx.top = top
        ctx.save_for_backward(rows, image, scale, zero_point)
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        rows, image, scale, zero_point = ctx.saved_tensors
        steps = (rows / scale).round_().add_(zero_point)
        within = torch.mul(gradient, (steps >= 0) & (steps <= ctx.top), out=steps)
        by_log = (gradient * image).addcmul_(within, rows, value=-1).sum(dim=1, keepdim=True)
        # LSQ's factor, for a sum over so many weights on a grid of so many steps.
        reach = torch.maximum(ctx.top - zero_point, zero_point)
        return within, by_log / (reach * rows.shape[1]).sqrt_(), None, None, None, None


def on_learned_scale(rows: Tensor, log: Tensor, image: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """The image of rows of weights, with gradients to them and to what is learned.

    Args:
        rows: float32 [groups, size]. image: the same, on the grid: (integer - zero_point) * scale with integers from 0 to ``top``.
        log: the parameter, float32 [groups, 1]. scale: the same, as it is now. zero_point: float32 [groups, 1].
    """
    return _OnLearnedScale.apply(rows, log, image, scale, zero_point, top)  # type: ignore[no-any-return]
