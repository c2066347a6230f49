"""A config file turned into the dataclasses of the package, and the flags that change it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from lct import storage, watchdog
from lct.cli.paths import experiments_folder

if TYPE_CHECKING:  # imported where they are used: wrong flags are reported before jax is loaded
    from lct.models.llama import LlamaConfig, Memory
    from lct.train.loop import Run
    from lct.train.stages import Stage

RUN_FIELDS = ('param_dtype', 'checkpoint_every', 'keep_checkpoints', 'max_skips_in_row', 'max_failed_saves',
              'spike_factor', 'spike_window')
# Fields that --set may give to a config that lacks them, with their defaults
OPTIONAL = {'check_memory': True, 'keep_checkpoints': 2, 'max_skips_in_row': 5, 'max_failed_saves': 5,
            'param_dtype': 'float32', 'spike_factor': 0.0, 'spike_window': 64, 'eos_target': True}


def parse_args(description: str, default_config: str | Path,
               default_workdir: str) -> tuple[ConfigDict, argparse.Namespace]:
    """The flags --config, --workdir, --mesh and --set key=value; returns (changed config, args)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--config', default=str(default_config), help='a Python file with get_config()')
    parser.add_argument('--workdir', default=default_workdir, help='checkpoints, metrics and results go here')
    parser.add_argument('--mesh', help='degrees of data,fsdp,sequence,tensor of every stage, as 1,1,8,1')
    parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE',
                        help='override a field of the config, for example stages.0.num_steps=10')
    args = parser.parse_args()
    config = load_config(args.config)
    config.watchdog = {**watchdog.BUDGETS, **config.get('watchdog', {})}
    for override in args.set:
        set_field(config, override)
    watchdog.budgets_of(config.watchdog)
    refuse_remote(config)
    if config.get('seed', 0) < 0:
        raise ValueError(f'config.seed {config.seed} must be 0 or more')
    if args.mesh:
        mesh = tuple(int(d) if d.strip().isdigit() else 0 for d in args.mesh.split(','))
        if len(mesh) != 4 or min(mesh) < 1:
            raise ValueError(
                f'--mesh {args.mesh} must be four degrees data,fsdp,sequence,tensor, such as 1,1,8,1')
        for stage in config.stages:
            stage.mesh = mesh
    return config, args


def refuse_remote(config: ConfigDict) -> None:
    """Refuse a path with a scheme in any field, see storage.refuse_remote."""
    def check(value, name):
        if isinstance(value, str):
            storage.refuse_remote(value, name)
        elif isinstance(value, (list, dict)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                check(item, f'{name}.{key}')

    check(as_plain(config), 'config')


def load_config(path: str | Path) -> ConfigDict:
    """The ConfigDict of a Python file, which may import the package and load other configs by this function.

    Raises:
      ValueError: if the file does not exist, or has no get_config().
    """
    path, configs = Path(path), experiments_folder() / 'configs'
    if not path.is_file():
        known = ', '.join(sorted(file.relative_to(configs).as_posix() for file in configs.rglob('*.py')))
        raise ValueError(f'config {path} does not exist; {configs} has {known}')
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = spec and importlib.util.module_from_spec(spec)  # None: not the name of a Python file
    if module:
        spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
        raise ValueError(f'config {path} is not a config; give a Python file with get_config(), such as '
                         f'those in {configs}')
    return module.get_config()


def set_field(config: ConfigDict, override: str) -> None:
    """Set one field, given as 'stages.0.num_steps=10', keeping its type.

    Raises:
      ValueError: if there is no such field, or the text is not a value of its type.
    """
    key, equals, text = override.partition('=')
    *parents, last = key.split('.')
    if key in OPTIONAL and key not in config:
        config[key] = OPTIONAL[key]
    try:
        node = config
        for name in parents:
            node = node[int(name)] if isinstance(node, (list, tuple)) else node[name]
        old = node[last]
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f'--set {override}: the config has no field {key}') from error
    if not equals:
        raise ValueError(f'--set {override} is not of the form key=value')
    try:
        node[last] = _parse(text, old)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f'--set {override}: {key} is {old!r}, and {text!r} is not {_describe_type(old)}') from error


def _parse(text, old):
    """text as a value of old's type; a string field also takes a number ('dynamic_ntk' -> 1e6)."""
    if isinstance(old, tuple):
        return tuple(_parse(item, old[0]) for item in text.split(','))
    if isinstance(old, bool):
        return {'true': True, 'false': False}[text.lower()]
    if not isinstance(old, (int, float, str)):
        raise TypeError('only numbers, strings, booleans and tuples of them can be set')
    if isinstance(old, str):
        try:
            return float(text)
        except ValueError:
            return text
    return int(text) if isinstance(old, int) else float(text)


def _describe_type(old):
    if isinstance(old, tuple) and old:
        return f'{_describe_type(old[0])}, or several with commas between them'
    names = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'a string'}
    return names.get(type(old), 'possible: only numbers, strings, booleans and tuples of them can be set')


def as_plain(config: Any) -> Any:
    """The config as dicts, lists and values, for JSON."""
    if isinstance(config, (list, tuple)):
        return [as_plain(value) for value in config]
    if hasattr(config, 'items'):
        return {key: as_plain(value) for key, value in config.items()}
    return config


def make_run(config: ConfigDict) -> Run:
    """The train.loop.Run of a ConfigDict."""
    from lct.models.lora import Adapter
    from lct.train.loop import Run
    from lct.train.optimizer import OptimizerConfig

    stages = tuple(map(make_stage, config.stages))
    adapter = None
    if config.get('adapter'):
        adapter = Adapter(**{'frozen_dtype': stages[0].memory.dtype, **config.adapter})
    return Run(stages=stages, optimizer=OptimizerConfig(**config.optimizer), adapter=adapter,
               **{name: config[name] for name in RUN_FIELDS if name in config})


def make_stage(stage: ConfigDict) -> Stage:
    """The train.stages.Stage of one of config.stages."""
    from lct.train.gates import Gate
    from lct.train.stages import Stage

    fields = stage.to_dict()
    fields.pop('published', None)  # figures of a recipe that are results, not settings
    memory, gate = make_memory(fields.pop('memory')), fields.pop('gate', None)
    return Stage(**{**fields, 'mesh': tuple(fields['mesh']), 'mixture': tuple(fields['mixture'].items()),
                    'scaling': tuple(fields.get('scaling', {}).items()), 'gate': gate and Gate(**gate),
                    'memory': memory})


def make_memory(fields: dict) -> Memory:
    """The models.llama.Memory of the fields of a stage's memory, of which query_chunk, key_chunk, strategy,
    node_size and kernel configure attention."""
    from lct.models.llama import Memory
    from lct.ops.blockwise_attention import Chunks
    from lct.ops.strategies import Attention

    fields = dict(fields)
    chunks = Chunks(fields.pop('query_chunk'), fields.pop('key_chunk'))
    attention = Attention(fields.pop('strategy', 'ring'), fields.pop('node_size', 1), chunks,
                          kernel=fields.pop('kernel', 'xla'))
    return Memory(attention=attention, **fields)


def windowed(model_config: LlamaConfig, config: ConfigDict) -> LlamaConfig:
    """The LlamaConfig that a run trains: the checkpoint's, with the sliding window config.window if set."""
    return dataclasses.replace(model_config, window=config.window) if 'window' in config else model_config


def setup_devices(config: ConfigDict) -> None:
    """Join the other processes, if there are any, and provide the devices that the meshes need.

    Without accelerators these are as many virtual CPU devices; elsewhere the real ones, and with
    config.fit_ring the ring is shortened to their number. Must run before jax computes anything.
    """
    import jax

    from lct import processes

    count = processes.join()
    needed = max(math.prod(stage.mesh) for stage in config.stages)
    if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        jax.config.update('jax_num_cpu_devices', -(-needed // count))
    if jax.default_backend() != 'cpu' and config.get('fit_ring', False):
        fit_ring(config, jax.device_count())


def fit_ring(config: ConfigDict, count: int) -> None:
    """Shorten every stage's ring to the largest power of two that count devices allow."""
    for stage in config.stages:
        data, fsdp, ring, tensor = stage.mesh
        room = max(count // (data * fsdp * tensor), 1)
        stage.mesh = (data, fsdp, min(ring, 1 << (room.bit_length() - 1)), tensor)
