"""Predictions for machines that are not present: memory and time, by cost models and by compilers."""
