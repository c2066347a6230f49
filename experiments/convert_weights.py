"""Convert Llama weights between formats.

    python experiments/convert_weights.py SOURCE TARGET [--to hf|meta|orbax] [--verify]
    python experiments/convert_weights.py BASE TARGET --adapter FOLDER      # merges a PEFT LoRA adapter
    python experiments/convert_weights.py SOURCE --dry-run [--mesh 1,8,1,8]

SOURCE is a Hugging Face folder, a folder in Meta's format, an Orbax folder written by this script, or a .gguf
file. An Orbax folder restores onto any mesh. With --mesh (degrees of data,fsdp,sequence,tensor) the weights
are sharded over that many devices on the way; on a CPU they are virtual ones.
"""

import argparse
import math

from lct import bucket_cache
from lct.cli.flags import length
from lct.cli.main import run_script
from lct.cli.model import warn_of_edits
from lct.text import table
from lct.upload import new_folder


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
    parser.add_argument('--max-position-embeddings', type=length,
                        help='for a model in Meta\'s format; default: 8192, or 131072 with use_scaled_rope')
    parser.add_argument('--tokenizer-from', metavar='FOLDER',
                        help='take the files beside the weights of this Hugging Face folder, such as for a '
                        'GGUF file with a tokenizer that is not read')
    parser.add_argument('--adapter', help='folder of a PEFT LoRA adapter to merge into SOURCE')
    parser.add_argument('--resize-embeddings', type=int, nargs='?', const=0, metavar='ROWS',
                        dest='vocab_size', help='add rows to the embedding and the head, for '
                        'tokens that were added to the tokenizer alone; default: as many as it needs')
    parser.add_argument('--overwrite', action='store_true', help='replace TARGET if it exists')
    parser.add_argument('--verify', action='store_true',
                        help='read source and target once more, by other code, and compare every number')
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

    from lct import cpu_devices
    from lct.cli import convert

    args.source, args.tokenizer_from, args.adapter = (
        path and str(bucket_cache.local(path)) for path in (args.source, args.tokenizer_from, args.adapter))
    source_format = convert.format_of(args.source)
    options = {name: getattr(args, name) for name in convert.OPTIONS if getattr(args, name) is not None}
    convert.check_options(source_format, options)
    if options.get('vocab_size') == 0:
        options['vocab_size'] = convert.tokenizer_size(args.source)
    if args.dry_run:
        config = convert.read_config(args.source, **options)
        dry_run(config, args.mesh, {'float32': 4}.get(args.dtype, 2))
        return
    if args.target is None:
        raise ValueError('name the folder to write after the source, or pass --dry-run')
    cpu_devices.provide(math.prod(args.mesh))
    if source_format != 'gguf':
        warn_of_edits(args.source)
    with new_folder(args.target, args.overwrite) as target:
        write(args, str(target), source_format, options)


def write(args, target, source_format, options):
    """Convert into the folder target, and say what it holds."""
    import jax

    from lct.cli import convert
    from lct.sharding import make_mesh
    from lct.weights import companions

    with jax.set_mesh(make_mesh(args.mesh)):
        _, params = convert.convert(args.source, target, args.to, dtype=args.dtype,
                                    num_files=args.num_files, tokenizer_from=args.tokenizer_from,
                                    overwrite=args.overwrite, **options)
        print(f'{args.target}: {args.to}, {sum(x.size for x in jax.tree.leaves(params)):,} numbers of '
              f'{params.embed.dtype.name}')
    del params
    for line in companions.describe(args.tokenizer_from or args.source, target,
                                    'hf' if args.tokenizer_from else source_format, args.to):
        print(line)
    if args.verify:
        print(convert.check(args.source, target, args.to, **options))


if __name__ == '__main__':
    run_script(main, urls=('', '--tokenizer-from', '--adapter'))
