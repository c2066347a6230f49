"""The files beside the weights of a folder: the tokenizer, templates, generation settings and licence. A copy
of a model carries them, with the lengths that they state raised to those of the model."""

import os
import re
import shutil
from collections.abc import Callable
from typing import Any

from lct import json_files
from lct.json_files import short_repr

TOKENIZERS = ('tokenizer.json', 'tokenizer.model', 'vocab.json')
CARRIED = re.compile(
    r'tokenizer\.(json|model(\.v\d+)?)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|'
    r'vocab\.(json|txt)|merges\.txt|tekken\.json|chat_template\.(jinja|json)|generation_config\.json|'
    r'(additional_)?chat_templates|(LICENSE|USE_POLICY|NOTICE)(\.\w+)?')
# Weights, what is written anew with them, and what only a hub needs.
REPLACED = re.compile(
    r'.*\.(safetensors|pth|bin|gguf|index\.json)|config\.json|params\.json|params|fingerprints\.json|'
    r'lct_manifest\.json|original|\.(git|cache|gitattributes|gitignore)|results\.json|checklist\.chk')
TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
MAX_JSON = 200_000_000  # bytes of a tokenizer.json


def names(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """(carried, left behind): the files and folders beside the weights of a folder."""
    found = sorted(os.listdir(folder))
    carried = [name for name in found if CARRIED.fullmatch(name)]
    return carried, [name for name in found if not CARRIED.fullmatch(name) and not REPLACED.fullmatch(name)]


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a tokenizer."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZERS)


def copy(source: str | os.PathLike | None, target: str | os.PathLike, positions: int | None = None) -> None:
    """Copy what names() carries, if source is not None.

    positions: of the model in target. Where the source had fewer, the lengths in the copied files are raised.
    """
    if source is None:
        return
    for name in names(source)[0]:
        path, to = os.path.join(source, name), os.path.join(target, name)
        if os.path.isdir(path):
            shutil.copytree(path, to)
        else:
            shutil.copyfile(path, to)
    old = _config(source).get('max_position_embeddings')
    if positions is not None and type(old) is int and old < positions:
        raise_lengths(target, old, positions)


def token_ids(folder: str | os.PathLike | None) -> dict[str, Any]:
    """The special token ids in the config.json of a folder.

    Raises:
      ValueError: for a folder with neither a config.json nor a tokenizer.
    """
    if folder is None:
        return {}
    if not has_tokenizer(folder) and not os.path.isfile(os.path.join(folder, 'config.json')):
        raise ValueError(f'tokenizer_from {folder} holds none of {", ".join(TOKENIZERS)}; choose another')
    values = _config(folder)
    return {key: values[key] for key in TOKEN_IDS if key in values}


def model_max_length(folder: str | os.PathLike) -> Any:
    """The model_max_length of the tokenizer_config.json in a folder, None without one."""
    path = os.path.join(folder, 'tokenizer_config.json')
    return json_files.read_json(path, MAX_JSON).get('model_max_length') if os.path.isfile(path) else None


def _config(folder):
    path = os.path.join(folder, 'config.json')
    return json_files.read_json(path) if os.path.isfile(path) else {}


# ---------------------------------------------------------------------------------------------------
# Lengths
# ---------------------------------------------------------------------------------------------------


def raise_lengths(folder: str | os.PathLike, old: int, new: int) -> None:
    """Raise the lengths that the files of an extended model state, from old to new positions: otherwise its
    users truncate to the old length, or are warned of it.

    model_max_length of tokenizer_config.json and the truncation of tokenizer.json are those of the model; a
    max_length of generation_config.json or tokenizer_config.json below the old positions was a choice of
    somebody and stays.
    """
    def model_length(value):
        return new if type(value) is int and value < new else value

    def chosen_length(value):
        return new if type(value) is int and old <= value < new else value

    _edit(os.path.join(folder, 'tokenizer_config.json'), {
        ('model_max_length',): model_length, ('max_length',): chosen_length})
    _edit(os.path.join(folder, 'tokenizer.json'), {('truncation', 'max_length'): model_length})
    _edit(os.path.join(folder, 'generation_config.json'), {('max_length',): chosen_length})


def _edit(path, changes: dict[tuple[str, ...], Callable[[Any], Any]]):
    """Change fields of a JSON file, {path of keys: function}; it is only written if one changes."""
    if not os.path.isfile(path):
        return
    values, edited = json_files.read_json(path, MAX_JSON), False
    for (*outer, key), change in changes.items():
        inside = values
        for name in outer:
            inside = inside.get(name) if isinstance(inside, dict) else None
        if isinstance(inside, dict) and key in inside and (value := change(inside[key])) != inside[key]:
            inside[key], edited = value, True
    if edited:
        json_files.write_json(path, values, sort_keys=False)


def describe(source: str | os.PathLike, target: str | os.PathLike, source_format: str,
             target_format: str) -> list[str]:
    """Sentences about what a conversion changed beside the weights, or does not carry."""
    lines = []
    if not has_tokenizer(target):
        lines.append(f'{source} holds no tokenizer; put one into {target}')
    elif target_format == 'meta' and not os.path.isfile(os.path.join(target, 'tokenizer.model')):
        lines.append(f"{target} has a tokenizer.json, but Meta's programs read a tokenizer.model, which "
                     f'{source} does not have')
    if source_format == 'meta' and not os.path.isfile(os.path.join(source, 'tokenizer.json')) and (
            target_format != 'meta' and has_tokenizer(target)):
        lines.append(f'{target}/tokenizer.json was made of tokenizer.model, with the special tokens of '
                     'Llama-3.1; an instruct model needs its chat template too')
    if source_format != 'gguf' and (left := names(source)[1]):
        lines.append(f'not carried: {", ".join(map(short_repr, left))}')
    return lines
