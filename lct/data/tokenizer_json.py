"""The tokenizer.json of the Hugging Face tokenizers library, for a byte-level BPE in another format.

That is either the lists of a GGUF file or Meta's tokenizer.model.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lct.data.tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIALS
from lct.data.tokenizer_files import read_bytes, read_mergeable_ranks

BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
LLAMA3 = [{'type': 'Split', 'pattern': {'Regex': LLAMA3_PATTERN}, 'behavior': 'Isolated', 'invert': False},
          {**BYTE_LEVEL, 'use_regex': False}]
PRE_TOKENIZERS = {  # llama.cpp's name -> pre-tokenizers
    'llama-bpe': LLAMA3, 'llama3': LLAMA3, 'llama-v3': LLAMA3,
    'smollm': [{'type': 'Digits', 'individual_digits': True}, {**BYTE_LEVEL, 'use_regex': True}],
    'gpt-2': [{**BYTE_LEVEL, 'use_regex': True}],
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of GGUF


def from_gguf(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str,
              bos: int | None = None) -> dict[str, Any]:
    """The tokenizer.json of the lists in a GGUF file's metadata.

    Args:
      tokens: strings by id, spelled in GPT-2's byte alphabet; special tokens as plain text.
      types: their GGUF types.
      merges: 'left right', by priority.
      pre: llama.cpp's name of the pre-tokenizer.
      bos: id that is put before every text, or None.
    Raises:
      ValueError: for an unknown pre-tokenizer or inconsistent lists.
    """
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f'pre-tokenizer {pre!r} is unknown; known are {", ".join(PRE_TOKENIZERS)}')
    odd = {kind for kind in types if kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED)}
    if odd:
        raise ValueError(f'a byte-level BPE has no tokens of the GGUF types {sorted(odd)}; use the '
                         "model's own tokenizer.json")
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind != UNUSED}
    if len(vocab) + types.count(UNUSED) != len(tokens):
        raise ValueError('the vocabulary has the same token twice; fetch the file again')
    for merge in merges:
        left, _, right = merge.partition(' ')
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ValueError(f'the merge {merge!r} does not join two tokens of the vocabulary into a third; '
                             'fetch the file again')
    added = [(i, token, kind != USER_DEFINED) for i, (token, kind) in enumerate(zip(tokens, types))
             if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    return _definition(vocab, merges, added, PRE_TOKENIZERS[pre], bos)


def from_tiktoken(path: str | os.PathLike) -> dict[str, Any]:
    """The tokenizer.json of Meta's Llama-3 tokenizer.model, with the special tokens of Llama-3.1.

    Ranks give the priority of a token but not its two halves, so every split of a token into two others
    becomes a merge.
    """
    path = Path(path)
    ranks = read_mergeable_ranks(path, read_bytes(path))
    merges = sorted((rank, ranks[token[:cut]], ranks[token[cut:]])
                    for token, rank in ranks.items() for cut in range(1, len(token))
                    if token[:cut] in ranks and token[cut:] in ranks)
    letters = byte_alphabet()
    spelled = {rank: ''.join(letters[byte] for byte in token) for token, rank in ranks.items()}
    added = [(len(ranks) + i, name, True) for i, name in enumerate(LLAMA3_SPECIALS)]
    return _definition({spelled[rank]: rank for rank in range(len(ranks))},
                       [f'{spelled[left]} {spelled[right]}' for _, left, right in merges],
                       added, LLAMA3, bos=len(ranks))


def companions_of_tiktoken(path: str | os.PathLike, positions: int) -> dict[str, Any]:
    """{file name: JSON object} of the Hugging Face files that stand for Meta's Llama-3 tokenizer.model: the
    tokenizer.json, its settings, and the token ids of a config.json. Meta's folders do not say whether a
    model is an instruct one, so there is no chat template, and a text ends at <|end_of_text|>.

    positions: of the model, for model_max_length.
    """
    definition = from_tiktoken(path)
    ids = {token['content']: token['id'] for token in definition['added_tokens']}
    bos, eos = LLAMA3_SPECIALS[:2]
    token_ids = {'bos_token_id': ids[bos], 'eos_token_id': ids[eos]}
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': bos, 'eos_token': eos,
                'clean_up_tokenization_spaces': False, 'model_max_length': positions}
    return {'tokenizer.json': definition, 'tokenizer_config.json': settings,
            'generation_config.json': token_ids, 'config.json': token_ids}


def byte_alphabet() -> list[str]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 as itself, others from U+0100 on."""
    printable = {*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _definition(vocab: dict[str, int], merges: Sequence[str], added: list[tuple[int, str, bool]],
                pre_tokenizers: list[dict], bos: int | None) -> dict[str, Any]:
    """The JSON object. added: (id, text, is special) of tokens that are matched before pre-tokenization."""
    post = None
    if bos is not None:
        text = next(text for i, text, _ in added if i == bos)
        first, second = (
            [{'SpecialToken': {'id': text, 'type_id': i}}, {'Sequence': {'id': name, 'type_id': i}}]
            for i, name in enumerate('AB'))
        post = {'type': 'TemplateProcessing', 'single': first, 'pair': first + second,
                'special_tokens': {text: {'id': text, 'ids': [bos], 'tokens': [text]}}}
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    return {
        'version': '1.0', 'truncation': None, 'padding': None,
        'added_tokens': [
            {'id': i, 'content': text, **flags, 'special': special} for i, text, special in added],
        'normalizer': None,
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': pre_tokenizers},
        'post_processor': post,
        'decoder': {**BYTE_LEVEL, 'use_regex': True},
        'model': {
            'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
            'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False,
            'ignore_merges': pre_tokenizers is LLAMA3,  # tiktoken: a word that is a token becomes that token
            'vocab': vocab, 'merges': merges,
        },
    }
