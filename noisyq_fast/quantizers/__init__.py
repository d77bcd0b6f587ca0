"""Quantizers: modules that fake-quantize a weight or the input of a layer."""

from noisyq_fast.quantizers.absmax import AbsMax
from noisyq_fast.quantizers.aqd import AQD
from noisyq_fast.quantizers.dsq import DSQ
from noisyq_fast.quantizers.evenly_spaced import EvenlySpaced
from noisyq_fast.quantizers.fixed import Fixed
from noisyq_fast.quantizers.learned import LearnedQuantizer
from noisyq_fast.quantizers.lsq import LSQ
from noisyq_fast.quantizers.moving_absmax import MovingAbsMax
from noisyq_fast.quantizers.pact import PACT
from noisyq_fast.quantizers.qil import QIL
from noisyq_fast.quantizers.quantizer import Quantizer
from noisyq_fast.quantizers.sat import SAT

__all__ = [
    "AQD",
    "DSQ",
    "LSQ",
    "PACT",
    "QIL",
    "SAT",
    "AbsMax",
    "EvenlySpaced",
    "Fixed",
    "LearnedQuantizer",
    "MovingAbsMax",
    "Quantizer",
]
