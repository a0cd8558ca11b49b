"""An ONNX file as an ``nn.Module``: layers, and a graph that calls them and the functions in :mod:`pycompress.onnx.operators`."""
