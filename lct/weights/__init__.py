"""Weights of Llama checkpoints: Hugging Face, Meta and GGUF files, read onto the mesh and written back."""
