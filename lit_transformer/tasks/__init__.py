"""One LightningModule per task."""

from lit_transformer.tasks.causal_lm import LitCausalLM
from lit_transformer.tasks.pretrained import LitPretrained

__all__ = ["LitCausalLM", "LitPretrained"]
