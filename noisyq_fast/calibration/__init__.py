"""Calibration and post-training quantization: with inputs, without labels, without training."""

from noisyq_fast.calibration.bitsplit import bitsplit
from noisyq_fast.calibration.dfq import dfq
from noisyq_fast.calibration.easyquant import easyquant
from noisyq_fast.calibration.input_ranges import METHODS, calibrate
from noisyq_fast.calibration.ocs import ocs

__all__ = ["METHODS", "bitsplit", "calibrate", "dfq", "easyquant", "ocs"]
