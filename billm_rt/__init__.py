"""Run `.billm` models: `load` one, then `generate`, `logits` or `forward`. Needs NumPy; never torch or transformers."""

from billm_rt.cache import KVCache
from billm_rt.generate import Chunk, GenerationStats
from billm_rt.model import Model, load
from billm_rt.sampling import Sampling

__all__ = ["Chunk", "GenerationStats", "KVCache", "Model", "Sampling", "load"]
