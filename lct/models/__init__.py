"""Llama: configs, parameters, forward, adapters and generation."""
