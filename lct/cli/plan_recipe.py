"""A recipe planned: its stages predicted on their own meshes or on the best of other devices, beside the
minutes that its authors published."""

import argparse
import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lct.cli import planned_config
from lct.cli.config import load_checked, make_run, windowed
from lct.cli.main import check_positive
from lct.cli.paths import experiments_folder
from lct.cli.plan_models import MODELS
from lct.models.config import LlamaConfig
from lct.models.lora import Adapter
from lct.plan import compiled, hardware, search, tables, timing
from lct.plan.buffers import Buffers
from lct.plan.cost import Step
from lct.plan.tables import GiB
from lct.text import parse_length, table
from lct.train import stages
from lct.train.settings import Run


def recipe_model(config: ConfigDict, name: str | None) -> tuple[str, LlamaConfig]:
    """(name, LlamaConfig) of the base model of a recipe: --model, or the one that its config names."""
    name = name or (config.get('base') or {}).get('model')
    if not name:
        raise ValueError('the recipe names no base model; add --model, or base.model to the config')
    name = hardware.lookup(name, MODELS, 'model')
    return name, MODELS[name]


def hardware_of(args: argparse.Namespace, published: str = '') -> hardware.Hardware:
    """The Hardware of the flags, or the published device of a recipe, with the network of the flags."""
    names = (part for part in re.split(r'[\s-]', published.lower()) if part in hardware.TABLE)
    name = args.hardware or next(names, None)
    if name is None:
        raise ValueError(f'--hardware is needed; choose from {", ".join(hardware.TABLE)}')
    kind = hardware.find(name)
    if args.network:
        flow = min(kind.between, args.network * 1e9) if kind.network > kind.between else args.network * 1e9
        kind = dataclasses.replace(kind, network=args.network * 1e9, between=flow)
    return kind


def price(hours: float, devices: int, per_hour: float | None) -> str:
    """The price of hours of devices, as the end of a sentence; '' if it is not known."""
    return f', {hours * devices * per_hour:,.0f} at {per_hour} per device and hour' if per_hour else ''


class PlannedStage(NamedTuple):
    """A stage of a recipe and its predictions. published: the 'published' fields of the config."""

    name: str
    num_steps: int
    step: Step
    kind: hardware.Hardware
    times: dict[str, float]
    buffers: Buffers
    published: dict

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.times.values())

    @property
    def minutes(self) -> float:
        """Of all steps."""
        return self.seconds * self.num_steps / 60

    @property
    def comparable(self) -> bool:
        """Whether there are published minutes of the same devices."""
        return bool(self.published.get('minutes')) and self.published.get('devices') == self.step.devices \
            and self.kind.name in self.published['device'].lower()


def plan_recipe(args: argparse.Namespace) -> None:
    """Print the plan of a recipe, and write its config to args.output if that is given.

    Raises:
      ValueError: for flags that do not go with a recipe, and for stages that cannot be planned.
    """
    check_positive(args, 'devices')
    for flag in ('rows', 'tokens', 'theta'):
        if getattr(args, flag) is not None:
            raise ValueError(f'--{flag} is set by the recipe {args.config}; '
                             'drop the flag or write another recipe')
    raw = load_checked(args.config)
    run, (name, config) = make_run(raw), recipe_model(raw, args.model)
    config = windowed(config, raw)
    context = args.context and parse_length(args.context)
    check_recipe_context(args, run, config, context)
    placement = f'on the best mesh of {args.devices} devices' if args.devices else 'on its own meshes'
    print(f'{name}, {args.config}: stage by stage, parameters in {args.param_dtype}, computation in '
          f'bfloat16, {placement}\n')
    all_fields = [fields.to_dict() for fields in raw.stages]
    planned = [plan_stage(stage, fields, config, run.adapter, args)
               for stage, fields in zip(run.stages, all_fields)
               if not context or stage.seq_len <= context]
    print_stages(planned, name, run.adapter)
    hours = sum(one.minutes / 60 * one.step.devices for one in planned)
    days = sum(one.minutes for one in planned) / 60 / 24
    last = planned[-1]
    print(f'\n{days:.2f} days, {hours:,.0f} device-hours in total{price(hours, 1, args.price_per_hour)}\n\n'
          f'{tables.assumptions(last.kind)}')
    print_agreement([(one.minutes, one.published['minutes']) for one in planned if one.comparable])
    if args.output:
        fields = [planned_config.stage_fields(fields, one.step) for fields, one in zip(all_fields, planned)]
        others = raw.to_dict() | {'hardware': last.kind.name, 'devices': args.devices or 0}
        if context and 'needle' in others:  # the probe must not read further than the last stage trains
            others['needle']['lengths'] = tuple(n for n in raw.needle.lengths if n <= last.step.seq_len)
        planned_config.write(pathlib.Path(args.output), {**others, 'stages': fields}, last.kind.name,
                             last.step, f'{hours:,.0f} device-hours')


def check_recipe_context(args: argparse.Namespace, run: Run, config: LlamaConfig,
                         context: int | None) -> None:
    """Refuse a --context beyond the last stage of a recipe.

    Raises:
      ValueError: with the remedy.
    """
    last = run.stages[-1]
    if context and context > last.seq_len:
        theta = stages.configs(run.stages, config)[-1].rope_theta
        raise ValueError(f'context {args.context} is beyond the {last.seq_len} tokens for which the last '
                         f'stage of {args.config} sets theta {theta:,.0f}; add a stage with theta '
                         'critical_base, or drop --context')


def plan_stage(stage: stages.Stage, fields: dict[str, Any], config: LlamaConfig, adapter: Adapter | None,
               args: argparse.Namespace) -> PlannedStage:
    """The PlannedStage of a stage, on its own mesh or on the best one of --devices. adapter: of the run, or
    None."""
    published = fields.get('published', {})
    kind = hardware_of(args, published.get('device', ''))
    if args.devices:
        job = search.Job(config, stage.seq_len, stage.batch_size * stage.accumulation, args.param_dtype,
                         adapter)
        step = search.best(job, kind, args.devices).plans[0].step
    else:
        memory = dataclasses.replace(stage.memory, dtype='bfloat16')
        step = Step(config, stage.mesh, stage.seq_len, stage.batch_size, stage.accumulation, memory,
                    args.param_dtype, stage.layout)
        step.check()
    return PlannedStage(stage.name, stage.num_steps, step, kind, timing.seconds(step, kind, adapter=adapter),
                        search.needed_by(step, kind, adapter), published)


def print_stages(planned: Sequence[PlannedStage], model: str, adapter: Adapter | None = None) -> None:
    """The stages of a recipe, and the seconds of a step of each. adapter: of the run, or None."""
    path = experiments_folder() / 'results' / 'plan_memory.json'
    memory_table = json.loads(path.read_text()) if path.exists() else {}
    header = ('stage', 'hardware', 'mesh', 'policy', 's/step', 'tokens/s', 'MFU', 'GiB', 'predicted min',
              'published min', 'ratio', 'compiled GiB')
    known = lambda one: compiled.step_bytes(memory_table, one.kind.name, model, one.step, adapter)
    print(table(header, [stage_row(one, known(one), adapter) for one in planned], left=(0, 3)))
    print('\nGiB: predicted, per device; ! where that is more than the usable memory. ratio: predicted to '
          'published, where hardware and devices are theirs.')
    names = list(dict.fromkeys(name for one in planned for name in one.times))
    print('\nseconds of a step, predicted:')
    print(table(('stage', *names),
                [(one.name, *(f'{one.times.get(name, 0):.1f}' for name in names)) for one in planned]))


def stage_row(one: PlannedStage, compiled_bytes: float | None, adapter: Adapter | None = None) -> tuple:
    """A stage in the table of a recipe. compiled_bytes: per device, or None. adapter: of the run, or None."""
    step, published = one.step, one.published.get('minutes')
    full = one.buffers.peak > search.USABLE * one.kind.memory
    return (one.name, f'{step.devices} x {one.kind.name}', step.mesh, tables.policy(step),
            f'{one.seconds:.1f}',
            f'{step.tokens / one.seconds:,.0f}',
            f'{timing.utilisation(step, one.kind, one.seconds, adapter):.1%}',
            f'{one.buffers.peak / GiB:.1f}{"!" if full else ""}', f'{one.minutes:.0f}', published or '-',
            f'{one.minutes / published:.2f}' if one.comparable else '-',
            f'{compiled_bytes / GiB:.1f}' if compiled_bytes else '-')


def print_agreement(minutes: Sequence[tuple[float, float]]) -> None:
    """Print how well minutes agree. minutes: [(predicted, published)]."""
    if len(minutes) < 2:
        return
    pairs = [(a, b) for i, a in enumerate(minutes) for b in minutes[i + 1:]]
    ordered = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs)
    worst = max(max(predicted / published, published / predicted) for predicted, published in minutes)
    print(f'against the published minutes: at worst a factor {worst:.2f}; {ordered} of {len(pairs)} pairs of '
          'stages are in the published order')
