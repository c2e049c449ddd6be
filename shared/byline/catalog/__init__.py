"""Corpora and their items: where they come from, where their bytes lie, and how they are withdrawn."""
