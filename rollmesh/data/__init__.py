"""Datasets and model folders: rows, their order, rendered prompts, and the facts in a model's folder."""
