"""The fields that a config may have: names, types and defaults, read off the dataclasses behind it.

A field is a path such as 'stages.*.memory.remat', in which * stands for the number of a stage, or for a name
that the user chooses (a kind of rows, a phase of the watchdog).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lct.text import parse_length

REQUIRED = dataclasses.MISSING  # the default of a field that has none


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields of a config that belong to no dataclass of the package.

    name: of the extended model. model_folder, license: of the base model. save_dtype: of the weights written.
    seed: of data and evaluations. corpus: a folder, glob, file or token store; exclude: patterns of names
      that are left out, as in a .gitignore; corpus_bytes: at most so many are read into memory, None for all;
      text_field: of a record, the field of its text. held_out: fraction of documents to evaluate on.
    evaluation_corpus: a folder, glob or file to evaluate on instead; corpus is then trained on whole.
    sequences, chat_template: of a token store, see cli.corpus. eos_target: whether a document of text ends
      with a target.
    window: sliding attention window in tokens. fit_ring: whether a ring is shortened to the accelerators.
    check_memory: whether the plan is compared with the memory of the devices before a run.
    evaluate: when a model is measured, a key of cli.config.EVALUATE.
    hardware, devices: those that plan.py planned for, for extend.py --check.
    start_folder: of pretrain_base.py, a model to continue.
    """

    name: str = 'extended'
    model_folder: str = ''
    license: str = ''
    save_dtype: str = 'bfloat16'
    seed: int = 0
    corpus: str = ''
    exclude: tuple[str, ...] = ()
    corpus_bytes: int | None = None
    text_field: str = 'text'
    held_out: float = 0.1
    evaluation_corpus: str = ''
    sequences: str = 'packed'
    chat_template: bool = False
    eos_target: bool = True
    window: int | None = None
    fit_ring: bool = False
    check_memory: bool = True
    evaluate: str = 'before_and_after'
    hardware: str = ''
    devices: int = 0
    start_folder: str = ''


@dataclasses.dataclass(frozen=True)
class Needle:
    """The grid of the recall probe, see eval.recall_probe.RecallGrid."""

    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 2


@dataclasses.dataclass(frozen=True)
class Loss:
    """The windows of the loss by position, see eval.loss.by_position.evaluation_windows."""

    seq_len: int = 0
    windows: int = 16
    rotations: int = 4


@dataclasses.dataclass(frozen=True)
class Base:
    """What a recipe says about its base model, for plan.py and readers; model: a name that plan.py knows."""

    max_position_embeddings: int = 0
    rope_theta: float = 0.0
    model: str = ''


@dataclasses.dataclass(frozen=True)
class Search:
    """The grid of studies/theta_search.py."""

    thetas: tuple[str | float, ...] = ()
    seeds: tuple[int, ...] = (0,)


class Field(typing.NamedTuple):
    """The type of a field, as an annotation, and its default or REQUIRED."""

    kind: Any
    default: Any


@functools.cache
def known() -> dict[str, Field]:
    """{path: Field} of all fields of a config."""
    from lct import watchdog
    from lct.data.batches.upsample import Upsample
    from lct.models.config import LlamaConfig
    from lct.models.lora import Adapter
    from lct.models.memory import Memory
    from lct.ops.blockwise_attention import Chunks
    from lct.ops.rope import RopeConfig
    from lct.ops.strategies import Attention
    from lct.train.gates import Gate
    from lct.train.loop import Run
    from lct.train.optimizer import OptimizerConfig
    from lct.train.stages import Stage

    out = {f'watchdog.{name}': Field(float | None, seconds) for name, seconds in watchdog.BUDGETS.items()}
    for prefix, cls, without in (
        ('', Settings, ()), ('', Run, ('stages', 'optimizer', 'adapter')), ('needle.', Needle, ()),
        ('loss.', Loss, ()), ('base.', Base, ()), ('search.', Search, ()), ('upsample.', Upsample, ()),
        ('optimizer.', OptimizerConfig, ()), ('adapter.', Adapter, ()), ('model.', LlamaConfig, ('rope',)),
        ('stages.*.', Stage, ('mixture', 'scaling', 'memory', 'gate')), ('stages.*.gate.', Gate, ()),
        ('stages.*.scaling.', RopeConfig, ('theta', 'max_position')),
        ('stages.*.memory.', Memory, ('attention',)), ('stages.*.memory.', Attention, ('chunks',)),
    ):
        out |= {prefix + name: field for name, field in _fields_of(cls).items() if name not in without}
    chunks = _fields_of(Chunks)
    return out | {
        'stages.*.memory.query_chunk': chunks['query'], 'stages.*.memory.key_chunk': chunks['key'],
        'stages.*.mixture.*': Field(float, 0.0), 'stages.*.published.*': Field(Any, None),
        'model.rope_theta': Field(float, REQUIRED)}


def _fields_of(cls):
    """{name: Field} of a dataclass or a NamedTuple."""
    hints = typing.get_type_hints(cls)
    if dataclasses.is_dataclass(cls):
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    else:
        defaults = {name: cls._field_defaults.get(name, REQUIRED) for name in cls._fields}
    return {name: Field(hints[name], default) for name, default in defaults.items()}


def find(path: Sequence[str]) -> Field | None:
    """The Field of a path, or None."""
    return known().get('.'.join(pattern(path)))


def pattern(path: Sequence[str]) -> tuple[str, ...]:
    """A path with * for the number of a stage and for a name that the user chooses."""
    path = tuple(path)
    if path[:1] == ('stages',) and len(path) > 1:
        path = ('stages', '*', *path[2:])
        if path[2:3] in (('mixture',), ('published',)) and len(path) > 3:
            path = (*path[:3], '*')
    return path


def group(path: Sequence[str]) -> list[str]:
    """The names of the fields below a path, none if it is a field or unknown."""
    prefix = '.'.join(pattern(path)) + '.'
    return [one[len(prefix):] for one in known() if one.startswith(prefix)]


def members(path: Sequence[str]) -> list[str]:
    """The names of the fields and groups directly below a path; of a stage, for all stages."""
    path = [*path, '*'] if tuple(path) == ('stages',) else path
    return list(dict.fromkeys(one.split('.')[0] for one in group(path)))


def nearest(path: Sequence[str]) -> str:
    """A clause that names the fields that the user may have meant."""
    wanted = pattern(path)
    by_name = {}
    for one in known():
        by_name.setdefault(one.rpartition('.')[2], []).append(one)
    near = difflib.get_close_matches('.'.join(wanted), known(), n=3, cutoff=0.75)
    for name in difflib.get_close_matches(wanted[-1], by_name, n=2, cutoff=0.7):
        near += by_name[name]
    near = list(dict.fromkeys(near))[:3]
    if near:
        number = path[1] if path[0] == 'stages' and len(path) > 1 else '0'
        return f'nearest are {", ".join(one.replace(".*.", f".{number}.", 1) for one in near)}'
    siblings = sorted(members(path[:-1]) if len(path) > 1 else {one.split('.')[0] for one in known()})
    return f'there are {", ".join(siblings)}'


def problems(config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence about every field of a config (plain values) that is unknown, missing or of a wrong type."""
    for path, value in _flatten(config):
        name, field = '.'.join(path), find(path)
        if field is None and group(path):
            if value is not None:
                yield f'config.{name} {value!r} must be a group of {", ".join(members(path))}'
        elif field is None:
            yield f'the config has a field {name}, which nothing reads; {nearest(path)}'
        elif not accepts(field.kind, value):
            yield f'config.{name} {value!r} is not {describe(field.kind)}'
    yield from _missing(config)


def _flatten(value, path=()):
    """(path, value) of all leaves."""
    below = value.items() if isinstance(value, Mapping) else ()
    if path == ('stages',) and isinstance(value, (list, tuple)):
        below = ((str(i), one) for i, one in enumerate(value))
    if not below:
        return [(path, value)] if not isinstance(value, Mapping) and path != ('stages',) else []
    return [leaf for name, one in below if (*path, name)[2:3] != ('published',)
            for leaf in _flatten(one, (*path, str(name)))]


def resolved(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """(name, value, whether the config spells it) of all fields of a config in plain values, except those of
    groups that it does not have."""
    given = {'.'.join(path): value for path, value in _flatten(config)}
    groups = {'.'.join(path[:i]) for path, _ in _flatten(config) for i in range(len(path))}
    for name, field in known().items():
        if not name.startswith('stages.') and name.rpartition('.')[0] in groups:
            if name in given or field.default is not REQUIRED:
                yield name, given.get(name, field.default), name in given
    for i, _ in enumerate(config.get('stages', ())):
        for name, field in known().items():
            if not name.startswith('stages.') or name.endswith('published.*'):
                continue
            name = name.replace('*', str(i), 1)
            if name.endswith('.*'):
                for one in (one for one in given if one.startswith(name[:-1])):
                    yield one, given[one], True
            elif name in given or (field.default is not REQUIRED and name.rpartition('.')[0] in groups):
                yield name, given.get(name, field.default), name in given


def as_text(value: Any) -> str:
    """A value as --set takes it."""
    if isinstance(value, (list, tuple)):
        return ','.join(map(as_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _missing(config):
    """Sentences about groups that lack a required field."""
    stages = config.get('stages') or ()
    if not stages:
        yield "the config has no stages; add at least one, see lct.cli.stage_config.stage"
    groups = [('model', config.get('model'))]
    for i, stage in enumerate(stages):
        groups += [(f'stages.{i}', stage)]
        groups += [(f'stages.{i}.gate', stage.get('gate'))] if isinstance(stage, Mapping) else []
    for name, values in groups:
        if isinstance(values, Mapping):
            for below in group(name.split('.')):
                field = known()['.'.join(pattern((*name.split('.'), below)))]
                if '.' not in below and field.default is REQUIRED and below not in values:
                    yield f'config.{name} lacks the field {below}; give it, {describe(field.kind)}'


def accepts(kind: Any, value: Any) -> bool:
    """Whether a value of a config file is one of the annotated type."""
    if kind is Any:
        return True
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(accepts(one, value) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and all(
            accepts(typing.get_args(kind)[0], one) for one in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def parse(kind: Any, text: str) -> Any:
    """The value that a text on the command line stands for. Whole numbers may be written as 64K or 1M.

    Raises:
      ValueError: if it stands for none.
    """
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return _parse_union(typing.get_args(kind), text)
    if typing.get_origin(kind) is tuple:
        return tuple(parse(typing.get_args(kind)[0], one.strip()) for one in text.split(',') if one.strip())
    if kind is type(None):
        return {'none': None}[text.lower()]
    if kind is bool:
        return {'true': True, 'false': False}[text.lower()]
    if kind is int:
        return parse_length(text) if text[-1:] in 'kKmM' else int(text)
    return kind(text)


def _parse_union(kinds, text):
    if type(None) in kinds and text.lower() == 'none':
        return None
    for kind in sorted((one for one in kinds if one is not type(None)), key=lambda one: one is str):
        try:
            return parse(kind, text)
        except (ValueError, KeyError):
            continue
    raise ValueError(text)


def describe(kind: Any) -> str:
    """A type as text, as the end of 'is not ...'."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return ' or '.join(map(describe, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f'{describe(typing.get_args(kind)[0])}, or several with commas between them'
    return {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'a string',
            type(None): 'none'}.get(kind, 'a value')
