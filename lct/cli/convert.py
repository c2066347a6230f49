"""Conversion of weights between the formats: what a source is, how it is read, and how it is written."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lct import json_files
from lct.cli import orbax_folder
from lct.data import tokenizer as tokenizers
from lct.data import tokenizer_json
from lct.models.llama import LlamaConfig, Params
from lct.weights import (
    companions,
    gguf_files,
    gguf_tokenizer,
    hf_tensors,
    llama_gguf,
    llama_hf,
    llama_meta,
    plain_edits,
    verify,
)

META_PATTERN = 'consolidated.*.pth'
# option of a loader: the format that has it
OPTIONS = {'adapter': 'hf', 'vocab_size': 'hf', 'rope_factor': 'meta', 'max_position_embeddings': 'meta'}
FLAGS = {'vocab_size': 'resize-embeddings'}
DESCRIPTIONS = {'hf': "Hugging Face's format", 'meta': "Meta's format"}
REMEDIES = {'hf': 'convert the source with --to hf first', 'meta': 'leave it out'}
CHANGED = {  # option: the facts of the config that it changes
    'max_position_embeddings': 'positions', 'rope_factor': 'rope factor', 'vocab_size': 'vocab_size'}


def format_of(source: str | os.PathLike) -> str:
    """The format of a source, by the files that it holds: 'hf', 'meta', 'orbax' or 'gguf'.

    Raises:
      ValueError: for a source of none of them, or of two.
    """
    source = Path(source)
    if source.suffix == '.gguf':
        return 'gguf'
    has_config, has_params = (source / 'config.json').exists(), (source / 'params.json').exists()
    is_meta = has_params and (any(source.glob(META_PATTERN)) or not has_config)
    if is_meta and has_config and any(source.glob('*.safetensors')):
        raise ValueError(f"{source} holds the weights twice, as safetensors and in Meta's format; move one "
                         'of the two away')
    if is_meta:
        return 'meta'
    if has_config:
        return 'orbax' if (source / orbax_folder.ARRAYS).exists() else 'hf'
    hf_tensors.refuse_adapter(source)
    raise ValueError(
        f'{source} is neither a folder with a config.json or a params.json nor a .gguf file; name one')


def read_config(source: str | os.PathLike, **options: Any) -> LlamaConfig:
    """LlamaConfig of a source, as load returns it with the same options."""
    name = format_of(source)
    if name == 'gguf':
        return llama_gguf.read_config(gguf_files.read(source))
    if name == 'meta':
        return llama_meta.read_config(source, **options)
    config = llama_hf.read_config(source)
    return dataclasses.replace(config, vocab_size=options.get('vocab_size', config.vocab_size))


def check_options(source_format: str, options: dict[str, Any]) -> None:
    """Refuse options of the loader of another format."""
    for key in options:
        if OPTIONS[key] != source_format:
            flag = FLAGS.get(key, key.replace('_', '-'))
            raise ValueError(f'--{flag} can only be given for a source in {DESCRIPTIONS[OPTIONS[key]]}; '
                             f'{REMEDIES[OPTIONS[key]]}')


def load(source: str | os.PathLike, dtype: Any = None, **options: Any) -> tuple[LlamaConfig, Params]:
    """(LlamaConfig, Params) of a source, sharded on the current mesh.

    options: of OPTIONS, those of llama_hf.load or llama_meta.load.
    Raises:
      ValueError: for an option of the loader of another format.
    """
    name = format_of(source)
    check_options(name, options)
    if name == 'gguf':
        return llama_gguf.load_weights(source, dtype)
    if name == 'meta':
        return llama_meta.load(source, dtype, **options)
    return {'hf': llama_hf.load, 'orbax': orbax_folder.load}[name](source, dtype, **options)


def convert(source: str | os.PathLike, target: str | os.PathLike, to: str, *, dtype: str | None = None,
            num_files: int = 1, tokenizer_from: str | os.PathLike | None = None, overwrite: bool = False,
            **options: Any) -> tuple[LlamaConfig, Params]:
    """Write source as a folder of another format, with all that stands beside the weights.

    Args:
      to: 'hf', 'meta' or 'orbax'.
      dtype: None keeps the dtype of the source.
      num_files: of Meta's format.
      tokenizer_from: a Hugging Face folder whose files beside the weights are taken instead of the source's.
      options: as in load.
    Returns:
      (config, params) as they were written.
    """
    kept = contextlib.nullcontext(tokenizer_from)
    config = read_config(source, **{key: value for key, value in options.items() if key != 'adapter'})
    with _companions_of(source, config) if tokenizer_from is None else kept as beside:
        config, params = load(source, dtype, **options)
        written = {'dtype': params.embed.dtype.name, 'overwrite': overwrite, 'tokenizer_from': beside}
        if to == 'meta':
            llama_meta.save(target, config, params, num_files=num_files, **written)
        else:
            {'hf': llama_hf.save, 'orbax': orbax_folder.save}[to](target, config, params, **written)
    return config, params


@contextlib.contextmanager
def _companions_of(source: str | os.PathLike, config: LlamaConfig) -> Iterator[str | os.PathLike]:
    """A folder of the files beside the weights of a source, as Hugging Face has them: the source itself, or a
    temporary one with what the source's format has instead."""
    name = format_of(source)
    if name in ('hf', 'orbax'):
        yield source
        return
    with tempfile.TemporaryDirectory() as temporary:
        if name == 'gguf':
            made = gguf_tokenizer.read_companions(gguf_files.read(source), config)
        else:
            companions.copy(source, temporary)
            made = _meta_companions(Path(source), config)
        for file_name, value in made.items():
            json_files.write_json(os.path.join(temporary, file_name), value, sort_keys=False)
        yield temporary


def _meta_companions(source, config):
    """{file name: JSON object} of the Hugging Face files that a folder in Meta's format lacks."""
    if (source / 'config.json').is_file():
        return {'config.json': json_files.read_json(source / 'config.json')}
    if not (source / 'tokenizer.model').is_file() or (source / 'tokenizer.json').is_file():
        return {'config.json': {}}
    return tokenizer_json.companions_of_tiktoken(source / 'tokenizer.model', config.max_position_embeddings)


def tokenizer_size(source: str | os.PathLike) -> int:
    """The size of the vocabulary that the tokenizer in a folder needs.

    Raises:
      ValueError: if the model has as many rows already.
    """
    wanted, rows = tokenizers.load(source).vocab_size, llama_hf.read_config(source).vocab_size
    if wanted <= rows:
        raise ValueError(f'{source} has {rows} rows of embeddings for the {wanted} ids of its tokenizer; '
                         'leave --resize-embeddings out or give it a number')
    return wanted


def check(source: str | os.PathLike, target: str | os.PathLike, to: str, **options: Any) -> verify.Report:
    """Compare the files of a source with those that it was converted to, with options; see verify.check."""
    def edit(tensors):
        if 'vocab_size' in options:
            tensors = plain_edits.with_rows(tensors, options['vocab_size'])
        return plain_edits.with_adapter(tensors, options['adapter']) if 'adapter' in options else tensors

    is_edited = any(OPTIONS[key] == 'hf' for key in options)
    changed = tuple(CHANGED[key] for key in options if key in CHANGED)
    return verify.check(source, format_of(source), target, to,
                        edit=edit if is_edited else None, changed=changed)
