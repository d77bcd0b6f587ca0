"""Operators on tensors: declared once, with checks of their arguments, gradients and vmap rules."""
