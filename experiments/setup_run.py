"""What the scripts share: flags, virtual devices, and a config turned into the dataclasses of the package."""

import argparse
import contextlib
import importlib.util
import math
import os
import pathlib
import sys
import traceback
import zlib

RUN_FIELDS = ('param_dtype', 'checkpoint_every', 'keep_checkpoints', 'max_skips_in_row')
HERE = pathlib.Path(__file__).resolve().parent


def parse(description, default_config, default_workdir):
    """Flags --config, --workdir, --mesh and any --set key=value of the config; returns (config, args)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--config', default=str(default_config), help='a Python file with get_config()')
    parser.add_argument('--workdir', default=default_workdir, help='checkpoints, metrics and results go here')
    parser.add_argument('--mesh', help='degrees of data,fsdp,sequence,tensor of every stage, as 1,1,8,1')
    parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE',
                        help='override a field of the config, for example stages.0.num_steps=10')
    args = parser.parse_args()
    config = load_config(args.config)
    for override in args.set:
        set_field(config, override)
    if config.get('seed', 0) < 0:
        raise ValueError(f'config.seed {config.seed} must be 0 or more')
    if args.mesh:
        mesh = tuple(int(d) if d.strip().isdigit() else 0 for d in args.mesh.split(','))
        if len(mesh) != 4 or min(mesh) < 1:
            raise ValueError(f'--mesh {args.mesh} must be four degrees data,fsdp,sequence,tensor, such as 1,1,8,1')
        for stage in config.stages:
            stage.mesh = mesh
    return config, args


def load_config(path):
    """The ConfigDict of a Python file."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f'config {path} does not exist; the project has {sorted(p.name for p in (HERE / "configs").glob("*.py"))}')
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = spec and importlib.util.module_from_spec(spec)  # None: not the name of a Python file
    if module:
        spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
        raise ValueError(f'config {path} is no config; give a Python file with get_config(), such as those of '
                         f'{HERE / "configs"}')
    return module.get_config()


def set_field(config, override):
    """Set one field, given as 'stages.0.num_steps=10', keeping its type."""
    key, equals, text = override.partition('=')
    *parents, last = key.split('.')
    try:
        node = config
        for part in parents:
            node = node[int(part)] if isinstance(node, (list, tuple)) else node[part]
        old = node[last]
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f'--set {override}: the config has no field {key}') from error
    if not equals:
        raise ValueError(f'--set {override} is not of the form key=value')
    try:
        node[last] = _like(old, text)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f'--set {override}: {key} is {old!r}, and {text!r} is nothing of that kind') from error


def _like(old, text):
    """text as a value of old's type; a word may become a number ('dynamic_ntk' -> 1e6)."""
    if isinstance(old, tuple):
        return tuple(_like(old[0], part) for part in text.split(','))
    if isinstance(old, bool):
        return {'true': True, 'false': False}[text.lower()]
    if not isinstance(old, (int, float, str)):
        raise TypeError('only numbers, words, true or false, and tuples of them can be set')
    if isinstance(old, str):
        try:
            return float(text)
        except ValueError:
            return text
    return int(text) if isinstance(old, int) else float(text)


def model_folder(name):
    """The folder of a checkpoint: the user's own, one that the project ships beside this file, or 'smollm2'."""
    if not name:
        raise ValueError('config.model_folder is empty; add --set model_folder=PATH of a Hugging Face Llama folder')
    if str(name) == 'smollm2':
        from lct.weights import smollm2

        return smollm2.model_folder()
    path = pathlib.Path(name)
    return path if path.exists() or not (HERE / name).exists() else HERE / name


def fingerprint(folder):
    """What tells one checkpoint from another without reading all of it: the size of its files and a crc32 of
    their first megabyte."""
    out = {}
    for path in sorted(pathlib.Path(folder).glob('*.safetensors')):
        with path.open('rb') as file:
            out[path.name] = [path.stat().st_size, zlib.crc32(file.read(2**20))]
    return out


def plain(config):
    """The config as dicts, lists and values, for JSON."""
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    if hasattr(config, 'items'):
        return {key: plain(value) for key, value in config.items()}
    return config


def claimed(config):
    """plain(config) less what a run may go on with another of: the gates of its stages, and the dtype of the model
    that it writes at its end."""
    values = plain(config)
    values.pop('save_dtype', None)
    for stage in values['stages']:
        stage.pop('gate', None)
    return values


def encode(words, documents):
    """Token ids, one int32 array a document; in slices, so that a large corpus is never held as Python ints."""
    import numpy as np

    ids = []
    for i in range(0, len(documents), 64):
        texts = [document.text for document in documents[i:i + 64]]
        ids += [np.asarray(one, np.int32) for one in words.encode_batch(texts)]
    return ids


def stream(config, words):
    """The rows of config.corpus to train on, and its held-out documents as [ids int32 [n]].

    The folder of a token store (experiments/tokenize_corpus.py) is read as it is trained on, each process its
    part; config.sequences names a mode of lct.data.sequences (default: packed), config.upsample gives at_least
    and keep of lct.data.upsample, config.chat_template = True puts chats into the model's own template. Anything
    else is tokenized here and kept in memory.
    """
    from lct.data import chat, documents, sequences, store
    from lct.data.mixture import Mixture
    from lct.data.stream import Stream
    from lct.data.upsample import Upsample
    from lct.train.metrics import say

    if not config.corpus:
        raise ValueError('config.corpus is empty; add --set corpus=PATH of your documents: a folder, glob, JSONL or '
                         'text file, or a token store')
    if not (pathlib.Path(config.corpus) / 'index.json').is_file():
        training, held_out = documents.split(documents.read(config.corpus, config.corpus_bytes), config.held_out)
        return Mixture(encode(words, training), words, seed=config.seed), encode(words, held_out)
    mode = config.get('sequences', 'packed')
    if mode not in sequences.MODES:
        raise ValueError(f'config.sequences {mode!r} is not one of {", ".join(sequences.MODES)}')
    upsample = Upsample(**config.upsample) if config.get('upsample') else None
    template = chat.read(model_folder(config.model_folder)) if config.get('chat_template') else None
    rows = Stream(store.Store(config.corpus), words, seed=config.seed, mode=getattr(sequences, mode),
                  upsample=upsample, held_out=config.held_out, template=template)
    say(', '.join(f'{count:,} {what}' for what, count in rows.census().items()) + f' in the store {config.corpus}')
    # enough for the loss windows and the haystack, not a hundredth of a terabyte
    wanted = 2 * max(config.loss.seq_len * config.loss.windows, *config.needle.lengths)
    return rows, rows.held_out(wanted) if config.held_out else []


def devices(config):
    """Meet the other processes, if there are any, and make the devices that the meshes need: on a machine without
    accelerators as many virtual CPU devices, elsewhere the real ones, the ring fitted to their number if
    config.fit_ring says so. Must run before jax computes anything."""
    import jax

    from lct import processes

    count = processes.join()
    needed = max(math.prod(stage.mesh) for stage in config.stages)
    if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        jax.config.update('jax_num_cpu_devices', -(-needed // count))
    if jax.default_backend() != 'cpu' and config.get('fit_ring', False):
        fit_ring(config, jax.device_count())


def fit_ring(config, count):
    """Shorten every stage's ring to the largest power of two that count devices allow."""
    for stage in config.stages:
        data, fsdp, ring, tensor = stage.mesh
        room = max(count // (data * fsdp * tensor), 1)
        stage.mesh = (data, fsdp, min(ring, 1 << (room.bit_length() - 1)), tensor)


def run_of(config):
    """The train.loop.Run of a ConfigDict."""
    from lct.models.llama import Memory
    from lct.models.lora import Adapter
    from lct.ops.blockwise_attention import Chunks
    from lct.ops.strategies import Attention
    from lct.train.gates import Gate
    from lct.train.loop import Run
    from lct.train.optimizer import OptimizerConfig
    from lct.train.stages import Stage

    def stage(fields):
        fields = fields.to_dict()
        fields.pop('published', None)  # a recipe's figures that are results, not settings
        memory = fields.pop('memory')
        chunks = Chunks(memory.pop('query_chunk'), memory.pop('key_chunk'))
        how = Attention(memory.pop('strategy', 'ring'), memory.pop('node_size', 1), chunks,
                        kernel=memory.pop('kernel', 'xla'))
        gate = fields.pop('gate', None)
        return Stage(**{**fields, 'mesh': tuple(fields['mesh']), 'mixture': tuple(fields['mixture'].items()),
                        'scaling': tuple(fields.get('scaling', {}).items()), 'gate': gate and Gate(**gate),
                        'memory': Memory(attention=how, **memory)})

    stages = tuple(stage(s) for s in config.stages)
    adapter = None
    if config.get('adapter'):
        adapter = Adapter(**{'frozen_dtype': stages[0].memory.dtype, **config.adapter})
    return Run(stages=stages, optimizer=OptimizerConfig(**config.optimizer), adapter=adapter,
               **{name: config[name] for name in RUN_FIELDS if name in config})


@contextlib.contextmanager
def needs(packages):
    """Around imports: a missing package is named, with what pip should install."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name.partition('.')[0]
        raise ValueError(f'this script needs the package {missing}; pip install {packages}') from error


def positive(args, *names):
    """Refuse flags that are given and not above 0."""
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise ValueError(f'--{name.replace("_", "-")} {number} must be a whole number above 0')


def main(function, resumes=False):
    """Run a script; what the user can mend ends in one sentence, LCT_TRACEBACK=1 shows where it came from.
    resumes: the same command continues a run that was stopped."""
    from lct import processes

    try:
        function()
    except KeyboardInterrupt:
        print('stopped' + '; the same command continues from the last checkpoint' * resumes, file=sys.stderr)
        processes.leave(130)
    except Exception as error:
        mendable = isinstance(error, (ValueError, FloatingPointError, OSError))
        if mendable and not os.environ.get('LCT_TRACEBACK'):
            text = str(error)
            if isinstance(error, OSError) and error.filename is not None:
                text = f'{error.filename} can be neither read nor written ({error.strerror}); name another file or folder'
            print('error:', ' '.join(text.split()), file=sys.stderr)
        else:
            traceback.print_exc()
        processes.leave(1)
