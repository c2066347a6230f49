"""Answers over HTTP, as common clients ask for them: a model, its queue, and the texts that it has read."""
