"""extend.py --check: everything short of training, for the hardware that a config names, on any machine."""

import math

from ml_collections import ConfigDict

from lct.cli import memory_check
from lct.cli.config import make_run, windowed
from lct.cli.extension import check_stages, check_without_devices, describe
from lct.cli.host_memory import host_memory
from lct.cli.plan_models import MODELS
from lct.cli.problems import Problems
from lct.models.config import LlamaConfig
from lct.plan import hardware
from lct.plan.search import USABLE
from lct.plan.tables import GiB, policy
from lct.text import short_length, table
from lct.train.settings import Run


def print_check(config: ConfigDict) -> None:
    """Check a config, and print the plan of its memory beside that of the devices.

    A config without a model folder is checked against the published sizes of base.model.

    Raises:
      ValueError: for everything that is wrong, each with its remedy.
    """
    problems, kind = Problems(), None
    with problems.collect():
        kind = hardware_of(config)
        check_devices(config)
    by_name = not config.get('model_folder') and (config.get('base') or {}).get('model')
    with problems.collect():
        if by_name:
            base = MODELS[hardware.lookup(by_name, MODELS, 'config.base.model')]
            run = make_run(config)
            check_stages(config, run, base, windowed(base, config), kind)
            line = f'{by_name} by its published sizes'
        else:
            checked = check_without_devices(config, kind)
            run, base, line = checked.settings, checked.start, describe(checked)
    problems.check()
    print(f'{line}\n')
    print_memory(run, base, kind)
    if by_name:
        print('\nnot checked, as they are not given yet: --set model_folder=YOUR_FOLDER and '
              '--set corpus=YOUR_DOCUMENTS')
    print('\nthe config can be trained')


def hardware_of(config: ConfigDict) -> hardware.Hardware:
    """The Hardware that a config names, else the devices of this process."""
    devices = max(math.prod(stage.mesh) for stage in config.stages)
    if config.get('hardware') and config.hardware != 'cpu':
        return hardware.find(config.hardware)
    import jax

    if config.get('hardware') == 'cpu' or jax.default_backend() == 'cpu':
        return hardware.cpu(devices, host_memory())
    return memory_check.device_hardware()


def check_devices(config: ConfigDict) -> None:
    """Refuse meshes of other than the devices that a config names."""
    for stage in config.stages if config.get('devices') else ():
        if math.prod(stage.mesh) != config.devices:
            raise ValueError(f'the mesh {tuple(stage.mesh)} of stage {stage.name} takes '
                             f'{math.prod(stage.mesh)} devices, and config.devices is {config.devices}; give '
                             'the mesh of all of them, or --set devices=0')


def print_memory(run: Run, config: LlamaConfig, kind: hardware.Hardware) -> None:
    """A row for every stage: its predicted memory beside that of a device."""
    steps = [memory_check.step_of(run, i, config) for i in range(len(run.stages))]
    peaks = [memory_check.needed_by(run, step, kind).peak for step in steps]
    print(table(
        ('stage', 'devices', 'mesh', 'policy', 'tokens per step', 'steps', 'GiB', f'of {kind.name}, usable'),
        [(short_length(stage.seq_len), step.devices, stage.mesh, policy(step), f'{stage.tokens_per_step:,}',
          stage.num_steps, f'{peak / GiB:.1f}', f'{USABLE * kind.memory / GiB:.1f}')
         for stage, step, peak in zip(run.stages, steps, peaks, strict=True)], left=(0, 3)))
