"""Fast, exact quantization-aware training for PyTorch."""

from importlib import metadata as _metadata

from noisyq_fast.backends import current_backend, use_backend
from noisyq_fast.calibration import bitsplit, calibrate, dfq, easyquant, ocs
from noisyq_fast.conversion.classes import register_layer
from noisyq_fast.conversion.convert import dequantize_model_, quantize_model_
from noisyq_fast.data_parallel import sync_ranges_
from noisyq_fast.environment import info
from noisyq_fast.exporting import Export, export_onnx
from noisyq_fast.files.integer_files import load_integers, save_integers
from noisyq_fast.grid import Grid
from noisyq_fast.integer.codes import Codes
from noisyq_fast.integer.fusing import fuse_
from noisyq_fast.integer.only import IntegerOnly
from noisyq_fast.layers.adder import AdderConv2d, AdderLinear, QuantAdderConv2d, QuantAdderLinear
from noisyq_fast.layers.attention import QuantMultiheadAttention
from noisyq_fast.layers.convolution import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from noisyq_fast.layers.grouped import GroupedLinear, QuantGroupedLinear
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.layers.linear import QuantEmbedding, QuantLinear
from noisyq_fast.operators.quantize import (
    dequantize,
    fake_quantize,
    fake_quantize_ema,
    fake_quantize_many,
    quantize,
)
from noisyq_fast.optimizing import constrain_, parameter_groups
from noisyq_fast.quantizers import (
    AQD,
    DSQ,
    LSQ,
    PACT,
    QIL,
    SAT,
    AbsMax,
    EvenlySpaced,
    Fixed,
    LearnedQuantizer,
    MovingAbsMax,
    Quantizer,
)
from noisyq_fast.ranges import disabled, freeze_ranges_, freeze_weights_, reset_ranges_
from noisyq_fast.summarizing import LayerSummary, OperatorSummary, Summary, summary
from noisyq_fast.widths import BatchNormOfWidths, ManyWidths, set_bits, single_width, split_norms_

try:
    __version__ = _metadata.version("noisyq_fast")
except _metadata.PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AQD",
    "DSQ",
    "LSQ",
    "PACT",
    "QIL",
    "SAT",
    "AbsMax",
    "AdderConv2d",
    "AdderLinear",
    "BatchNormOfWidths",
    "Codes",
    "EvenlySpaced",
    "Export",
    "Fixed",
    "Grid",
    "GroupedLinear",
    "IntegerOnly",
    "LayerSummary",
    "LearnedQuantizer",
    "ManyWidths",
    "MovingAbsMax",
    "OperatorSummary",
    "QuantAdderConv2d",
    "QuantAdderLinear",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantEmbedding",
    "QuantGroupedLinear",
    "QuantLayer",
    "QuantLinear",
    "QuantMultiheadAttention",
    "Quantizer",
    "Summary",
    "bitsplit",
    "calibrate",
    "constrain_",
    "current_backend",
    "dequantize",
    "dequantize_model_",
    "dfq",
    "disabled",
    "easyquant",
    "export_onnx",
    "fake_quantize",
    "fake_quantize_ema",
    "fake_quantize_many",
    "freeze_ranges_",
    "freeze_weights_",
    "fuse_",
    "info",
    "load_integers",
    "ocs",
    "parameter_groups",
    "quantize",
    "quantize_model_",
    "register_layer",
    "reset_ranges_",
    "save_integers",
    "set_bits",
    "single_width",
    "split_norms_",
    "summary",
    "sync_ranges_",
    "use_backend",
]
