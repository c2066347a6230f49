"""Stages, steps, checkpoints: what turns a short-context checkpoint into a long one."""
