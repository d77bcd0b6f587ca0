"""Prints what is usable on this machine."""

import argparse
import os
import sys

from noisyq_fast.environment import info

argparse.ArgumentParser(
    prog="python -m noisyq_fast",
    description="Shows the versions, which backends are usable and why others are not, and which "
    "one runs each operator.",
).parse_args()
try:
    print(info(), flush=True)
except BrokenPipeError:  # the reader has gone, such as head
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
except OSError as error:
    # What could not be written stays in the buffer, and would fail again at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(f"error: standard output: {error.strerror}")
