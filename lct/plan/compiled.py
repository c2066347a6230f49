"""Reports on compiled programs: a record for JSON, its text, and the table of compiled training steps."""

import collections
import dataclasses
import json
from pathlib import Path

import jax

from lct import files
from lct.models.lora import Adapter
from lct.plan import hlo
from lct.plan.cost import Step
from lct.plan.host_copies import host_copies
from lct.plan.matmuls import flops_by_type

MiB = 2**20


def record(compiled: jax.stages.Compiled, degrees: dict[str, int]) -> dict:
    """Memory, largest tensor, FLOPs by type, collectives and copies to the host of a program; all are per
    device.

    degrees: {axis: degree} of the mesh, slowest axis first.
    """
    program = hlo.Program(compiled.as_text())
    largest, name = program.largest()
    return {
        'memory': hlo.memory_of(compiled),
        'largest': {'bytes': largest.size, 'tensor': str(largest), 'name': name},
        'matmul_flops': flops_by_type(program),
        'transfers': [
            {**dataclasses.asdict(t), 'hidden': t.hidden, 'shapes': [str(shape) for shape in t.shapes]}
            for t in program.transfers(degrees)
        ],
        'host_copies': [{**c._asdict(), 'hidden': c.hidden} for c in host_copies(program)],
    }


def describe(title: str, record: dict) -> str:
    """A record as text. Besides the keys of record() it has compilation 'seconds', 'device_memory' in bytes
    (None where the compiler itself enforces the limit) and, with a prediction, 'predicted' in bytes."""
    kinds = '  '.join(f'{name} {size / MiB:,.1f}' for name, size in record['memory'].items() if size)
    largest = record['largest']
    return '\n'.join([
        f'\n{title}: compiled in {record["seconds"]:.1f} s',
        f'  memory per device, MiB: {kinds}',
        *_fit_lines(record),
        f'  largest tensor: {largest["tensor"]} {largest["bytes"] / MiB:,.1f} MiB ({largest["name"]})',
        *(f'  matmuls of {types}: {flops / 1e12:,.2f} TFLOP'
          for types, flops in record['matmul_flops'].items()),
        *_transfer_lines(record['transfers']),
        *_host_lines(record['host_copies']),
    ])


def _fit_lines(record):
    if not record['device_memory']:
        return
    size, available = hlo.device_bytes(record['memory']), record['device_memory']
    if 'predicted' in record:
        predicted = record['predicted']
        ratio = f'{predicted / size:.2f}x'
        yield f'  compiled {size / MiB:,.0f} MiB, predicted {predicted / MiB:,.0f} MiB: {ratio}'
    verdict = 'fits' if size < available else 'DOES NOT FIT'
    yield f'  {verdict}: {size / available:.0%} of the {available / MiB:,.0f} MiB of a device'


def _transfer_lines(transfers):
    """Equal transfers share a line; then the totals by axis, kind and overlap."""
    equal, total = collections.Counter(), collections.Counter()
    for t in transfers:
        state = 'hidden' if t['hidden'] else 'exposed' if t['asynchronous'] else 'exposed, synchronous'
        axes = '+'.join(t['axes']) or 'no axis'
        times = f'{"" if t["exact"] else ">="}{t["times"]}'
        equal[f'{times} x {t["kind"]} over {axes}, {t["sent"] / MiB:,.2f} MiB of {" ".join(t["shapes"])}: '
              f'{state}'] += 1
        total[axes, t['kind'], state] += t['times'] * t['sent']
    yield from (f'  {count:>3} at {line}' for line, count in equal.items())
    for (axes, kind, state), sent in sorted(total.items()):
        yield f'  total: {sent / MiB:,.1f} MiB sent by {kind} over {axes}: {state}'


def _host_lines(copies):
    total = collections.Counter()
    for c in copies:
        direction, state = 'to' if c['to_host'] else 'from', 'hidden' if c['hidden'] else 'exposed'
        total[direction, state] += c['times'] * c['size']
    yield from (f'  total: {size / MiB:,.1f} MiB copied {direction} the host: {state}'
                for (direction, state), size in sorted(total.items()))


def save(path: Path, target: str, records: dict[str, dict]) -> None:
    """Add records by title to the JSON of a target; a record of the same title is replaced."""
    old = json.loads(path.read_text())['programs'] if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, json.dumps({'target': target, 'programs': {**old, **records}}, indent=1)
                           + '\n')


# ---------------------------------------------------------------------------------------------------
# The table of compiled training steps: {step_key: memory}
# ---------------------------------------------------------------------------------------------------


def step_key(target: str, model: str, step: Step, adapter: Adapter | None = None) -> str:
    """Identifies a training step of a model, or of its adapter, that was compiled for a target such as
    l40s:512."""
    memory, attention = step.memory, step.memory.attention
    fields = (target, model, 'x'.join(map(str, step.mesh)), step.batch_size, step.accumulation, step.seq_len,
              memory.remat, attention.strategy, attention.node_size, memory.ffn_chunks, step.dtype,
              memory.dtype or step.dtype, *([] if attention.kernel == 'xla' else [attention.kernel]),
              *([] if memory.offload_state == 'none' else [f'offload_state={memory.offload_state}']),
              *([] if memory.query_passes == 1 else [f'query_passes={memory.query_passes}']))
    if adapter:
        frozen = adapter.frozen_dtype or step.dtype
        fields += (f'adapter({adapter.rank},{frozen},{"+".join(sorted(adapter.also_train))})',)
    return ' '.join(map(str, fields))


def step_bytes(table: dict[str, dict], hardware: str, model: str, step: Step,
               adapter: Adapter | None = None) -> int | None:
    """Bytes per device of this very step, if the table has it for any number of devices of the hardware."""
    _, _, wanted = step_key('', model, step, adapter).partition(' ')
    for key, memory in table.items():
        target, _, rest = key.partition(' ')
        if target.startswith(f'{hardware}:') and rest == wanted:
            return hlo.device_bytes(memory)
    return None
