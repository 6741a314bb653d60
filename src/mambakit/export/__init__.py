"""Models for other runtimes: `mambakit.export.onnx` writes a layer as an ONNX file."""

from mambakit.export.onnx_file import onnx

__all__ = ["onnx"]
