"""Conversion of whole models, and detection of their first and last layers."""
