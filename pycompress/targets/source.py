"""``Source``: a model on its way to a target, as the program of plain torch operators that targets convert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.export
from torch import Tensor, nn

from pycompress.calls import Inputs, evaluating
from pycompress.flat_call import Dynamic, Flat, FlatCall, Refused, at_least_two, dimensions, flat_call, output_names
from pycompress.nn import CompressedLayer
from pycompress.passes import whole
from pycompress.state import unwatched
from pycompress.surgery import compressed_layers, swap


@dataclass(frozen=True)
class Source:
    """A model with compressed layers, and a call of it.

    Attributes:
        model, inputs: as they were given.
        call: the tensors in the inputs, by name.
        sizes: the names of the dimensions of each tensor that may have other sizes; empty: none.
        layers: the compressed layers, by name.
        outputs: the tensors that the model returned, in its order, float64 copies of those in floating point.
        output_names: what the model calls them.
    """

    model: nn.Module
    inputs: Inputs
    call: FlatCall
    sizes: dict[str, dict[int, str]]
    layers: dict[str, CompressedLayer]
    outputs: list[Tensor] = field(repr=False)
    output_names: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, dynamic: Dynamic | None) -> Source:
        """Runs the model once. Raises as :func:`pycompress.deploy`."""
        layers = compressed_layers(model)
        if not layers:
            raise ValueError("deploy: the model has no compressed layer, expected one that compress() has made")
        call = flat_call(model, inputs)
        sizes = dimensions(call.tensors, dynamic)
        found = outputs_of(model, inputs, call)
        return cls(model, inputs, call, sizes, layers, [*found.values()], tuple(found))

    def program(
        self, twin: Callable[[str, CompressedLayer], nn.Module], *, dynamic: bool = True
    ) -> torch.export.ExportedProgram:
        """The model in evaluation mode, with a module of plain torch operators in the place of each compressed layer.

        Blocks and other parts that run as one op are traced as the modules that they were; the model is left as it was.

        Args:
            twin: makes that module; layers that are one module are one twin.
            dynamic: whether the free dimensions stay free; else all sizes are those of the example.
        Raises:
            RuntimeError: torch.export could not trace the model.
        """
        sizes = self.sizes if dynamic else {name: {} for name in self.sizes}
        shapes = tuple(dict.fromkeys(own, torch.export.Dim.DYNAMIC) for own in sizes.values())
        tensors = tuple(at_least_two(x, sizes[name]) for name, x in self.call.tensors.items())
        twins = {layer: twin(name, layer).eval() for name, layer in self.layers.items()}
        with whole.without(self.model), evaluating(self.model, self.inputs), unwatched(), _swapped(self.model, twins):
            flat = Flat(twins.get(self.model, self.model), self.call).eval()  # type: ignore[call-overload]
            try:
                return torch.export.export(flat, tensors, dynamic_shapes={"tensors": shapes}, strict=False)
            except Refused:
                raise
            except Exception as error:
                head = str(error).strip().partition("\n\n")[0][:1000] or type(error).__name__
                raise RuntimeError(f"deploy: torch.export could not trace the model: {head}") from error


def outputs_of(model: nn.Module, inputs: Inputs, call: FlatCall) -> dict[str, Tensor]:
    """What the model gives in evaluation mode, in the order of :class:`~pycompress.flat_call.Flat`."""
    paths: list[str] = []
    flat = Flat(model, call, paths).eval()
    with evaluating(model, inputs):
        found = flat(*call.tensors.values())
        wide = [y.detach().to("cpu", torch.float64 if y.is_floating_point() else y.dtype, copy=True) for y in found]
    return dict(zip(output_names(paths, call.tensors), wide, strict=True))


@contextmanager
def _swapped(model: nn.Module, twins: Mapping[CompressedLayer, nn.Module]) -> Iterator[None]:
    """In the block the twins stand in the places of the layers inside of the model."""
    undo = swap(model, {layer: twin for layer, twin in twins.items() if layer is not model})
    try:
        yield
    finally:
        undo()
