"""Conversion of whole models, and which of their layers come first and last."""
