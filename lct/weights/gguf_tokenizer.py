"""The tokenizer in the metadata of a GGUF file, as the files of a Hugging Face folder."""

from typing import Any

from lct.data import tokenizer_json
from lct.models.llama import LlamaConfig
from lct.weights import gguf_files


def read_companions(file: gguf_files.File, config: LlamaConfig) -> dict[str, Any]:
    """{file name: JSON object} of the Hugging Face files that the metadata of a file is equivalent to."""
    values = file.metadata
    tokens, types, merges = _read_vocabulary(file, config.vocab_size)
    ids = _read_special_ids(file, len(tokens))
    bos = ids['bos'] if values.get('tokenizer.ggml.add_bos_token') else None
    try:
        definition = tokenizer_json.from_gguf(tokens, types, merges, values.get('tokenizer.ggml.pre'), bos)
    except ValueError as error:
        raise ValueError(f'{file.path}: {error}') from None
    special = {'bos_token': ids['bos'], 'eos_token': ids['eos'], 'unk_token': ids['unknown'],
               'pad_token': ids['padding']}
    settings = {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
        'model_max_length': config.max_position_embeddings,
        **{key: tokens[i] for key, i in special.items() if i is not None},
    }
    if 'tokenizer.chat_template' in values:
        settings['chat_template'] = values['tokenizer.chat_template']
    config_ids = _config_ids(ids)
    return {'tokenizer.json': definition, 'tokenizer_config.json': settings,
            'generation_config.json': config_ids, 'config.json': config_ids}


def _read_vocabulary(file, vocab_size):
    """(tokens, their types, merges) of a byte-level BPE of at most vocab_size tokens."""
    path, values = file.path, file.metadata
    kind = values.get('tokenizer.ggml.model')
    if kind != 'gpt2':
        raise ValueError(f"{path}: tokenizer.ggml.model is {kind!r} and only 'gpt2' (byte-level BPE) is "
                         'supported; give the Hugging Face folder of the model (convert_weights.py '
                         '--tokenizer-from FOLDER)')
    tokens, types, merges = (
        values.get(f'tokenizer.ggml.{key}') for key in ('tokens', 'token_type', 'merges'))
    if not all(isinstance(x, list) for x in (tokens, types, merges)) or len(tokens) != len(types):
        raise ValueError(f'{path}: tokenizer.ggml.tokens, .token_type and .merges must be lists, the first '
                         'two of one length; use the Hugging Face folder of the model')
    if len(tokens) > vocab_size:
        raise ValueError(f'{path}: tokenizer.ggml.tokens has {len(tokens)} tokens but the embedding has '
                         f'{vocab_size} rows; use the Hugging Face folder of the model')
    return tokens, types, merges


def _read_special_ids(file, num_tokens):
    """{'bos', 'eos', ...: id or None}."""
    ids = {}
    for name in ('bos', 'eos', 'eot', 'eom', 'unknown', 'padding'):
        ids[name] = file.metadata.get(f'tokenizer.ggml.{name}_token_id')
        if ids[name] is not None and not 0 <= ids[name] < num_tokens:
            raise ValueError(
                f'{file.path}: tokenizer.ggml.{name}_token_id {ids[name]} is not in 0..{num_tokens - 1}; use '
                'the Hugging Face folder of the model')
    return ids


def _config_ids(ids):
    """The token ids of a config.json; a model that stops at several tokens has a list of them."""
    stops = [ids[name] for name in ('eos', 'eot', 'eom') if ids[name] is not None]
    result = {'bos_token_id': ids['bos'], 'pad_token_id': ids['padding'],
              'eos_token_id': list(dict.fromkeys(stops)) if len(set(stops)) > 1 else ids['eos']}
    return {key: value for key, value in result.items() if value is not None}
