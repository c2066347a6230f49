"""The tokenizers.Tokenizer of a folder, with the tokens and parts that transformers 5 gives it.

A tokenizer.json does not decide the ids alone: transformers builds some classes from its vocabulary and
merges (LlamaTokenizer, for one, marks only the first word of a text, whatever tokenizer.json says), and it
adds the tokens that other files name. Source: tokenization_utils_tokenizers.py and the files
models/*/tokenization_*.py of transformers 5.24.
"""

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lct.data import tokenizer_settings
from lct.data.tokenizer_files import library_errors
from lct.data.tokenizer_settings import AS_IS, Settings
from lct.json_files import short_repr

if TYPE_CHECKING:
    import tokenizers

LLAMA3_BOS = '<|begin_of_text|>'
EOS_NAMES = ('<|end_of_text|>', '</s>')
SUPPLEMENTARY = range(0x100000, 0x10FFFE)  # characters for private use
MARK = '▁'  # SentencePiece's for a space
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                 r'\s*[\r\n]+|\s+(?!\S)|\s+')
BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
# On these, a class that transformers builds must agree with tokenizer.json, from which the model learned.
PROBES = ("it's I'LL 12345 x1 ½", ' a  b\n\n c\t', 'e\u0301 ﬁ é 北京 🙂', 'don`t--stop!?\r\n', '#1,000.5%')


class Backend(NamedTuple):
    """library: without truncation, padding and dropout. bos_id: put before every text, or None. eos_id: ends
    a text, or None. changes: what differs from tokenizer.json, for a fingerprint; '' if nothing does.
    splits_special: whether special tokens are plain text even in a chat."""
    library: 'tokenizers.Tokenizer'
    bos_id: int | None
    eos_id: int | None
    changes: str
    splits_special: bool


def load(path: Path, definition: dict[str, Any]) -> Backend:
    """The Backend of a tokenizer.json in its folder.

    Raises:
      ValueError: if a file is not valid, if two contradict each other, or if transformers would decode a text
        to another.
    """
    settings = tokenizer_settings.read(path.parent, definition)
    failure = 'is not a tokenizer.json of the tokenizers library'
    with library_errors(path, failure):
        given = _read(path)
        before = _added(given)
    _check_named(path, given, definition, settings)
    with library_errors(path, failure):
        library = _build(given, definition, settings)
        _add_tokens(library, settings)
        # A file may state the truncation and padding of somebody's run; both would change the ids.
        library.no_truncation()
        library.no_padding()
        changes = '' if settings.class_name == AS_IS else settings.class_name + _components(library)
        changes += '' if _added(library) == before else str(_added(library))
    _check_class(path, given, library, settings)
    _check_ids(path, library, definition, settings)
    _check_decoding(path, library, settings)
    prefix, suffix = _surroundings(library)
    return Backend(library, _bos_id(path, library, definition, settings, prefix),
                   _eos_id(path, library, settings, suffix), changes,
                   settings.values.get('split_special_tokens') is True)


def encode_without(path: Path, library: 'tokenizers.Tokenizer', text: str, drop: str) -> list[int]:
    """The ids of text without the character drop, where an added token that holds drop is plain text.

    The added tokens that remain are spelled in characters for private use that the text lacks, and the others
    are not recognised; so one that strips spaces beside it does so here too.

    Raises:
      ValueError: for plain text that the tokenizer's model makes an added token.
    """
    from tokenizers import AddedToken
    added = [(i, token) for i, token in library.get_added_tokens_decoder().items() if token.content]
    escape = next(character for character in map(chr, SUPPLEMENTARY) if character not in text)
    spelled = {token.content: f'{escape}{i}{escape}' for i, token in added}
    twin = copy.deepcopy(library)
    with library_errors(path, 'cannot take more tokens'):
        twin.add_tokens([AddedToken(content, special=True) for content in spelled])
        twin.encode_special_tokens = True  # those are plain text
        twin.add_tokens([AddedToken(
            spelled[token.content], single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
            normalized=token.normalized) for _, token in added])
    ids = {twin.token_to_id(spelled[token.content]): i for i, token in added}
    pattern = '|'.join(map(re.escape, sorted(spelled, key=len, reverse=True))) or '(?!)'
    plain = text.replace(drop, '')
    escaped = {i: token.content for i, token in added
               if plain.count(token.content) > text.count(token.content)}
    text = re.sub(pattern, lambda match: spelled[match[0]], text).replace(drop, '')
    with library_errors(path, f'cannot encode a text of {len(text):,} characters'):
        encoded = twin.encode(text, add_special_tokens=False).ids
    if made := escaped.keys() & set(encoded):
        raise ValueError(f'the text {short_repr(escaped[min(made)])} in a message becomes the token of that '
                         'name in this tokenizer, even as plain text; leave it out')
    return [ids.get(i, i) for i in encoded]


def _read(path: Path) -> 'tokenizers.Tokenizer':
    """The library's tokenizer of a file as it is, but without dropout, which gives random ids."""
    from tokenizers import Tokenizer
    library = Tokenizer.from_file(str(path))
    if getattr(library.model, 'dropout', None):
        library.model.dropout = None
    return library


def _check_named(path: Path, library: 'tokenizers.Tokenizer', definition: dict[str, Any],
                 settings: Settings) -> None:
    """Refuse a BOS or EOS that would be a new token, and a class that cannot be built."""
    for name in ('bos_token', 'eos_token'):
        text = settings.spelling(name)
        if text is not None and text not in settings.contents | set(library.get_vocab()):
            raise ValueError(f'{path.parent} names {name} {short_repr(text)}, which tokenizer.json does not '
                             'have; correct one of the two files')
    if settings.class_name != AS_IS and definition['model'].get('type', 'BPE') != 'BPE':
        raise ValueError(f'{path.parent} has the tokenizer_class {settings.class_name}, which is a BPE, but '
                         f'tokenizer.json has a {definition["model"]["type"]}; write {AS_IS} into '
                         'tokenizer_config.json')


def _build(given: 'tokenizers.Tokenizer', definition: dict[str, Any],
           settings: Settings) -> 'tokenizers.Tokenizer':
    """The tokenizer of the class: the given one, or another from its vocabulary and merges."""
    from tokenizers import Tokenizer
    if settings.class_name == AS_IS:
        return given
    parts = _PARTS[settings.class_name](settings.values)
    flags = {'dropout': None, 'unk_token': None, 'ignore_merges': False, 'byte_fallback': False,
             'fuse_unk': False, 'continuing_subword_prefix': '', 'end_of_word_suffix': '', **parts['model']}
    return Tokenizer.from_str(json.dumps({
        **definition, **parts, 'added_tokens': [], 'model': {**definition['model'], **flags}}))


def _check_class(path: Path, given: 'tokenizers.Tokenizer', library: 'tokenizers.Tokenizer',
                 settings: Settings) -> None:
    """Refuse a byte-level class that contradicts tokenizer.json, by which the model was trained."""
    if settings.class_name in (AS_IS, 'LlamaTokenizer'):
        return
    for text in PROBES:
        ids = [model.encode(text, add_special_tokens=False).ids for model in (given, library)]
        if ids[0] != ids[1]:
            forced = settings.config.get('model_type') in tokenizer_settings.FORCED_TYPES
            remedy = ("correct it, since transformers makes this class of every tokenizer of the model's type"
                      if forced else f'write the tokenizer_class {AS_IS} into tokenizer_config.json to keep '
                      'to the file')
            raise ValueError(f'{path} gives {text!r} other ids than the {settings.class_name} that '
                             f'transformers makes of it; {remedy}')


def _llama(values: dict[str, Any]) -> dict[str, Any]:
    marks = values.get('add_prefix_space') in (None, True)
    scheme = ('always' if values.get('legacy') else 'first') if marks else 'never'
    decoders = [{'type': 'Replace', 'pattern': {'String': MARK}, 'content': ' '}, {'type': 'ByteFallback'},
                {'type': 'Fuse'}]
    if marks:
        decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
    return {
        'model': {'fuse_unk': True, 'byte_fallback': True, 'continuing_subword_prefix': None,
                  'end_of_word_suffix': None},
        'normalizer': None,
        'pre_tokenizer': {'type': 'Metaspace', 'replacement': MARK, 'prepend_scheme': scheme, 'split': False},
        'decoder': {'type': 'Sequence', 'decoders': decoders}}


def _gpt2(values: dict[str, Any]) -> dict[str, Any]:
    space = bool(values.get('add_prefix_space'))
    return {'model': {}, 'normalizer': None, 'decoder': BYTE_LEVEL,
            'pre_tokenizer': {**BYTE_LEVEL, 'add_prefix_space': space}}


def _qwen2(values: dict[str, Any]) -> dict[str, Any]:
    byte_level = {**BYTE_LEVEL, 'add_prefix_space': bool(values.get('add_prefix_space')), 'use_regex': False}
    split = {'type': 'Split', 'pattern': {'Regex': QWEN2_PATTERN}, 'behavior': 'Isolated', 'invert': False}
    return {'model': {}, 'normalizer': {'type': 'NFC'}, 'decoder': BYTE_LEVEL,
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, byte_level]}}


_PARTS = {'LlamaTokenizer': _llama, 'GPT2Tokenizer': _gpt2, 'Qwen2Tokenizer': _qwen2}


def _add_tokens(library: 'tokenizers.Tokenizer', settings: Settings) -> None:
    """Add the tokens that the files state, in the order of transformers: it decides the ids of new ones."""
    from tokenizers import AddedToken
    tokens = [token for _, token in sorted(settings.added.items(), key=lambda item: item[0])]
    known = {token.content for token in library.get_added_tokens_decoder().values()} | settings.contents
    for token in [*settings.named.values(), *settings.extra]:
        if token is not None and token['content'] not in known:
            tokens.append(token)
            known.add(token['content'])
    roles = {token['content'] for token in settings.named.values() if token}
    library.add_tokens([AddedToken(**token | ({'special': True} if token['content'] in roles else {}))
                        for token in tokens])


def _added(library: 'tokenizers.Tokenizer') -> list[tuple[int, str]]:
    return sorted((i, repr(token)) for i, token in library.get_added_tokens_decoder().items())


def _components(library: 'tokenizers.Tokenizer') -> str:
    return ''.join(str(part) for part in (library.normalizer, library.pre_tokenizer, library.decoder))


def _check_ids(path: Path, library: 'tokenizers.Tokenizer', definition: dict[str, Any],
               settings: Settings) -> None:
    """Refuse a token that a file gives another id than it has: the model's embedding has one row for it."""
    stated = [(i, token['content']) for i, token in settings.added.items()]
    stated += [(token['id'], token['content']) for token in definition.get('added_tokens', ())]
    for number, content in stated:
        if content and library.token_to_id(content) != number:
            raise ValueError(f'{path.parent} gives the added token {short_repr(content)} the id {number} in '
                             f'one file, but its place in tokenizer.json is {library.token_to_id(content)}; '
                             'correct added_tokens.json or tokenizer_config.json')


def _check_decoding(path: Path, library: 'tokenizers.Tokenizer', settings: Settings) -> None:
    """Refuse a tokenizer whose texts lose spaces before punctuation when they are decoded."""
    values, is_bpe = settings.values, type(library.model).__name__ == 'BPE'
    corrupts = values.get('clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output')
    if values.get('clean_up_tokenization_spaces') and (corrupts or not is_bpe):
        raise ValueError(f'{path.parent} has clean_up_tokenization_spaces, with which transformers removes '
                         'spaces before punctuation from what it decodes; set it to false in '
                         'tokenizer_config.json')
    if type(library.decoder).__name__ in ('WordPiece', 'CTC'):
        raise ValueError(f'{path} decodes as {type(library.decoder).__name__}, which loses spaces, so its '
                         'texts are not those that were encoded; use the tokenizer of a decoder-only model')


def _surroundings(library: 'tokenizers.Tokenizer') -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text."""
    for text in ('a', '1', '.', '\n', '北'):
        if count := len(library.encode(text, add_special_tokens=False).ids):
            with_special = library.encode(text, add_special_tokens=True)
            first = with_special.special_tokens_mask.index(0)
            return with_special.ids[:first], with_special.ids[first + count:]
    return [], []


def _bos_id(path: Path, library: 'tokenizers.Tokenizer', definition: dict[str, Any], settings: Settings,
            prefix: list[int]) -> int | None:
    """The id before every text: what the post-processor puts there.

    Llama-3's BOS is put there too, unless a file says otherwise: the first tokenizer.json of Llama-3 lacks
    it, but Meta's own code and training always put it.
    """
    if len(prefix) > 1:
        raise ValueError(f'{path} puts {len(prefix)} special tokens before every text, and only one can be '
                         'put there; correct its post_processor')
    flag, spelling = settings.values.get('add_bos_token'), settings.spelling('bos_token')
    if 'bos_token' not in settings.named:
        spelling = LLAMA3_BOS
    is_silent = not any(
        name in str(definition.get('post_processor')) for name in ('Template', 'Bert', 'Roberta'))
    if is_silent and spelling == LLAMA3_BOS and flag is not False:
        return library.token_to_id(spelling)
    if isinstance(flag, bool) and flag != bool(prefix):
        raise ValueError(f'{path.parent} has add_bos_token {str(flag).lower()} in tokenizer_config.json, but '
                         f'the post_processor of tokenizer.json {"puts one" if prefix else "puts none"} '
                         'before every text; remove the field or correct the post_processor')
    return prefix[0] if prefix else None


def _eos_id(path: Path, library: 'tokenizers.Tokenizer', settings: Settings, suffix: list[int]) -> int | None:
    """The id after a text: what the post-processor puts there, eos_token, config.json's or a usual one."""
    spelling = settings.spelling('eos_token')
    eos = None if spelling is None else library.token_to_id(spelling)
    if len(suffix) > 1 or (suffix and eos is not None and suffix != [eos]):
        raise ValueError(f'{path} puts the ids {suffix} after every text, and not its eos_token; correct its '
                         'post_processor')
    if suffix or 'eos_token' in settings.named:
        return suffix[0] if suffix else eos
    stated = settings.config.get('eos_token_id')
    stated = stated[0] if isinstance(stated, list) and stated else stated
    if type(stated) is int and stated in library.get_added_tokens_decoder():
        return stated
    return next((library.token_to_id(name) for name in EOS_NAMES if library.token_to_id(name) is not None),
                None)
