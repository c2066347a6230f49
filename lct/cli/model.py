"""The checkpoint that a script works on: its folder, its flags, its mesh, and the model itself."""

import contextlib
import math
import os
import pathlib
import sys
import zlib

from lct.cli.main import check_positive
from lct.cli.paths import experiments_folder


def find_model(name):
    """The folder of a checkpoint: the user's own, one that the project ships beside this file, or
    'smollm2'."""
    if not name:
        raise ValueError('config.model_folder is empty; add --set model_folder=PATH of a Hugging Face Llama folder')
    if str(name) == 'smollm2':
        from lct.weights import smollm2

        return smollm2.model_folder()
    path = pathlib.Path(name)
    return path if path.exists() or not (experiments_folder() / name).exists() else experiments_folder() / name


def model_fingerprint(folder):
    """What tells one checkpoint from another without reading all of it: the size of its files and a crc32 of
    their first megabyte."""
    out = {}
    for path in sorted(pathlib.Path(folder).glob('*.safetensors')):
        with path.open('rb') as file:
            out[path.name] = [path.stat().st_size, zlib.crc32(file.read(2**20))]
    return out


def add_model_flags(parser):
    parser.add_argument('--model', required=True, help="a Hugging Face Llama folder, or 'smollm2'")
    parser.add_argument('--mesh', default='1,1,1,1', help='degrees of data,fsdp,sequence,tensor')
    parser.add_argument('--dtype', help="of the weights; default float32 on CPU, else the files'")
    parser.add_argument('--plain', action='store_true', help='no chat template, as for a base model')
    parser.add_argument('--batch-tokens', type=int, default=65536, help='cache slots of a batch')
    parser.add_argument('--piece', type=int, help='tokens of one forward, where prompts need more memory than there is')


def parse_ints(flag, text):
    """(int, ...) of '1024,2048'."""
    parts = text.split(',')
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f'{flag} {text} must be whole numbers above 0, such as 1024,2048')
    return tuple(int(part) for part in parts)


def mesh_context(text):
    """The mesh of the flag --mesh as a context; none for one device. Makes virtual devices on a machine
    without accelerators, so it must come before jax computes anything."""
    import jax

    from lct import sharding

    degrees = parse_ints('--mesh', text)
    if len(degrees) != 4:
        raise ValueError(f'--mesh {text} must be four degrees data,fsdp,sequence,tensor, such as 1,1,8,1')
    if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        with contextlib.suppress(RuntimeError):  # too late where a notebook has computed already
            jax.config.update('jax_num_cpu_devices', math.prod(degrees))
    return contextlib.nullcontext() if set(degrees) == {1} else jax.set_mesh(sharding.make_mesh(degrees))


def load_model(args):
    """-> (eval.runner.Model on the current mesh, its folder)."""
    import jax

    from lct.data import chat_template, tokenizer
    from lct.eval import runner
    from lct.weights import json_files, llama_hf

    check_positive(args, 'piece', 'batch_tokens')
    folder = pathlib.Path(find_model(args.model))
    if not folder.is_dir():
        raise ValueError(f"--model {args.model} is no folder; give a Hugging Face folder, 'base' or 'smollm2'")
    words = tokenizer.load(folder)
    tokenizer.check_vocab_size(words, llama_hf.read_config(folder).vocab_size)
    template = None
    if not args.plain:
        try:
            template = chat_template.load(folder)
        except ValueError as error:  # a base model has none
            print(f'note: prompts are plain text: {error}', file=sys.stderr)
    eos = set()
    for name in ('config.json', 'generation_config.json'):
        if (folder / name).is_file():
            found = json_files.read_json(folder / name).get('eos_token_id')
            eos |= set(found if isinstance(found, list) else [found]) - {None}
    on_cpu = jax.default_backend() == 'cpu'
    config, params = llama_hf.load(folder, args.dtype or ('float32' if on_cpu else None))
    model = runner.Model(params, config, words, template, tuple(sorted(eos)), prefill_chunk=args.piece,
                         batch_tokens=args.batch_tokens)
    return model, folder
