"""Inference on sequences of frames that reuses what did not change (Xu et al. 2017, DeepCache,
arXiv 1712.01670)."""

from experiments.deepcache.cached_inference import CachedInference

__all__ = ["CachedInference"]
