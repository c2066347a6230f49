"""Training: stages, steps and checkpoints that extend the context of a model."""
