"""Predictions for machines that are not present: memory, time and cost, by a model and by their compilers."""
