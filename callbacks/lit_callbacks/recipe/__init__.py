"""What is wrong with how a model is about to be trained? Rules that read a trainer and a module."""

from lit_callbacks.recipe import data_rules, model_rules, optimization_rules  # noqa: F401 - they register themselves
from lit_callbacks.recipe.curve import learning_rates
from lit_callbacks.recipe.finding import IDS, Finding, check

__all__ = ["IDS", "Finding", "check", "learning_rates"]
