"""Table 1 of arXiv 2303.11803, how well facial action units (AUs) are told, from our runs."""
