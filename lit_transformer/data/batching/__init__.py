"""Which samples come when, side by side in which batch."""
