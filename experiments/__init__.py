"""Training under label noise: `python experiments/run.py --help`."""
