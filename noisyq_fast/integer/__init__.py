"""Layers that compute with integer codes, and chains of them."""
