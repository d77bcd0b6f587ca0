"""Quantizers: modules that fake-quantize a weight or the input of a layer."""

from noisyq_fast.quantizers.absmax import AbsMax
from noisyq_fast.quantizers.fixed import Fixed
from noisyq_fast.quantizers.moving_absmax import MovingAbsMax
from noisyq_fast.quantizers.quantizer import Quantizer

__all__ = ["AbsMax", "Fixed", "MovingAbsMax", "Quantizer"]
