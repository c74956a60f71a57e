"""Training on several devices: what Lightning's strategies leave to the model, and what they do not do.

>>> from lit_transformer.strategies import FSDP2, TensorParallel, deferred_weights
"""

from lit_transformer.strategies.deferred import deferred_weights
from lit_transformer.strategies.model_parallel import FSDP2, TensorParallel

__all__ = ["FSDP2", "TensorParallel", "deferred_weights"]
