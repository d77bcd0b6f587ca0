"""From a grid of options to finished runs."""
