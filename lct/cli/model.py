"""The checkpoint that a script works on: its folder, its flags, its mesh, and the model itself."""

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lct import bucket_cache
from lct.cli.flags import length
from lct.cli.main import check_positive
from lct.cli.paths import experiments_folder
from lct.text import parse_length

if TYPE_CHECKING:  # imported late, so that --help is fast
    from lct.data.chat_template import ChatTemplate
    from lct.eval.runner import Model


MAX_CORES = 8  # of --mesh auto
MAX_ROWS, KEYS = 768, 128  # of a tile of attention
SECOND_CACHE = Path('/sys/devices/system/cpu/cpu0/cache/index2/size')
# Fields of a config.json that change what the same weights compute.
MODEL_FIELDS = ('rope_theta', 'rope_scaling', 'rope_parameters', 'rms_norm_eps', 'tie_word_embeddings',
                'max_position_embeddings')


def find_model(name: str | Path) -> Path:
    """The folder of a checkpoint: a path, a folder in experiments/ of this project, or 'smollm2'."""
    if not name:
        raise ValueError(
            'config.model_folder is empty; add --set model_folder=PATH of a Hugging Face Llama folder')
    if str(name) == 'smollm2':
        from lct.weights import smollm2

        return smollm2.model_folder()
    path = Path(bucket_cache.local(name))
    if path.exists():
        return path
    in_project = experiments_folder() / name
    return in_project if in_project.exists() else path


def model_fingerprint(folder: str | Path, workdir: Path) -> dict[str, Any]:
    """What a run records of its model: {file: [bytes, crc32 of the first MiB]} of the weights, one number
    over all their bytes, and the fields of config.json that change what the weights compute.

    All bytes are read unless the folder has a manifest or workdir the result of an earlier call, by the first
    process alone; the others wait for its number.
    """
    from lct import json_files, processes

    folder = Path(folder)
    out = {}
    for path in sorted(folder.glob('*.safetensors')):
        with path.open('rb') as file:
            out[path.name] = [path.stat().st_size, zlib.crc32(file.read(2**20))]
    number = 0
    if processes.is_first():
        number = _crc32_of_all(folder, workdir / 'model_crc32.json') >> 1  # from_first takes an int32
    out['all bytes'] = processes.from_first(number)
    values = json_files.read_json(folder / 'config.json')
    return out | {f'config.json {key}': json.dumps(values[key], sort_keys=True)
                  for key in MODEL_FIELDS if key in values}


def _crc32_of_all(folder: Path, cache: Path) -> int:
    """A crc32 over all bytes of the weights, from the cache if names, sizes and times are those of then."""
    from lct import files
    from lct.weights import manifest

    stats = {path.name: path.stat() for path in sorted(folder.glob('*.safetensors'))}
    key = [str(folder.resolve()), {name: [one.st_size, one.st_mtime_ns] for name, one in stats.items()}]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(cache.read_text())
        if known['key'] == key and isinstance(known['crc32'], int):
            return known['crc32']
    number = zlib.crc32(json.dumps(manifest.file_totals(folder, ['.safetensors'])).encode())
    files.write_atomically(cache, json.dumps({'key': key, 'crc32': number}))
    return number


def warn_of_edits(folder: str | Path) -> None:
    """A line on stderr for each file beside the weights that is not as lct wrote it."""
    from lct import processes
    from lct.weights import manifest

    for sentence in manifest.edited(folder):
        if processes.is_first():
            print(f'WARNING: {sentence}', file=sys.stderr, flush=True)


def add_model_flags(parser: argparse.ArgumentParser, required: bool = True, mesh: str = '1,1,1,1') -> None:
    """The flags that load_model and mesh_context read. mesh: the default of --mesh."""
    parser.add_argument('--model', required=required, help="a Hugging Face Llama folder, or 'smollm2'")
    parser.add_argument('--mesh', default=mesh, help='degrees of data,fsdp,sequence,tensor, or auto for all '
                        f'accelerators or cores; default {mesh}')
    parser.add_argument('--dtype', help="of the weights; default float32 on CPU, else the files'")
    parser.add_argument('--cache-dtype', choices=['float32', 'bfloat16', 'int8'],
                        help="of cached keys and values; default: the weights'. int8 takes half of the bytes "
                        'of bfloat16')
    parser.add_argument('--plain', action='store_true', help='no chat template, as for a base model')
    parser.add_argument('--batch-tokens', type=length, default=65536, help='cache slots of a batch')
    parser.add_argument('--piece', type=length, help='tokens of one forward pass over a prompt, for prompts '
                        'that do not fit into memory at once')


def parse_lengths(flag: str, text: str) -> tuple[int, ...]:
    """'8K,64K' -> (8192, 65536); a ValueError about the flag for anything but lengths in tokens."""
    try:
        return tuple(parse_length(one.strip()) for one in text.split(','))
    except ValueError:
        raise ValueError(f'{flag} {text} must be lengths in tokens, such as 8K,64K or 8192,65536') from None


def parse_ints(flag: str, text: str) -> tuple[int, ...]:
    """'1024,2048' -> (1024, 2048); a ValueError about the flag for anything but positive integers."""
    numbers = text.split(',')
    if not all(number.strip().isdigit() and int(number) > 0 for number in numbers):
        raise ValueError(f'{flag} {text} must be whole numbers above 0, such as 1024,2048')
    return tuple(int(number) for number in numbers)


def mesh_context(text: str, model: str | None = None) -> contextlib.AbstractContextManager:
    """The mesh of the flag --mesh as a context; no mesh for one device.

    Makes virtual devices on a machine without accelerators, so it must come before jax computes anything.

    Args:
      text: four degrees, or 'auto': a ring of all accelerators; on CPUs a replica of the model on each core
        where rows are independent, and otherwise a ring of the cores.
      model: the model of which 'auto' makes replicas; None for a ring, which speeds up a single row.
    """
    import jax

    from lct import cpu_devices, sharding

    cores = _cores() if text == 'auto' else 0
    degrees = (1, 1, cores, 1) if cores else parse_ints('--mesh', text)
    if len(degrees) != 4:
        raise ValueError(f'--mesh {text} must be four degrees data,fsdp,sequence,tensor, such as 1,1,8,1, or '
                         'auto')
    with contextlib.suppress(RuntimeError):  # too late in a notebook that has computed already
        cpu_devices.provide(math.prod(degrees))
    if cores:
        on_cpu, count = jax.default_backend() == 'cpu', jax.device_count()
        count = min(cores, count) if on_cpu else count
        ring = 1 << (count.bit_length() - 1) if on_cpu else count  # a power of two divides most models
        degrees = (_replicas(model, count), 1, 1, 1) if on_cpu and model else (1, 1, ring, 1)
    return contextlib.nullcontext() if set(degrees) == {1} else jax.set_mesh(sharding.make_mesh(degrees))


def _cores():
    """Cores that this process may use; more than MAX_CORES share the matmuls of that many devices."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(count, MAX_CORES)


def _replicas(model, count):
    """How many replicas of a model in float32 fit into half of the memory, up to count."""
    from lct.cli.host_memory import host_memory
    from lct.models import llama
    from lct.weights import llama_hf

    folder = find_model(model)
    size = 4 * llama.num_params(llama_hf.read_config(folder)) if folder.is_dir() else 1
    return max(min(count, int(host_memory() / 2 / size)), 1)


def mesh_degrees() -> list[int]:
    """The degrees of the current mesh."""
    from lct import sharding

    return [sharding.axis_size(name) for name in sharding.AXES]


def load_model(args: argparse.Namespace) -> tuple['Model', Path]:
    """-> (eval.runner.Model on the current mesh, its folder), by the flags of add_model_flags."""
    import jax

    from lct.data import tokenizer as tokenizers
    from lct.eval import runner
    from lct.models.memory import Memory
    from lct.ops.kernels.choice import choose
    from lct.ops.strategies import Attention
    from lct.weights import llama_hf

    check_positive(args, 'piece', 'batch_tokens')
    folder = Path(find_model(args.model))
    if not folder.is_dir():
        raise ValueError(
            f"--model {args.model} is not a folder; give a Hugging Face folder, 'base' or 'smollm2'")
    warn_of_edits(folder)
    tokenizer = tokenizers.load(folder)
    tokenizers.check_vocab_size(tokenizer, llama_hf.read_config(folder).vocab_size)
    template = None if args.plain else _load_template(folder)
    on_cpu = jax.default_backend() == 'cpu'
    config, params = llama_hf.load(folder, args.dtype or ('float32' if on_cpu else None))
    attention = Attention(chunks=_core_tiles(config)) if on_cpu else Attention()
    memory = Memory(remat='none', attention=attention, cache_dtype=args.cache_dtype)
    model = runner.Model(params, config, tokenizer, template, _read_eos_ids(folder), memory,
                         prefill_chunk=args.piece, batch_tokens=args.batch_tokens)
    _say_once(f'attention block of prompts: {choose(attention.kernel, config.head_dim, params.embed.dtype)}')
    return model, folder


@functools.cache
def _say_once(text):
    """One line on stderr from the first process, once, however many models a script loads."""
    from lct import processes

    if processes.is_first():
        print(text, file=sys.stderr)


def _core_tiles(config):
    """Attention tiles for prompts on CPUs: the scores of one fill half of a core's second-level cache."""
    from lct.ops.blockwise_attention import ROWS, Chunks

    try:
        cache = int(SECOND_CACHE.read_text().strip().removesuffix('K')) * 1024
    except (OSError, ValueError):  # not Linux
        cache = 0
    rows = min(max(cache // 2 // (4 * KEYS), ROWS), MAX_ROWS)
    return Chunks(query=max(rows // (config.num_heads // config.num_kv_heads), 1), key=KEYS)


def _load_template(folder) -> 'ChatTemplate | None':
    from lct.data import chat_template

    try:
        return chat_template.load(folder)
    except chat_template.MissingTemplate as error:  # a base model has none
        print(f'note: prompts are plain text: {error}', file=sys.stderr)
        return None
    except ValueError as error:
        raise ValueError(f'{error}, or add --plain for prompts without a template') from None


def _read_eos_ids(folder):
    """The tokens that end a turn, from the configs of the model and of its generation."""
    from lct import json_files

    eos = set()
    for name in ('config.json', 'generation_config.json'):
        if (folder / name).is_file():
            found = json_files.read_json(folder / name).get('eos_token_id')
            for one in found if isinstance(found, list) else [found]:
                if one is not None and (type(one) is not int or one < 0):
                    raise ValueError(f'{folder / name} has eos_token_id {json_files.short_repr(found)}, '
                                     'which is neither an id nor a list of ids; correct it')
                eos |= {one} - {None}
    return tuple(sorted(eos))
