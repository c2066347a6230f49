"""Convert Llama weights between formats.

    python experiments/convert_weights.py SOURCE TARGET [--to hf|meta|orbax] [--verify]
    python experiments/convert_weights.py SOURCE --dry-run [--mesh 1,8,1,8]

SOURCE is a Hugging Face folder, a folder in Meta's format, an Orbax folder written by this script, or a .gguf
file. An Orbax folder restores onto any mesh. With --mesh (degrees of data,fsdp,sequence,tensor) the weights
are sharded over that many devices on the way; on a CPU they are virtual ones.
"""

import argparse
import math
import os
import pathlib

from lct.cli.main import run_script
from lct.cli.model import warn_of_edits
from lct.text import table

ORBAX = 'params'  # the folder of arrays beside the config.json
FINGERPRINTS = 'fingerprints.json'  # of those arrays, because Orbax restores a flipped bit without an error
FORMATS = {'meta': ['params.json'], 'orbax': ['config.json', ORBAX], 'hf': ['config.json']}  # their files


def format_of(source):
    """The format of a source, by the files that it holds."""
    source = pathlib.Path(source)
    if source.suffix == '.gguf':
        return 'gguf'
    for name, files in FORMATS.items():
        if all((source / file).exists() for file in files):
            return name
    raise ValueError(
        f'{source} is neither a folder with a config.json or a params.json nor a .gguf file; name one')


def read_config(source, **overrides):
    """LlamaConfig of a source.

    overrides: arguments of llama_meta.config_from_params, for fields that Meta's params.json lacks.
    """
    from lct import json_files
    from lct.weights import llama_hf, llama_meta

    name = format_of(source)
    if name == 'gguf':
        from lct.weights import gguf_files, llama_gguf

        return llama_gguf.read_config(gguf_files.read(source))
    if name == 'meta':
        path = os.path.join(source, 'params.json')
        return llama_meta.config_from_params(json_files.read_json(path), path, **overrides)
    return llama_hf.read_config(source)


def load(source, dtype=None, **overrides):
    """(LlamaConfig, Params) of a source, sharded on the current mesh; overrides as in read_config."""
    from lct.weights import llama_hf, llama_meta

    name = format_of(source)
    if name == 'gguf':
        from lct.weights import llama_gguf

        return llama_gguf.load(source, dtype or 'float32')[:2]
    if name == 'meta':
        return llama_meta.load(source, dtype, **overrides)
    return {'hf': llama_hf.load, 'orbax': load_orbax}[name](source, dtype)


def load_orbax(folder, dtype=None):
    """(LlamaConfig, Params) of a folder written by save_orbax; each device reads its own shard.

    Raises:
      ValueError: naming the array, if one is not what was written.
    """
    import jax
    import orbax.checkpoint as ocp

    from lct import json_files
    from lct.models import llama
    from lct.train import checkpoint, fingerprints
    from lct.train.memory_errors import is_out_of_memory
    from lct.weights import llama_hf, streaming

    config = llama_hf.read_config(folder)
    streaming.check_mesh(config)
    path, saved = pathlib.Path(folder).absolute() / ORBAX, pathlib.Path(folder) / FINGERPRINTS
    arrays = {}
    try:
        if saved.exists():
            arrays = fingerprints.unseal(json_files.read_json(saved))
        stored = arrays or fingerprints.describe(ocp.StandardCheckpointHandler().metadata(path).tree)
        targets = llama.abstract(config, stored['embed']['dtype'])
        if jax.sharding.get_mesh().empty:  # explicit, or the arrays get the sharding of the save
            one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            targets = jax.tree.map(lambda x: x.update(sharding=one_device), targets)
        params = checkpoint.restore_arrays(path, targets)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f'{folder} cannot be restored ({checkpoint.first_line(error)}); write it again from '
                         'its source') from error
    if arrays:
        fingerprints.check(params, arrays, folder)
    else:
        print(f'{folder} has no {FINGERPRINTS}; its bits cannot be checked')
    return config, jax.tree.map(lambda x: x.astype(dtype or x.dtype), params)


def save_orbax(folder, config, params, *, dtype, tokenizer_from=None, overwrite=False):
    """Write atomically a folder of config.json, params/ and the tokenizer files of tokenizer_from."""
    import jax
    import orbax.checkpoint as ocp

    from lct import json_files
    from lct.models import llama
    from lct.train import fingerprints
    from lct.weights import folders, llama_hf, streaming

    streaming.check_params(config, params)
    nbytes = llama.num_params(config) * jax.numpy.dtype(dtype).itemsize
    folders.check_writable(folder, nbytes, overwrite)
    with folders.atomic_folder(folder, overwrite) as temporary:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = jax.tree.map(lambda x: x.astype(dtype), params)
            checkpointer.save(pathlib.Path(temporary) / ORBAX, arrays)
            record = fingerprints.seal(fingerprints.describe_bits(arrays))
        json_files.write_json(os.path.join(temporary, FINGERPRINTS), record)
        json_files.write_json(os.path.join(temporary, 'config.json'), llama_hf.config_to_json(config, dtype))
        llama_hf.copy_companions(tokenizer_from, temporary)


def has_tokenizer(folder):
    """Whether a folder holds a tokenizer."""
    from lct.weights import llama_hf

    return any((pathlib.Path(folder) / name).is_file() for name in llama_hf.TOKENIZERS)


def convert(source, target, to, *, dtype=None, num_files=1, overwrite=False, **overrides):
    """Write source as a folder of another format.

    Args:
      to: 'hf', 'meta' or 'orbax'.
      dtype: None keeps the dtype of the source.
      num_files: of Meta's format.
      overrides: as in read_config.
    Returns:
      (config, params) as they were written.
    """
    from lct.weights import llama_hf, llama_meta

    if format_of(source) == 'gguf':
        if to != 'hf':
            raise ValueError(f'--to {to} does not take a GGUF file; convert it with --to hf first')
        from lct.weights import llama_gguf

        llama_gguf.to_hf(source, target, dtype=dtype or 'bfloat16', overwrite=overwrite)
        return load(target)
    warn_of_edits(source)
    config, params = load(source, dtype, **overrides)
    options = {'dtype': params.embed.dtype.name, 'overwrite': overwrite,
               'tokenizer_from': source if has_tokenizer(source) else None}
    if to == 'meta':
        llama_meta.save(target, config, params, num_files=num_files, **options)
    else:
        {'hf': llama_hf.save, 'orbax': save_orbax}[to](target, config, params, **options)
    if options['tokenizer_from'] is None:
        print(f'{source} holds no tokenizer; put one into {target}')
    return config, params


def check_logits(config, params, target, rows=2, seq_len=64):
    """Compare on random tokens the logits of params and of the folder that they were written to.

    Raises:
      ValueError: if any logit differs.
    """
    import jax
    import numpy as np

    from lct.models import llama

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, seq_len)).astype(np.int32)
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:  # as many rows and tokens as divide over the mesh
        rows = mesh.shape['data'] * mesh.shape['fsdp']
        tokens = np.resize(tokens, (rows, seq_len * mesh.shape['sequence']))
    before = np.asarray(llama.logits(params, config, tokens))
    del params
    written_config, written = load(target)
    after = np.asarray(llama.logits(written, written_config, tokens))
    error = np.abs(after - before).max()
    print(f'logits before and after: largest difference {error:.1e}, of {np.abs(before).max():.1e}')
    if not error == 0:
        raise ValueError(
            f'the logits of {target} differ from those of its source by {error:.1e}; it is not a copy')


def dry_run(config, degrees, itemsize=2):
    """Print every parameter with its shape, its sharding, and the bytes on one device of a mesh."""
    import jax

    from lct import sharding
    from lct.models import llama
    from lct.weights import mapping

    llama.check_mesh(config, degrees)
    size, axes = llama.dims(config), dict(zip(sharding.AXES, degrees))
    total = 0
    rows = []
    for name, entry in mapping.parameter_table(config).items():
        spec = sharding.weight_spec(entry.letters)
        split = math.prod(axes[axis] for axis in jax.tree.leaves(tuple(spec)))
        nbytes = math.prod(size[x] for x in entry.letters) * itemsize // split
        total += nbytes
        shape = ', '.join(f'{x} {size[x]}' for x in entry.letters)
        rows.append((name, shape, tuple(spec), f'{nbytes:,}'))
    print(table(('parameter', 'shape', 'sharding', 'bytes per device'), rows, left=(0, 1, 2)))
    count = llama.num_params(config)
    print(
        f'{count:,} parameters; {total:,} bytes on each of {math.prod(degrees)} devices, '
        f'at {itemsize} bytes a number')


def parse_args():
    """Command line flags, with the mesh degrees as a tuple."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source')
    parser.add_argument('target', nargs='?')
    parser.add_argument('--to', choices=('hf', 'meta', 'orbax'), default='hf')
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), help='default: the source\'s')
    parser.add_argument('--num-files', type=int, default=1, help='files of Meta\'s format, one for each rank')
    parser.add_argument('--mesh', default='1,1,1,1', help='degrees of data,fsdp,sequence,tensor')
    parser.add_argument('--rope-factor', type=float,
                        help='factor of use_scaled_rope in Meta\'s format; default: as in the published '
                        'model of this width')
    parser.add_argument('--max-position-embeddings', type=int,
                        help='for a model in Meta\'s format; default: 8192, or 131072 with use_scaled_rope')
    parser.add_argument('--overwrite', action='store_true')
    parser.add_argument('--verify', action='store_true', help='compare the logits before and after')
    parser.add_argument('--dry-run', action='store_true', help='list the parameters and write nothing')
    args = parser.parse_args()
    degrees = tuple(int(d) if d.strip().isdigit() else 0 for d in args.mesh.split(','))
    if len(degrees) != 4 or min(degrees) < 1:
        raise ValueError(
            f'--mesh {args.mesh} must be four degrees data,fsdp,sequence,tensor, such as 1,8,1,1')
    args.mesh = degrees
    return args


def main():
    args = parse_args()
    overrides = {name: getattr(args, name) for name in ('rope_factor', 'max_position_embeddings')
                 if getattr(args, name) is not None}
    if overrides and format_of(args.source) != 'meta':
        flags = ', '.join('--' + name.replace('_', '-') for name in overrides)
        raise ValueError(f'{flags} can only be given for a source in Meta\'s format; leave it out')
    if args.dry_run:
        dry_run(read_config(args.source, **overrides), args.mesh, {'float32': 4}.get(args.dtype, 2))
        return
    if args.target is None:
        raise ValueError('name the folder to write after the source, or pass --dry-run')

    import jax

    from lct.sharding import make_mesh

    if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        jax.config.update('jax_num_cpu_devices', math.prod(args.mesh))
    with jax.set_mesh(make_mesh(args.mesh)):
        config, params = convert(args.source, args.target, args.to, dtype=args.dtype,
                                 num_files=args.num_files, overwrite=args.overwrite, **overrides)
        print(f'{args.target}: {args.to}, {sum(x.size for x in jax.tree.leaves(params)):,} numbers of '
              f'{params.embed.dtype.name}')
        if args.verify:
            check_logits(config, params, args.target)


if __name__ == '__main__':
    run_script(main)
