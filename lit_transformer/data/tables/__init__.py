"""Rows of tables, and what of them can be used."""
