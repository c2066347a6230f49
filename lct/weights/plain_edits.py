"""What a conversion does to the tensors of a Hugging Face folder on the way, done again for its check."""

import json
import os
import re

import numpy as np

from lct.weights.plain_readers import Tensors, read_file


def with_adapter(tensors: Tensors, folder: str | os.PathLike) -> Tensors:
    """The tensors of a model with a PEFT adapter merged: W + alpha / r * B @ A."""
    with open(os.path.join(folder, 'adapter_config.json'), encoding='utf-8') as file:
        settings = json.load(file)
    stored = {name.removeprefix('base_model.model.'): read for name, read in read_file(
        os.path.join(folder, 'adapter_model.safetensors')).items()}
    full = {name.replace('.base_layer', ''): read for name, read in stored.items() if '.lora_' not in name}
    result = tensors | full
    for name, read_a in stored.items():
        match = re.fullmatch(r'(.+)\.lora_(embedding_)?A(\.weight)?', name)
        if match is not None:
            key, other = match[1] + '.weight', name.replace('lora_A', 'lora_B').replace('ng_A', 'ng_B')
            result[key] = _sum(result[key], read_a, stored[other], settings, match[1], bool(match[2]))
    return result


def _sum(read, read_a, read_b, settings, module, is_embedding):
    def summed():
        a, b = read_a().astype(np.float64), read_b().astype(np.float64)
        r, alpha = len(a), settings['lora_alpha']
        for pattern, value in (settings.get('alpha_pattern') or {}).items():
            if re.match(rf'(.*\.)?({pattern})$', module):
                alpha = value
                break
        product = b @ a * (alpha / (np.sqrt(r) if settings.get('use_rslora') else r))
        return (read().astype(np.float64) + (product.T if is_embedding else product)).astype(np.float32)
    summed.rounded = True  # not to the last bit
    return summed


def with_rows(tensors: Tensors, num_rows: int) -> Tensors:
    """The tensors of a model with rows added to its embedding and its head, the mean of those before them."""
    def longer(read):
        def padded():
            rows = read().astype(np.float32)
            mean = rows.mean(0, dtype=np.float64, keepdims=True).astype(np.float32)
            return np.concatenate([rows, np.repeat(mean, num_rows - len(rows), 0)])
        padded.rounded = True
        return padded

    names = [name for name in ('model.embed_tokens.weight', 'lm_head.weight') if name in tensors]
    return tensors | {name: longer(tensors[name]) for name in names}
