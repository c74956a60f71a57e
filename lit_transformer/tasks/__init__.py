"""One LightningModule per task."""

from lit_transformer.tasks.causal_lm import LitCausalLM

__all__ = ["LitCausalLM"]
