"""Quantized networks as ONNX files."""

from noisyq_fast.exporting.export import Export, export_onnx

__all__ = ["Export", "export_onnx"]
