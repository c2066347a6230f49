"""A config file turned into the dataclasses of the package, and the flags that change it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from lct import watchdog
from lct.cli import fields
from lct.cli.paths import experiments_folder
from lct.cli.problems import Problems
from lct.cli.urls import check_config

if TYPE_CHECKING:  # imported where they are used: wrong flags are reported before jax is loaded
    from lct.models.llama import LlamaConfig, Memory
    from lct.train.loop import Run
    from lct.train.stages import Stage

RUN_FIELDS = ('param_dtype', 'checkpoint_every', 'keep_checkpoints', 'max_skips_in_row', 'max_failed_saves',
              'spike_factor', 'spike_window', 'line_every_s')
ALWAYS_READ = 'name', 'model_folder', 'corpus', 'seed', 'held_out'
MEMORY_SHARE = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')  # jax's names for it
# config.evaluate: whether the base, each stage but the last, and the extended model are measured
EVALUATE = {'off': (False, False, False), 'before': (True, False, False), 'after': (False, False, True),
            'before_and_after': (True, False, True), 'each_stage': (True, True, True)}


def parse_args(description: str, default_config: str | Path, default_workdir: str,
               add_flags: Callable[[argparse.ArgumentParser], None] | None = None,
               ) -> tuple[ConfigDict, argparse.Namespace]:
    """The flags --config, --workdir, --mesh, --set key=value and those of add_flags; returns (changed config,
    args). With --print-config the config is printed and the script ends.

    Raises:
      ValueError: for unknown fields and wrong values, all of them in one error.
    """
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default=str(default_config), help='a Python file with get_config()')
    parser.add_argument('--workdir', default=default_workdir, help='checkpoints, metrics and results go here')
    parser.add_argument('--mesh', help="degrees of data,fsdp,sequence,tensor of every stage, as 1,1,8,1, or "
                        "'auto': one ring over all accelerators; default: the config's")
    parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE',
                        help='set a field of the config, for example stages.0.num_steps=10 or '
                             'stages.*.theta=1000000')
    parser.add_argument('--print-config', action='store_true',
                        help='print every field with its value, in the form that --set takes, and stop')
    if add_flags:
        add_flags(parser)
    args = parser.parse_args()
    config = load_config(args.config)
    problems = Problems()
    for override in args.set:
        with problems.collect():
            set_field(config, override)
    if args.mesh:
        with problems.collect():
            set_meshes(config, args.mesh)
    problems.extend(fields.problems(as_plain(config)))
    problems.check()
    config.watchdog = {**watchdog.BUDGETS, **(config.get('watchdog') or {})}
    watchdog.budgets_of(config.watchdog)
    check_config(as_plain(config))
    check_values(config)
    make_run(config)
    if args.print_config:
        print_config(config)
        raise SystemExit(0)
    return config, args


def set_meshes(config: ConfigDict, text: str) -> None:
    """The mesh of the flag --mesh for all stages; 'auto' is one ring, which setup_devices fits to the
    accelerators."""
    if text == 'auto':
        config.fit_ring = True
        for stage in config.stages:
            stage.mesh = (1, 1, math.prod(stage.mesh), 1)
        return
    mesh = tuple(int(d) if d.strip().isdigit() else 0 for d in text.split(','))
    if len(mesh) != 4 or min(mesh) < 1:
        raise ValueError(f"--mesh {text} must be 'auto' or four degrees data,fsdp,sequence,tensor, such as "
                         '1,1,8,1')
    for stage in config.stages:
        stage.mesh = mesh


def check_values(config: ConfigDict) -> None:
    """Refuse values of config fields that no dataclass checks."""
    if config.get('seed', 0) < 0:
        raise ValueError(f'config.seed {config.seed} must be 0 or more')
    evaluate = config.get('evaluate', 'before_and_after')
    if evaluate not in EVALUATE:
        raise ValueError(f'config.evaluate {evaluate!r} is not one of {", ".join(EVALUATE)}')
    if config.get('corpus_bytes') is not None and config.corpus_bytes < 1:
        raise ValueError(f'config.corpus_bytes {config.corpus_bytes} must be above 0, or None for all')


def print_config(config: ConfigDict) -> None:
    """Every field in the form that --set takes; those that the config does not spell have their defaults."""
    for name, value, given in fields.resolved(as_plain(config)):
        print(f'{name}={fields.as_text(value)}{"" if given else "  (default)"}')


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
    try:
        if module:
            spec.loader.exec_module(module)
        if not hasattr(module, 'get_config'):
            raise ValueError(f'config {path} is not a config; give a Python file with get_config(), such as '
                             f'those in {configs}')
        return module.get_config()
    except (SyntaxError, NameError, ImportError, TypeError, AttributeError, KeyError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(error, path)
        raise ValueError(f'config {path} line {line}: {" ".join(str(error).split())}; correct the file'
                         ) from error


def load_checked(path: str | Path) -> ConfigDict:
    """The ConfigDict of a Python file, every field of which is known and of its type.

    Raises:
      ValueError: see load_config; for unknown, missing and wrong fields, all of them in one error.
    """
    config, problems = load_config(path), Problems()
    problems.extend(fields.problems(as_plain(config)))
    problems.check()
    return config


def _line_in(error, path):
    """The last line of a file that an error came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if Path(frame.filename) == path.absolute() or frame.filename == str(path)]
    return lines[-1] if lines else 1


def fill_defaults(config: ConfigDict) -> None:
    """Give a config the defaults of the fields that every run reads, where it does not spell them."""
    groups = {'': fields.Settings(), 'needle': fields.Needle(), 'loss': fields.Loss()}
    with config.ignore_type():
        for group, defaults in groups.items():
            if group and config.get(group) is None:
                config[group] = ConfigDict()
            node, values = config[group] if group else config, dataclasses.asdict(defaults)
            for name in values if group else ALWAYS_READ:
                if name not in node:
                    node[name] = values[name]


def measured_models(config: ConfigDict) -> tuple[bool, bool, bool]:
    """Whether the base, each stage but the last, and the extended model are measured."""
    return EVALUATE[config.get('evaluate', 'before_and_after')]


def set_field(config: ConfigDict, override: str) -> None:
    """Set one field, given as 'stages.0.num_steps=10', to a value of its type (see lct.cli.fields).

    'stages.*.num_steps=10' sets it in every stage. A group that the config does not have is made;
    'adapter=none' takes one away.

    Raises:
      ValueError: if there is no such field, or the text is not a value of its type.
    """
    key, equals, text = override.partition('=')
    path = key.split('.')
    if not equals:
        raise ValueError(f'--set {override} is not of the form KEY=VALUE, such as stages.0.num_steps=10')
    if path[0] == 'stages' and len(path) > 1:
        number, count = path[1], len(config.stages)
        if number == '*':
            for i in range(count):
                set_field(config, f'stages.{i}.{".".join(path[2:])}={text}')
            return
        if not number.isdigit() or int(number) >= count:
            raise ValueError(f'--set {override}: the config has no stage {number}; its stages are 0 to '
                             f'{count - 1}, and * is all of them')
    node, field = config, fields.find(path)
    below = fields.group(path)
    if field is None and below and text.lower() == 'none' and (path[0] != 'stages' or len(path) > 2):
        field = fields.Field(type(None), None)
    if field is None:
        group = f'{key} cannot be set as a whole, as it is a group of {", ".join(fields.members(path))}'
        unknown = f'the config has no field {key}; {fields.nearest(path)}'
        raise ValueError(f'--set {override}: {group if below else unknown}')
    for name in path[:-1]:
        if isinstance(node, ConfigDict) and node.get(name) is None:
            with node.ignore_type():
                node[name] = ConfigDict()
        node = node[int(name)] if isinstance(node, (list, tuple)) else node[name]
    try:
        value = fields.parse(field.kind, text)
    except (KeyError, ValueError) as error:
        now = node.get(path[-1], field.default)
        shown = 'required' if now is fields.REQUIRED else repr(now)
        raise ValueError(
            f'--set {override}: {key} is {shown}, and {text!r} is not {fields.describe(field.kind)}'
        ) from error
    with node.ignore_type():  # a theta is a number or the name of a rule
        node[path[-1]] = value


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
    optimizer = OptimizerConfig(**(config.get('optimizer') or {}))
    adapter = None
    if config.get('adapter'):
        adapter = Adapter(**{'frozen_dtype': stages[0].memory.dtype, **config.adapter})
    return Run(stages=stages, optimizer=optimizer, adapter=adapter,
               **{name: config[name] for name in RUN_FIELDS if name in config})


def make_stage(stage: ConfigDict) -> Stage:
    """The train.stages.Stage of one of config.stages."""
    from lct.train.gates import Gate
    from lct.train.stages import Stage

    given = stage.to_dict()
    given.pop('published', None)  # figures of a recipe that are results, not settings
    memory, gate = make_memory(given.pop('memory', None) or {}), given.pop('gate', None)
    given |= {name: tuple((given.pop(name, None) or {}).items()) for name in ('mixture', 'scaling')}
    if not given['mixture']:
        del given['mixture']
    return Stage(**{**given, 'mesh': tuple(given.get('mesh', (1, 1, 1, 1))), 'gate': gate and Gate(**gate),
                    'memory': memory})


def make_memory(given: dict) -> Memory:
    """The models.llama.Memory of the fields of a stage's memory, of which query_chunk, key_chunk, strategy,
    node_size and kernel configure attention."""
    from lct.models.llama import Memory
    from lct.ops.blockwise_attention import Chunks
    from lct.ops.strategies import Attention

    given = dict(given)
    take = lambda names: {ours: given.pop(name) for name, ours in names.items() if name in given}
    chunks = Chunks(**take({'query_chunk': 'query', 'key_chunk': 'key'}))
    attention = take({name: name for name in ('strategy', 'node_size', 'kernel')})
    return Memory(attention=Attention(chunks=chunks, **attention), **given)


def windowed(model_config: LlamaConfig, config: ConfigDict) -> LlamaConfig:
    """The LlamaConfig that a run trains: the checkpoint's, with the sliding window config.window if set."""
    window = config.get('window')
    return model_config if window is None else dataclasses.replace(model_config, window=window)


def setup_devices(config: ConfigDict) -> None:
    """Join the other processes, if there are any, and provide the devices that the meshes need.

    Without accelerators these are as many virtual CPU devices; elsewhere the real ones, and with
    config.fit_ring the ring is shortened to their number. Must run before jax computes anything.
    """
    import jax

    from lct import cpu_devices, processes
    from lct.plan.search import USABLE

    if not any(os.environ.get(name) for name in MEMORY_SHARE):
        os.environ[MEMORY_SHARE[-1]] = str(USABLE)  # of a GPU, which is what plans count on
    count = processes.join()
    needed = max(math.prod(stage.mesh) for stage in config.stages)
    cpu_devices.provide(-(-needed // count))
    if jax.default_backend() != 'cpu' and config.get('fit_ring', False):
        fit_ring(config, jax.device_count())


def fit_ring(config: ConfigDict, count: int) -> None:
    """Shorten every stage's ring to the largest power of two that count devices allow."""
    for stage in config.stages:
        data, fsdp, ring, tensor = stage.mesh
        room = max(count // (data * fsdp * tensor), 1)
        stage.mesh = (data, fsdp, min(ring, 1 << (room.bit_length() - 1)), tensor)
