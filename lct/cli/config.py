"""A config file turned into the dataclasses of the package, and the flags that change it."""

import argparse
import dataclasses
import importlib.util
import math
import os
import pathlib

from ml_collections import ConfigDict

from lct.cli.paths import experiments_folder

RUN_FIELDS = ('param_dtype', 'checkpoint_every', 'keep_checkpoints', 'max_skips_in_row')


def parse_args(description, default_config, default_workdir):
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
        raise ValueError(f'config {path} does not exist; the project has {sorted(p.name for p in (experiments_folder() / "configs").glob("*.py"))}')
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = spec and importlib.util.module_from_spec(spec)  # None: not the name of a Python file
    if module:
        spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
        raise ValueError(f'config {path} is no config; give a Python file with get_config(), such as those of '
                         f'{experiments_folder() / "configs"}')
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


def as_plain(config):
    """The config as dicts, lists and values, for JSON."""
    if isinstance(config, (list, tuple)):
        return [as_plain(value) for value in config]
    if hasattr(config, 'items'):
        return {key: as_plain(value) for key, value in config.items()}
    return config


def run_identity(config: ConfigDict) -> dict:
    """as_plain(config) without the fields that may change when a run is continued: the gates of its stages, and the
    dtype of the model that it writes at its end."""
    values = as_plain(config)
    values.pop('save_dtype', None)
    for stage in values['stages']:
        stage.pop('gate', None)
    return values


def make_run(config):
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


def windowed(model_config, config):
    """The LlamaConfig that a run trains: that of its checkpoint, with the sliding window of config.window if the
    ConfigDict has one."""
    return dataclasses.replace(model_config, window=config.window) if 'window' in config else model_config


def setup_devices(config):
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
