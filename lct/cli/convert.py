"""Conversion of weights between the formats: what a source is, how it is read, and how it is written."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lct import json_files
from lct.cli import orbax_folder
from lct.data import tokenizer_json
from lct.models.llama import LlamaConfig, Params
from lct.weights import companions, gguf_files, llama_gguf, llama_hf, llama_meta, verify

META_PATTERN = 'consolidated.*.pth'


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
    raise ValueError(
        f'{source} is neither a folder with a config.json or a params.json nor a .gguf file; name one')


def read_config(source: str | os.PathLike, **overrides: Any) -> LlamaConfig:
    """LlamaConfig of a source.

    overrides: arguments of llama_meta.read_config, for fields that Meta's params.json lacks.
    """
    name = format_of(source)
    if name == 'gguf':
        return llama_gguf.read_config(gguf_files.read(source))
    if name == 'meta':
        return llama_meta.read_config(source, **overrides)
    return llama_hf.read_config(source)


def load(source: str | os.PathLike, dtype: Any = None, **overrides: Any) -> tuple[LlamaConfig, Params]:
    """(LlamaConfig, Params) of a source, sharded on the current mesh; overrides as in read_config."""
    name = format_of(source)
    if name == 'gguf':
        return llama_gguf.load(source, dtype)[:2]
    if name == 'meta':
        return llama_meta.load(source, dtype, **overrides)
    return {'hf': llama_hf.load, 'orbax': orbax_folder.load}[name](source, dtype)


def convert(source: str | os.PathLike, target: str | os.PathLike, to: str, *, dtype: str | None = None,
            num_files: int = 1, overwrite: bool = False, **overrides: Any) -> tuple[LlamaConfig, Params]:
    """Write source as a folder of another format, with all that stands beside the weights.

    Args:
      to: 'hf', 'meta' or 'orbax'.
      dtype: None keeps the dtype of the source.
      num_files: of Meta's format.
      overrides: as in read_config.
    Returns:
      (config, params) as they were written.
    """
    config, params = load(source, dtype, **overrides)
    with _companions_of(source, config) as beside:
        options = {'dtype': params.embed.dtype.name, 'overwrite': overwrite, 'tokenizer_from': beside}
        if to == 'meta':
            llama_meta.save(target, config, params, num_files=num_files, **options)
        else:
            {'hf': llama_hf.save, 'orbax': orbax_folder.save}[to](target, config, params, **options)
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
            made = llama_gguf.read_companions(gguf_files.read(source), config)
        else:
            companions.copy(source, temporary)
            made = _meta_companions(Path(source), config)
        for file_name, value in made.items():
            json_files.write_json(os.path.join(temporary, file_name), value, sort_keys=False)
        yield temporary


def _meta_companions(source, config):
    """{file name: JSON object} of the Hugging Face files that a folder in Meta's format lacks."""
    if (source / 'config.json').is_file():
        return {'config.json': companions.token_ids(source)}
    if not (source / 'tokenizer.model').is_file() or (source / 'tokenizer.json').is_file():
        return {'config.json': {}}
    return tokenizer_json.companions_of_tiktoken(source / 'tokenizer.model', config.max_position_embeddings)


def check(source: str | os.PathLike, target: str | os.PathLike, to: str, **overrides: Any) -> verify.Report:
    """Compare the files of a source with those that it was converted to; see verify.check."""
    changed = [{'max_position_embeddings': 'positions', 'rope_factor': 'rope factor'}[x] for x in overrides]
    return verify.check(source, format_of(source), target, to, changed=tuple(changed))
