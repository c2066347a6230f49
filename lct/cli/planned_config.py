"""A plan of lct.plan as a config for experiments/extend.py."""

from collections.abc import Sequence
from pathlib import Path

from lct.cli.plan_models import BaseModel
from lct.files import write_atomically
from lct.plan.cost import Step

CONFIG = '''"""Written by experiments/plan.py for {devices} x {hardware}.

    python experiments/extend.py --config {path} --workdir runs/{name}{settings}

Predicted: {prediction}.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict({fields})
    config.stages = tuple(ConfigDict(stage) for stage in {stages})
    return config
'''


def config_fields(name: str, model: BaseModel, stages: Sequence[dict], evaluations: dict) -> dict:
    """All fields of a config. evaluations: held_out, needle and loss."""
    config = model.config
    return {
        'name': name, 'model_folder': model.path,
        'license': model.license, 'seed': 0,
        'base': {'model': '' if model.folder else model.name,
                 'max_position_embeddings': config.max_position_embeddings,
                 'rope_theta': config.rope_theta},
        'corpus': '', 'optimizer': {'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1},
        'checkpoint_every': 10, 'stages': list(stages), **evaluations,
    }


def stage_fields(fields: dict, step: Step) -> dict:
    """The fields of a stage, with those that the Step decides."""
    memory, attention = step.memory, step.memory.attention
    return {
        **fields, 'seq_len': step.seq_len, 'batch_size': step.batch_size, 'accumulation': step.accumulation,
        'mesh': step.mesh, 'layout': step.layout,
        'memory': {**fields.get('memory', {}), 'remat': memory.remat, 'strategy': attention.strategy,
                   'node_size': attention.node_size, 'query_chunk': attention.chunks.query,
                   'key_chunk': attention.chunks.key, 'kernel': attention.kernel,
                   'ffn_chunks': memory.ffn_chunks, 'query_passes': memory.query_passes,
                   'loss_chunk': memory.loss_chunk, 'dtype': memory.dtype,
                   'offload_state': memory.offload_state},
    }


def write(path: Path, fields: dict, hardware: str, step: Step, prediction: str) -> None:
    """Write the fields as a Python file with get_config().

    hardware: name of the devices. prediction: what is predicted for the run, one line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    others = {key: value for key, value in fields.items() if key != 'stages'} | {'param_dtype': step.dtype}
    missing = [f'--set {field}={value}' for field, value in (
        ('model_folder', 'YOUR_FOLDER'), ('corpus', 'YOUR_DOCUMENTS')) if not fields.get(field)]
    write_atomically(path, CONFIG.format(
        devices=step.devices, hardware=hardware, path=path, name=path.stem, prediction=prediction,
        settings=''.join(f' \\\\\n        {one}' for one in [' '.join(missing)] if missing),
        fields=_literal(others, 4), stages=_literal(fields['stages'], 4)))


def _literal(value, indent):
    """Plain values as Python source, one key per line."""
    if isinstance(value, dict):
        lines = [f'{" " * (indent + 4)}{key!r}: {_literal(inner, indent + 4)},' for key,
                 inner in value.items()]
        return '\n'.join(['{', *lines, f'{" " * indent}}}'])
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f'[{", ".join(_literal(inner, indent) for inner in value)}]'
    return repr(value)
