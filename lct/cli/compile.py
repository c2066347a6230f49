"""Whole training steps to compile for machines that are not present, and the reports on them."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.files import write_atomically
from lct.models.llama import LlamaConfig
from lct.models.lora import Adapter
from lct.ops import rope
from lct.plan import compiled, hlo, targets
from lct.plan.cost import Step
from lct.plan.hardware import find
from lct.plan.search import needed_by
from lct.train import optimizer, stages, state
from lct.train.loop import Run
from lct.train.stages import Stage
from lct.train.step import train_step


def training_step(run: Run, index: int, model: LlamaConfig, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """One optimizer step of a stage of a run: lct.train.step.train_step as the loop calls it, with abstract
    arguments. The mesh is the current one."""
    stage = run.stages[index]
    rope_config = stages.configs(run.stages, model)[index].rope
    tables = jax.eval_shape(lambda: rope.make_tables(rope_config, model.head_dim, stage.seq_len))
    shape = (stage.accumulation, stage.batch_size, stage.seq_len)
    placed = jax.NamedSharding(mesh, P(None, *sharding.spec('BT')))
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == 'loss_mask' else jnp.int32,
                                        sharding=placed)
             for name in ('tokens', 'targets', 'positions', 'segment_ids', 'loss_mask')}
    tx = optimizer.make(run.optimizer)
    return train_step.lower(
        state.abstract(model, tx, jnp.dtype(run.param_dtype), run.adapter, stage.memory.offload_state),
        batch, tables, config=model.architecture(), memory=stage.memory, tx=tx,
        schedule=optimizer.schedule(run.stages))


def step_memory(target: targets.Target, step: Step, adapter: Adapter | None = None) -> dict[str, int]:
    """hlo.memory_of a Step that trains all weights, or an adapter, compiled for a target."""
    mesh = targets.mesh(target, step.mesh)
    stage = Stage('', step.seq_len, 1, step.batch_size, step.accumulation, mesh=step.mesh, memory=step.memory)
    run = Run((stage,), param_dtype=step.dtype, adapter=adapter)
    with jax.set_mesh(mesh):
        lowered = training_step(run, 0, step.config, mesh)
    return hlo.memory_of(lowered.compile(compiler_options=targets.options(target)))


def compile_stage(run: Run, index: int, name: str, model: LlamaConfig, target: targets.Target, folder: Path,
                  hlo_folder: Path | None = None) -> None:
    """Compile the step of a stage for a target, print the report and add it to the target's JSON in folder.

    name: of the model, for the title.
    """
    stage = run.stages[index]
    step = Step(model, stage.mesh, stage.seq_len, stage.batch_size, stage.accumulation, stage.memory,
                run.param_dtype,
                stage.layout)
    offloaded = {'none': '', 'moments': ' moments on host', 'all': ' state on host'}
    title = (f'{name} step {stage.name} B={stage.batch_size} T={stage.seq_len} {stage.memory.remat} '
             f'{run.param_dtype}{offloaded[stage.memory.offload_state]}')
    mesh = announced_mesh(target, stage.mesh)
    with jax.set_mesh(mesh):
        lowered = {title: training_step(run, index, model, mesh)}
    predicted = {'predicted': needed_by(step, find(target.kind), run.adapter).peak}
    compile_all(lowered, target, mesh, folder, hlo_folder, predicted)


def announced_mesh(target: targets.Target, degrees: tuple[int, ...]) -> jax.sharding.Mesh:
    """The compile-only mesh of a target; its shape and the distances of neighbours are printed."""
    mesh = targets.mesh(target, degrees)
    print(f'{target.name}: mesh {dict(mesh.shape)}')
    if distances := targets.neighbour_distances(target, mesh, 'sequence'):
        print(f'links between neighbours on the ring, and the number of such neighbours: {distances}')
    return mesh


def compile_all(lowered: dict[str, jax.stages.Lowered], target: targets.Target, mesh: jax.sharding.Mesh,
                folder: Path,
                hlo_folder: Path | None = None, facts: dict | None = None) -> None:
    """Compile programs by title, print the report of each and add all to the target's JSON in folder.

    hlo_folder: also gets the HLO text of each program. facts: added to every record.
    """
    common = {'jax': jax.__version__, 'options': targets.options(target),
              'neighbour_distances': targets.neighbour_distances(target, mesh, 'sequence'),
              'device_memory': targets.memory(target), **(facts or {})}
    records = {}
    for name, program in lowered.items():
        title = f'{name}, mesh {"x".join(str(d) for d in mesh.shape.values())}'
        start = time.monotonic()
        executable = program.compile(compiler_options=targets.options(target))
        seconds = round(time.monotonic() - start, 1)
        records[title] = {'seconds': seconds, **common, **compiled.record(executable, dict(mesh.shape))}
        print(compiled.describe(title, records[title]))
        if hlo_folder:
            write_atomically(hlo_folder / f'{title.replace(" ", "_")}.txt', executable.as_text())
    path = folder / f'compile_{target.name.replace(":", "_")}.json'
    compiled.save(path, target.name, records)
    print(f'\nwritten to {path}')
