"""Bit allocation: measure the harm of each group of layers, and give bits where they count."""
