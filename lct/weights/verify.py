"""The check of a conversion: source and target are read by plain_readers, not by what wrote the target, each
in its own dtypes, and compared tensor by tensor and field by field."""

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lct.weights import plain_readers

HEAD, EMBED = 'lm_head.weight', 'model.embed_tokens.weight'
READERS = {'hf': plain_readers.hf, 'meta': plain_readers.meta, 'gguf': plain_readers.gguf,
           'orbax': plain_readers.orbax}
SIZES = {  # fact -> (its name in config.json, in params.json, in GGUF metadata after the architecture)
    'vocab_size': ('vocab_size', 'vocab_size', 'vocab_size'),
    'embed_dim': ('hidden_size', 'dim', 'embedding_length'),
    'mlp_dim': ('intermediate_size', None, 'feed_forward_length'),
    'num_layers': ('num_hidden_layers', 'n_layers', 'block_count'),
    'num_heads': ('num_attention_heads', 'n_heads', 'attention.head_count'),
    'num_kv_heads': ('num_key_value_heads', 'n_kv_heads', 'attention.head_count_kv'),
    'head_dim': ('head_dim', None, 'attention.key_length'),
    'norm_eps': ('rms_norm_eps', 'norm_eps', 'attention.layer_norm_rms_epsilon'),
    'positions': ('max_position_embeddings', None, 'context_length'),
}
TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
SPELLED = ('model_type', 'sliding_window', 'layer_types', 'no_rope_layers')  # compared where both state them


class Report(NamedTuple):
    """What a check found equal. casts: {(dtype of the source, of the target): (tensors, largest difference
    that the cast alone makes)}, for the tensors that were cast."""

    num_tensors: int
    num_values: int
    casts: dict[tuple[str, str], tuple[int, float]]

    def __str__(self) -> str:
        text = (f'verified: {self.num_tensors} tensors, {self.num_values:,} numbers, and the config are '
                'those of the source')
        for (source, target), (count, difference) in sorted(self.casts.items()):
            text += (f'; {count} cast from {source} to {target}, which changes them by at most '
                     f'{difference:.1e}')
        return text


def check(source: str | os.PathLike, source_format: str, target: str | os.PathLike, target_format: str, *,
          edit: Callable[[plain_readers.Tensors], plain_readers.Tensors] | None = None,
          changed: tuple[str, ...] = ()) -> Report:
    """Compare the files of a source with those that it was converted to.

    Args:
      source_format, target_format: keys of READERS.
      edit: what the conversion was to do to the tensors of a Hugging Face source, such as merging an adapter.
      changed: facts of the config that it was to change.
    Raises:
      ValueError: naming the first field or tensor that differs.
    """
    facts = [read_facts(path, name) for path, name in ((source, source_format), (target, target_format))]
    _compare_facts(*facts, changed, target)
    before = READERS[source_format](source) if edit is None else plain_readers.hf(source, edit)
    after = READERS[target_format](target)
    before, after = (_with_head(tensors, fact['tied']) for tensors, fact in zip((before, after), facts))
    if set(before) != set(after):
        name = sorted(set(before) ^ set(after))[0]
        raise ValueError(f'{target} {"lacks" if name in before else "adds"} tensor {name!r}; it is not a '
                         f'copy of {source}')
    casts, count = {}, 0
    for name, read in before.items():
        values, written = read(), after[name]()
        count += written.size
        difference = _compare(values, written, name, target, exact=not getattr(read, 'rounded', False))
        if values.dtype != written.dtype:
            key = values.dtype.name, written.dtype.name
            number, largest = casts.get(key, (0, 0.0))
            casts[key] = number + 1, max(largest, difference)
    return Report(len(before), count, casts)


def _with_head(tensors, tied):
    """The tensors with a head of their own: a tied one is the embedding, whatever the file says."""
    return tensors | ({HEAD: tensors[EMBED]} if tied or HEAD not in tensors else {})


def _compare(values, written, name, target, exact):
    """The largest difference that the cast makes. Raises ValueError unless written is values in its dtype.

    exact: whether to the last bit; otherwise to the last place, for values that are sums.
    """
    if values.shape != written.shape:
        raise ValueError(f'{target}: tensor {name!r} has shape {list(written.shape)} instead of '
                         f'{list(values.shape)}; convert it again')
    cast = values.astype(written.dtype)
    bits = f'u{cast.dtype.itemsize}'
    differs = np.ascontiguousarray(cast).view(bits) != np.ascontiguousarray(written).view(bits)
    wide = cast.astype(np.float32)
    if differs.any():
        error, eps = np.abs(written.astype(np.float32) - wide), float(ml_dtypes.finfo(cast.dtype).eps)
        if exact or not (error <= eps * np.abs(wide) + 1e-6 * np.abs(wide).max()).all():
            raise ValueError(
                f'{target}: tensor {name!r} differs from the one of the source in '
                f'{np.count_nonzero(differs):,} of {differs.size:,} numbers, by up to {error.max():.1e} '
                f'beyond the cast to {written.dtype.name}; convert it again')
    return float(np.abs(wide - values.astype(np.float32)).max())


# ---------------------------------------------------------------------------------------------------
# The config
# ---------------------------------------------------------------------------------------------------


def read_facts(source: str | os.PathLike, name: str) -> dict[str, Any]:
    """What the config of a source says, {fact: value}; None for what its format does not say."""
    if name == 'gguf':
        return _gguf_facts(source)
    if name == 'meta':
        return _meta_facts(source)
    return _hf_facts(source)


def _compare_facts(before, after, changed, target):
    for name, value in before.items():
        other = after.get(name)
        lost = name in TOKEN_IDS and name in after and other is None
        unknown = value is None or other is None and not lost
        if name in ('tied', *changed) or unknown or _close(value, other):
            continue
        raise ValueError(f'{target}: {name} is {other!r} but {value!r} in the source; convert it again')


def _close(a, b):
    """Whether two facts are equal; GGUF stores floats in 32 bits."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_close, a, b))
    return a == b or isinstance(a, float) and isinstance(b, (int, float)) and abs(a - b) <= 1e-6 * abs(a)


def _read_json(path):
    with open(path, encoding='utf-8') as file:
        return json.load(file)


def _hf_facts(folder):
    values, tokenizer = _read_json(os.path.join(folder, 'config.json')), {}
    if os.path.exists(path := os.path.join(folder, 'tokenizer_config.json')):
        tokenizer = _read_json(path)
    facts = {fact: values.get(names[0]) for fact, names in SIZES.items()}
    facts['num_kv_heads'] = facts['num_kv_heads'] or facts['num_heads']
    facts['head_dim'] = facts['head_dim'] or facts['embed_dim'] // facts['num_heads']
    facts['norm_eps'] = float(facts['norm_eps'] or 1e-6)
    scaling = {**(values.get('rope_scaling') or {}), **(values.get('rope_parameters') or {})}
    if (scaling.get('rope_type') or scaling.get('type')) == 'linear':
        product = scaling['factor'] * facts['positions']
        if product in (values.get('max_sequence_length'), tokenizer.get('model_max_length')):
            facts['positions'] = product
    facts['rope_theta'] = float(values.get('rope_theta') or scaling.get('rope_theta') or 10000.0)
    facts['rope_type'] = scaling.get('rope_type') or scaling.get('type') or 'default'
    for key in ('factor', 'low_freq_factor', 'high_freq_factor', 'attention_factor', 'beta_fast', 'beta_slow',
                'long_factor', 'short_factor', 'original_max_position_embeddings'):
        facts[f'rope {key}'] = scaling.get(key)
    facts['tied'] = bool(values.get('tie_word_embeddings'))
    return facts | {key: values.get(key) for key in (*TOKEN_IDS, *SPELLED)}


def _meta_facts(folder):
    """Those of params.json, and of the config.json beside it for what params.json does not say."""
    values = _read_json(os.path.join(folder, 'params.json'))
    facts = _hf_facts(folder) if os.path.exists(os.path.join(folder, 'config.json')) else {}
    for fact, (_, key, _) in SIZES.items():
        if key is not None:
            facts[fact] = values.get(key)
    facts['num_kv_heads'] = facts['num_kv_heads'] or facts['num_heads']
    facts['head_dim'] = facts['embed_dim'] // facts['num_heads']
    facts['rope_theta'] = float(values['rope_theta'])
    facts['rope_type'] = 'llama3' if values.get('use_scaled_rope') else 'default'
    width = int((values.get('ffn_dim_multiplier') or 1) * int(8 * values['dim'] / 3))
    facts['mlp_dim'] = -(-width // values['multiple_of']) * values['multiple_of']
    return facts | {'tied': False}


def _gguf_facts(path):
    import gguf as library

    reader = library.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    values = {key.partition('.')[2]: value for key, value in metadata.items()}
    facts = {fact: values.get(names[2]) for fact, names in SIZES.items()}
    facts['rope_theta'] = values.get('rope.freq_base')
    facts['rope_type'] = {'none': None}.get(kind := values.get('rope.scaling.type', 'none'), kind)
    facts['rope factor'] = values.get('rope.scaling.factor')
    facts['bos_token_id'] = metadata.get('tokenizer.ggml.bos_token_id')
    facts['pad_token_id'] = metadata.get('tokenizer.ggml.padding_token_id')
    return facts | {'tied': 'output.weight' not in {tensor.name for tensor in reader.tensors}}
