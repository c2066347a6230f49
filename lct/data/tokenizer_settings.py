"""What the files beside tokenizer.json say of a tokenizer: its class and its special and added tokens.

They are read as AutoTokenizer.from_pretrained of transformers 5 reads them (tokenization_auto.py and
tokenization_utils_base.py of 5.24).
"""

from pathlib import Path
from typing import Any, NamedTuple

from lct.data.tokenizer_files import read_json
from lct.json_files import short_repr

NAMED = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')
AS_IS = 'PreTrainedTokenizerFast'  # tokenizer.json as it is
AS_IS_NAMES = (AS_IS, 'PreTrainedTokenizer', 'TokenizersBackend', 'PythonBackend')
# The classes that transformers builds from vocabulary and merges, without the rest of tokenizer.json; the
# special tokens that each has where the files state none.
BUILT = {
    'LlamaTokenizer': {'unk_token': '<unk>', 'bos_token': '<s>', 'eos_token': '</s>'},
    'GPT2Tokenizer': dict.fromkeys(('unk_token', 'bos_token', 'eos_token'), '<|endoftext|>'),
    'Qwen2Tokenizer': dict.fromkeys(('unk_token', 'eos_token', 'pad_token'), '<|endoftext|>'),
}
# Of the model types of this library, those whose class transformers knows; the others take the one stated.
CLASS_OF_TYPE = {'mistral': AS_IS, 'phi3': AS_IS, 'qwen2': 'Qwen2Tokenizer', 'qwen3': 'Qwen2Tokenizer'}
FORCED_TYPES = ('phi3', 'qwen2')  # those that overrule the class stated

Token = dict[str, Any]  # the arguments of tokenizers.AddedToken: content and FLAGS


class Settings(NamedTuple):
    """class_name: one of AS_IS, BUILT. values: of tokenizer_config.json and special_tokens_map.json.

    named: {'bos_token': Token or None, ...}, without those that no file states. extra: special tokens without
    a role. added: {id: Token}, the tokens that have an id in some file. config: of config.json.
    """
    class_name: str
    values: dict[str, Any]
    named: dict[str, Token | None]
    extra: list[Token]
    added: dict[int, Token]
    config: dict[str, Any]

    @property
    def contents(self) -> set[str]:
        """The texts of the tokens that have an id in some file."""
        return {token['content'] for token in self.added.values()}

    def spelling(self, name: str) -> str | None:
        """The text of a named token, such as 'eos_token'; None where there is none."""
        token = self.named.get(name)
        return None if token is None else token['content']


def read(folder: Path, definition: dict[str, Any] | None = None) -> Settings:
    """The Settings of a folder. definition: of its tokenizer.json, if it has one.

    Raises:
      ValueError: for files that contradict each other or have fields of a wrong type.
    """
    config, values = read_object(folder / 'config.json'), read_object(folder / 'tokenizer_config.json')
    class_name = _class_name(values, config, definition, folder)
    values = {**BUILT.get(class_name, {}), **values}
    if not values.get('extra_special_tokens') and 'additional_special_tokens' in values:
        values['extra_special_tokens'] = values.pop('additional_special_tokens')
    added: dict[int, Token] = {}
    if 'added_tokens_decoder' in values:
        path = folder / 'tokenizer_config.json'
        for number, value in _dict(values['added_tokens_decoder'], path, 'added_tokens_decoder').items():
            added[_id(number, path)] = _token(value, path)
    else:
        values |= read_object(folder / 'special_tokens_map.json')
        # Without the additional_special_tokens of special_tokens_map.json, which transformers adds later.
        special = {token['content'] for token in [
            *_named({name: values.get(name) for name in NAMED}, folder).values(),
            *_extra({'extra_special_tokens': values.get('extra_special_tokens')}, folder)] if token}
        path = folder / 'added_tokens.json'
        for content, number in read_object(path).items():
            added[_id(number, path)] = {'content': content, 'special': content in special,
                                        'normalized': content not in special}
        for value in (definition or {}).get('added_tokens', ()):
            added[_id(value.get('id'), folder / 'tokenizer.json')] = _token(value, folder / 'tokenizer.json')
    by_content = {token['content']: token for token in added.values()}
    named = {name: token and by_content.get(token['content'], token)
             for name, token in _named(values, folder).items()}
    return Settings(class_name, values, named, _extra(values, folder), added, config)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if the file is missing."""
    return read_json(path) if path.is_file() else {}


def _class_name(values: dict[str, Any], config: dict[str, Any], definition: dict[str, Any] | None,
                folder: Path) -> str:
    """The class that transformers makes of a folder: the one of the model's type or the one stated."""
    stated = values.get('tokenizer_class') or config.get('tokenizer_class') or ''
    name = str(stated).removesuffix('Fast') if stated not in AS_IS_NAMES else AS_IS
    model_type = config.get('model_type')
    registered = CLASS_OF_TYPE.get(model_type) if isinstance(model_type, str) else None
    if name == 'LlamaTokenizer' and model_type not in FORCED_TYPES:
        definition = read_object(folder / 'tokenizer.json') if definition is None else definition
        if 'ByteLevel' in str({key: value for key, value in definition.items() if key != 'model'}):
            return AS_IS
    if registered is not None and (not name or registered == AS_IS or model_type in FORCED_TYPES):
        return registered
    name = name or AS_IS
    if name != AS_IS and name not in BUILT:
        raise ValueError(f'{folder} has the tokenizer_class {short_repr(stated)}, for which transformers may '
                         f'replace what tokenizer.json says (known are {", ".join(BUILT)}); write {AS_IS} '
                         'into tokenizer_config.json if tokenizer.json is right as it is')
    return name


def _named(values: dict[str, Any], folder: Path) -> dict[str, Token | None]:
    """{name: Token}: of bos_token and its like, and of what a model adds to them, such as image_token."""
    extra = values.get('extra_special_tokens')
    values = {**values, **(extra if isinstance(extra, dict) else {})}
    tokens = {}
    for name, value in values.items():
        own = isinstance(extra, dict) and name in extra
        if name in NAMED or own or (name.endswith('_token') and isinstance(value, str)):
            tokens[name] = None if value is None else _special(value, folder, name)
    return tokens


def _extra(values: dict[str, Any], folder: Path) -> list[Token]:
    """The special tokens without a role."""
    extra = values.get('extra_special_tokens') or values.get('additional_special_tokens') or []
    if isinstance(extra, dict):
        return []
    if not isinstance(extra, list):
        raise ValueError(f'{folder} has additional_special_tokens {short_repr(extra)} instead of a list of '
                         'tokens; correct the file')
    return [_special(value, folder, 'additional_special_tokens') for value in extra]


def _special(value: Any, folder: Path, name: str) -> Token:
    """The Token of a special token in tokenizer_config.json or special_tokens_map.json."""
    if isinstance(value, str):
        return {'content': value, 'special': True}
    if isinstance(value, dict) and isinstance(value.get('content'), str):
        return {**_token(value, folder), 'special': True}
    raise ValueError(f'{folder} has {name} {short_repr(value)}, which is neither a token nor null; correct '
                     'tokenizer_config.json or special_tokens_map.json')


def _token(value: Any, path: Path) -> Token:
    """The Token of an object with content and flags."""
    if not isinstance(value, dict) or not isinstance(value.get('content'), str) or not all(
            isinstance(value.get(flag, False), bool) for flag in FLAGS):
        raise ValueError(f'{path} has an added token {short_repr(value)}, which is not an object of content '
                         'and flags; correct the file')
    return {name: value[name] for name in ('content', *FLAGS) if name in value}


def _dict(value: Any, path: Path, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{path} has {name} {short_repr(value)} instead of an object; correct the file')
    return value


def _id(value: Any, path: Path) -> int:
    """A token id, which is a string where it is a key."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if type(value) is not int or not 0 <= value < 2**32:
        raise ValueError(f'{path} has an added token of id {short_repr(value)}, which is not a token id; '
                         'correct the file')
    return value
