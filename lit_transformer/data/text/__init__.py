"""Text: found, checked, split, and tokenised once."""
