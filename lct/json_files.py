"""JSON objects, read strictly: bounded in size, with unique keys; an error is one sentence with the file."""

import collections
import json
import os
from typing import Any

from lct import files

MAX_BYTES = 4_000_000  # the index of a 405B model takes about 100 kB, a header of safetensors 150 kB
MAX_DEPTH = 100  # of lists and objects; 12 in a tokenizer.json
MAX_DIGITS = 500  # Python prints no integer of more than 4300, which the product of a shape might have


def read_json(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: if the file is missing, too large, not valid JSON, not an object, has a key twice, or is
        nested too deep.
    """
    try:
        size = os.path.getsize(path)
        if size > max_bytes:
            raise ValueError(
                f'{path} has {size} bytes, too many for a description of a model (at most {max_bytes}); '
                'copy it again')
        files.refuse_lfs_pointer(path)
        with open(path, encoding='utf-8') as file:
            return parse_object(file.read(), path)
    except FileNotFoundError:
        raise ValueError(f'{path} is missing; the folder must hold it') from None
    except UnicodeDecodeError:
        raise ValueError(f'{path} is not UTF-8 text; copy it again') from None


def parse_object(text: str, path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a text; path is the file that it came from, for the error."""
    def unique(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            repeated = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f'{path} names {short_repr(repeated)} twice; a JSON key must be unique')
        return result

    def bounded(digits):
        if len(digits) > MAX_DIGITS:
            raise ValueError(f'{path} has a number of {len(digits)} digits; copy it again')
        return int(digits)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_int=bounded)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f'{path} is not valid JSON ({error}); copy it again') from None
    if not isinstance(value, dict):
        raise ValueError(f'{path} must hold a JSON object, got {type(value).__name__}; copy it again')
    _check_depth(value, path)
    return value


def _check_depth(value, path):
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f'{path} is nested more than {MAX_DEPTH} deep; '
                             'copy it again')
        inside = (child for one in level for child in (one.values() if isinstance(one, dict) else one))
        level = [child for child in inside if isinstance(child, (dict, list)) and child]


def short_repr(value: Any) -> str:
    """repr of a JSON value, shortened to fit into an error message."""
    if isinstance(value, (dict, list)) and len(value) > 20:
        return f'a {type(value).__name__} of {len(value)}'
    text = repr(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 200 else text[:200] + '...'


def write_json(path: str | os.PathLike, value: Any, sort_keys: bool = True) -> None:
    """Write a JSON value, indented and with its keys in alphabetical order, or in their own with its
    characters as they are."""
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=2, sort_keys=sort_keys, ensure_ascii=sort_keys)
        file.write('\n')
