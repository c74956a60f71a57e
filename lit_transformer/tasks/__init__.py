"""One LightningModule per task."""

from lit_transformer.tasks.causal_lm import LitCausalLM
from lit_transformer.tasks.classifier import LitClassifier
from lit_transformer.tasks.masked_lm import LitMaskedLM
from lit_transformer.tasks.pretrained import LitPretrained
from lit_transformer.tasks.seq2seq import LitSeq2Seq

__all__ = ["LitCausalLM", "LitClassifier", "LitMaskedLM", "LitPretrained", "LitSeq2Seq"]
