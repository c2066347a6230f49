"""Every way to run a training step on some devices, the fastest that fits first, and why the others are not there."""

import collections
import dataclasses
import math
from typing import NamedTuple

from lct.models.llama import LlamaConfig, Memory
from lct.ops.blockwise_attention import Chunks
from lct.ops.strategies import STRATEGIES, Attention
from lct.plan import cost, timing
from lct.plan.buffers import Buffers, buffers
from lct.plan.hardware import TABLE

USABLE = 0.92  # assumption: of device memory; the rest is for collectives, work space of kernels and fragments
REMAT = ('none', 'dots', 'attention', 'full', 'offload')  # less memory to the right
FFN_CHUNKS = (1, 2, 4, 8, 16)
CHUNKS, LOSS_CHUNK = Chunks(512, 512), 512
GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be computed in one optimizer step: rows of seq_len tokens through a model."""

    config: LlamaConfig
    seq_len: int
    rows: int = 1
    dtype: str = 'float32'  # of the stored parameters; computing is in bfloat16


class Plan(NamedTuple):
    """One way to do it, as predicted: the Step, seconds by part, Buffers of a device."""

    step: cost.Step
    parts: dict
    buffers: Buffers

    @property
    def seconds(self):
        return sum(self.parts.values())


class Refusal(NamedTuple):
    """One way not to do it: the step, the reason, and bytes beyond what there is, None if that is not the reason."""

    step: cost.Step
    reason: str
    beyond: float | None


class Found(NamedTuple):
    """plans, fastest first, and the refusals."""

    plans: list
    refusals: list

    def reasons(self):
        """[(how many, an example, its Step)] of the refusals by kind, the most frequent first."""
        kinds = collections.defaultdict(list)
        for refusal in self.refusals:
            kinds[refusal.reason.split(' ')[0] if refusal.beyond is None else 'memory'].append(refusal)
        nearest = lambda group: min(group, key=lambda r: r.beyond or 0)
        return sorted(((len(group), nearest(group).reason, nearest(group).step) for group in kinds.values()),
                      key=lambda row: -row[0])


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def meshes(config, devices, hardware):
    """Every mesh (data, fsdp, sequence, tensor) of so many devices, tensor at most a node and the key/value heads."""
    for tensor in divisors(math.gcd(devices, config.num_kv_heads)):
        if tensor > hardware.node_size:
            continue
        for ring in divisors(devices // tensor):
            side_by_side = devices // tensor // ring
            for data in divisors(side_by_side):
                yield data, side_by_side // data, ring, tensor


def attentions(ring, tensor, hardware):
    """Every Attention for a ring; two-level ones take the devices of a node that lie on the sequence axis."""
    if ring == 1:
        return [Attention('ring', 1, CHUNKS)]
    node = hardware.node_size // tensor
    return [Attention(name, node if facts.two_level else 1, CHUNKS) for name, facts in STRATEGIES.items()
            if not facts.two_level or 1 < node < ring]


def search(job, hardware, devices, efficiency=timing.Efficiency()):  # noqa: B008
    """Found for a Job on so many devices of a Hardware."""
    room = USABLE * hardware.memory
    plans, refusals = [], []
    for mesh in meshes(job.config, devices, hardware):
        side_by_side = mesh[0] * mesh[1]
        blank = cost.Step(job.config, mesh, job.seq_len, side_by_side, dtype=job.dtype)
        if job.rows % side_by_side:
            refusals.append(Refusal(
                blank, f'rows {job.rows} a step are not a multiple of the {side_by_side} rings side by side', None))
            continue
        for attention in attentions(mesh[2], mesh[3], hardware):
            base = dataclasses.replace(blank, memory=Memory('full', attention, 1, LOSS_CHUNK, 'bfloat16'))
            try:
                base.check()
            except ValueError as error:
                refusals.append(Refusal(base, str(error), None))
                continue
            for rows in divisors(job.rows // side_by_side):
                batch = side_by_side * rows
                step = dataclasses.replace(base, batch_size=batch, accumulation=job.rows // batch)
                _policies(step, hardware, efficiency, room, plans, refusals)
    plans.sort(key=lambda plan: plan.seconds)
    return Found(plans, refusals)


def _policies(step, hardware, efficiency, room, plans, refusals):
    """Add the plan of the first remat policy that fits, with as few chunks of the FFN as fit: those after it keep less
    and compute more."""
    def under(remat, ffn_chunks):
        one = dataclasses.replace(step, memory=dataclasses.replace(step.memory, remat=remat, ffn_chunks=ffn_chunks))
        return one, buffers(one, hardware.platform)

    for remat in REMAT:
        # under 'none' and 'dots', chunks would run again and be another policy
        chunks = [n for n in FFN_CHUNKS if step.shard % n == 0] if remat not in ('none', 'dots') else [1]
        one, needed = under(remat, chunks[-1])
        if needed.peak > room:
            refusals.append(_too_large(one, needed, room))
            continue
        one, needed = next(pair for pair in (under(remat, n) for n in chunks) if pair[1].peak <= room)
        plans.append(Plan(one, timing.seconds(one, hardware, efficiency), needed))
        return


def _too_large(step, needed, room):
    everything = needed.at_peak()
    largest = max(everything, key=everything.get)
    return Refusal(step, f'needs {needed.peak / GiB:,.1f} GiB of the {room / GiB:,.1f} that can be used; the largest '
                   f'buffer is {largest!r} with {everything[largest] / GiB:,.1f} GiB', needed.peak - room)


def best(job, hardware, devices, efficiency=timing.Efficiency()):  # noqa: B008
    """Found with at least one plan.

    Raises:
      ValueError: if nothing is feasible: the buffer that is too large, by how much, and the cheapest remedies.
    """
    found = search(job, hardware, devices, efficiency)
    if found.plans:
        return found
    raise ValueError(f'nothing is feasible for {job.rows} rows of {job.seq_len} tokens on {devices} x {hardware.name}: '
                     f'{_nearest(found, hardware)}; {_remedies(job, hardware, devices)}')


def _nearest(found, hardware):
    tight = [refusal for refusal in found.refusals if refusal.beyond is not None]
    if not tight:
        return found.reasons()[0][1]
    refusal = min(tight, key=lambda r: r.beyond)
    memory = refusal.step.memory
    return (f'the nearest, mesh {refusal.step.mesh} with {memory.attention.strategy} and remat {memory.remat}, '
            f'{refusal.reason}, {refusal.beyond / GiB:,.1f} GiB too much')


def feasible(job, hardware, devices):
    """Does any plan fit? Asks only the policies that need least memory."""
    for mesh in meshes(job.config, devices, hardware):
        side_by_side = mesh[0] * mesh[1]
        if job.rows % side_by_side or job.seq_len % (2 * mesh[2]):
            continue
        chunks = max(c for c in FFN_CHUNKS if job.seq_len // mesh[2] % c == 0)
        memory = Memory('offload', Attention('ring', 1, CHUNKS), chunks, LOSS_CHUNK, 'bfloat16')
        step = cost.Step(job.config, mesh, job.seq_len, side_by_side, job.rows // side_by_side, memory, job.dtype)
        try:
            step.check()
        except ValueError:
            continue
        if buffers(step, hardware.platform).peak <= USABLE * hardware.memory:
            return True
    return False


def _remedies(job, hardware, devices):
    """The three changes that make the job feasible and need the least device memory besides what there is."""
    options = []
    shorter = next((t for t in (job.seq_len >> n for n in range(1, 11))
                    if feasible(dataclasses.replace(job, seq_len=t), hardware, devices)), None)
    if shorter:
        options.append((0.0, f'a context of {shorter} tokens'))
    for other in TABLE.values():
        counts = (1 << n for n in range(13) if other is not hardware or 1 << n > devices)
        count = next((n for n in counts if feasible(job, other, n)), None)
        if count:
            options.append((max(count * other.memory - devices * hardware.memory, 0), f'{count} x {other.name}'))
    if not options:
        return 'no shorter context and no 4096 devices of the table would do'
    return 'remedies, cheapest first: ' + ', or '.join(text for _, text in sorted(options)[:3])
