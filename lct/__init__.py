"""lct: long-context transformers in JAX. See README.md for the tour of the code."""
