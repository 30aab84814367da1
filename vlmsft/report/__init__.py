"""Comparing runs: reading them, tables, plots, a page of HTML. Nothing here imports torch or NeMo."""
