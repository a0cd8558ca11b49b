"""A whole model with its compressed layers as one ONNX file."""

from __future__ import annotations

import json
from dataclasses import asdict

try:
    import onnx_ir  # noqa: F401
    import onnxscript  # noqa: F401 - what torch.onnx converts with
except ImportError as error:
    raise ImportError(f'pycompress.export needs onnxscript ({error}): pip install "pycompress[onnx]"') from error

from onnx import helper
from torch import nn

from pycompress import __version__
from pycompress.calls import Inputs, uncompiled
from pycompress.flat_call import Dynamic, dimensions, flat_call
from pycompress.nn.trained import is_trained
from pycompress.onnx import lowering_of
from pycompress.onnx.exported import KEY, VERSION
from pycompress.onnx.graph import KERNELS_DOMAIN, KERNELS_VERSION, OPSET
from pycompress.onnx.spliced import Lowerings, Splice
from pycompress.onnx.stored import write
from pycompress.onnx.traced import DOMAIN, traced
from pycompress.replacing import FilePath
from pycompress.storage.plan import entry_of
from pycompress.surgery import compressed_layers


def export_model(model: nn.Module, path: FilePath, example_inputs: Inputs, dynamic: Dynamic | None, form: str) -> None:
    """See :func:`pycompress.export`; ``form`` is one of :data:`pycompress.onnx.TABLES`."""
    model = uncompiled(model)
    if twin := next((name for name, module in model.named_modules() if is_trained(module)), None):
        raise ValueError(
            f"export: {twin or 'the model'} is prepared, expected compress(model) first, which freezes what was trained"
        )
    layers = compressed_layers(model)
    if not layers:
        raise ValueError("export: the model has no compressed layer; export a dense model with torch.onnx itself")
    call = flat_call(model, example_inputs)
    sizes = dimensions(call.tensors, dynamic)
    lowerings = Lowerings(lambda layer: lowering_of(layer, form))
    lowered = {name: lowerings.lowered(name, layer) for name, layer in layers.items()}
    opset = max(OPSET, *(one.graph.opset for one in lowered.values()))
    proto, outputs = traced(model, example_inputs, call, sizes, layers, opset)
    places = Splice(proto, lowerings, lowered).run(layers)
    proto.opset_imports.pop(DOMAIN, None)
    if any(node.domain == KERNELS_DOMAIN for one in lowered.values() for node in one.graph.nodes):
        proto.opset_imports[KERNELS_DOMAIN] = KERNELS_VERSION
    proto.ir_version = helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
    proto.producer_name, proto.producer_version = DOMAIN, __version__
    entries = {
        name: {**entry_of(layers[name]), "tokens": layers[name].kind.tokens, **asdict(own[0])}
        for name, own in places.items()
        if own
    }
    proto.metadata_props[KEY] = json.dumps(
        {"version": VERSION, "pycompress": __version__, "form": form, "outputs": outputs, "layers": entries}
    )
    write(proto, path)
