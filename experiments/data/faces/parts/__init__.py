"""What a face is made of: each part draws itself as its action units ask."""

from experiments.data.faces.parts import brows, cheeks, chin, eyes, head, mouth, nose

PARTS = (head, cheeks, nose, chin, mouth, eyes, brows)
"""From back to front."""
