"""Strict JSON objects: bounded in size, no key twice, every error in one sentence that names the file."""

import json
import os

MAX_BYTES = 4_000_000  # the index of a 405B model takes about 100 kB, a header of safetensors 150 kB


def read_json(path):
    """A JSON object as a dict; repeated keys are refused."""
    try:
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise ValueError(f'{path} has {size} bytes, too many for a description of a model; copy it again')
        with open(path, encoding='utf-8') as file:
            return parse_object(file.read(), path)
    except FileNotFoundError:
        raise ValueError(f'{path} is missing; the folder must hold it') from None
    except UnicodeDecodeError:
        raise ValueError(f'{path} is not UTF-8 text; copy it again') from None


def parse_object(text, path):
    """The JSON object in text, which came from path."""
    def unique(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            seen = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f'{path} names {shown(twice)} twice; a JSON key must be unique')
        return result

    def bounded(digits):
        if len(digits) > 500:  # Python shows no integer of 4300 digits, as the product of a shape might be
            raise ValueError(f'{path} has a number of {len(digits)} digits; copy it again')
        return int(digits)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_int=bounded)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f'{path} is not valid JSON ({error}); copy it again') from None
    if not isinstance(value, dict):
        raise ValueError(f'{path} must hold a JSON object, got {type(value).__name__}')
    return value


def shown(value):
    """repr of a JSON value, cut to what fits in a sentence."""
    if isinstance(value, (dict, list)) and len(value) > 20:
        return f'a {type(value).__name__} of {len(value)}'
    text = repr(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 200 else text[:200] + '...'


def write_json(path, value):
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write('\n')
