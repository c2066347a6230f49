"""A Llama in Hugging Face transformers, which the golden makers compare with. Needs the 'oracle' extra."""

import torch
import transformers


def open_model(folder):
    """The float32 model of a folder; every tensor must have been used."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise ValueError(f'{folder} does not load cleanly: {problems}')
    return model.eval()
