"""Datasets: reading rows, the order they are used in, and rendering them into prompts."""
