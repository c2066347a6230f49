"""Search over meshes, strategies and memory policies: plans that fit, fastest first, and rejections."""

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from lct.models.llama import LlamaConfig, Memory
from lct.models.lora import Adapter
from lct.models.memory import OFFLOAD_STATE, REMAT
from lct.ops.blockwise_attention import Chunks
from lct.ops.context_parallel import inner_block
from lct.ops.kernels import choice
from lct.ops.strategies import STRATEGIES, Attention
from lct.plan import cost, timing
from lct.plan.buffers import Buffers, buffers, scheduled, with_adapter
from lct.plan.hardware import CLUSTERS, TABLE, Hardware
from lct.plan.offloaded import offloaded

# assumed usable share of device memory; the rest is for collectives, kernel workspaces and fragmentation
USABLE = 0.92
HOST_USABLE = 0.85  # of the memory of a host, which also holds data and the system
FFN_CHUNKS = (1, 2, 4, 8, 16)
QUERY_PASSES = (4, 16)
LONG_SHARD = 2**15  # tokens of a device from which passes over the queries are tried
CHUNKS, LOSS_CHUNK = Chunks(512, 512), 512
GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Job:
    """The work of one optimizer step: rows of seq_len tokens through a model."""

    config: LlamaConfig
    seq_len: int
    rows: int = 1
    dtype: str = 'float32'  # of the stored parameters; the computation is in compute_dtype
    adapter: Adapter | None = None  # trained in place of all weights


class Plan(NamedTuple):
    """A feasible Step, of all weights or of an adapter, with its predictions: seconds by name
    (timing.seconds) and Buffers of a device."""

    step: cost.Step
    times: dict[str, float]
    buffers: Buffers
    adapter: Adapter | None = None

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step."""
        return sum(self.times.values())


class Rejection(NamedTuple):
    """An infeasible Step. excess: bytes beyond the usable memory, None if memory is not the reason."""

    step: cost.Step
    reason: str
    excess: float | None


class SearchResult(NamedTuple):
    """Feasible plans, fastest first, and the rejected steps."""

    plans: list[Plan]
    rejections: list[Rejection]

    def reasons(self) -> list[tuple[int, str, cost.Step]]:
        """(count, reason, Step) of one example per kind of rejection, most frequent kind first."""
        kinds = collections.defaultdict(list)
        for rejection in self.rejections:
            kinds[rejection.reason.split(' ')[0] if rejection.excess is None else 'memory'].append(rejection)
        nearest = lambda group: min(group, key=lambda r: r.excess or 0)
        return sorted(((len(group), nearest(group).reason, nearest(group).step) for group in kinds.values()),
                      key=lambda row: -row[0])


def compute_dtype(hardware: Hardware) -> str:
    """The dtype to compute in: CPUs are slower in bfloat16 than in float32."""
    return 'float32' if hardware.platform == 'cpu' else 'bfloat16'


def policies(hardware: Hardware) -> tuple[str, ...]:
    """The remat policies that devices support, in order of decreasing memory."""
    return tuple(name for name, remat in REMAT.items() if hardware.platform != 'cpu' or not remat.on_host)


def state_policies(hardware: Hardware, adapter: Adapter | None = None) -> tuple[str, ...]:
    """What of the training state may be in host memory, in order of decreasing memory of a device. That of an
    adapter is small."""
    return OFFLOAD_STATE[:1] if adapter or hardware.platform == 'cpu' else OFFLOAD_STATE


def allowed(step: cost.Step, adapter: Adapter | None) -> bool:
    """Whether a Step that is valid without an adapter is so with it."""
    try:
        if adapter:
            adapter.check(step.config, step.mesh, step.memory)
    except ValueError:
        return False
    return True


def divisors(n: int) -> list[int]:
    """The divisors of n in ascending order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def meshes(config: LlamaConfig, devices: int, hardware: Hardware) -> Iterator[tuple[int, int, int, int]]:
    """Every mesh (data, fsdp, sequence, tensor) of a number of devices. tensor divides the number of
    key/value heads and is at most a node."""
    for tensor in divisors(math.gcd(devices, config.num_kv_heads)):
        if tensor > hardware.node_size:
            continue
        for ring in divisors(devices // tensor):
            replicas = devices // tensor // ring
            for data in divisors(replicas):
                yield data, replicas // data, ring, tensor


def attentions(ring: int, tensor: int, hardware: Hardware) -> list[Attention]:
    """Every Attention for a ring size; a node of the two-level strategies holds the devices of one machine
    that lie on the sequence axis."""
    if ring == 1:
        return [Attention('ring', 1, CHUNKS)]
    node = hardware.node_size // tensor
    return [Attention(name, node if facts.two_level else 1, CHUNKS) for name, facts in STRATEGIES.items()
            if not facts.two_level or 1 < node < ring]


def search(job: Job, hardware: Hardware, devices: int,
           efficiency: timing.Efficiency = timing.Efficiency()) -> SearchResult:  # noqa: B008
    """All plans and rejections of a Job on a number of devices."""
    plans, rejections = [], []
    for outcome in _outcomes(job, hardware, devices, efficiency):
        (plans if isinstance(outcome, Plan) else rejections).append(outcome)
    plans.sort(key=lambda plan: plan.seconds)
    return SearchResult(plans, rejections)


def _outcomes(job, hardware, devices, efficiency):
    """Iterator of Plans and Rejections over all meshes, strategies, batch sizes and memory policies."""
    for mesh in meshes(job.config, devices, hardware):
        replicas = mesh[0] * mesh[1]
        blank = cost.Step(job.config, mesh, job.seq_len, replicas, dtype=job.dtype)
        if job.rows % replicas:
            yield Rejection(
                blank,
                f'rows {job.rows} per step are not a multiple of the {replicas} rings side by side',
                None)
            continue
        for attention in attentions(mesh[2], mesh[3], hardware):
            base = dataclasses.replace(blank, memory=Memory('full', attention, 1, LOSS_CHUNK,
                                                            compute_dtype(hardware)))
            try:
                base.check()
                if job.adapter:
                    job.adapter.check(job.config, mesh, base.memory)
            except ValueError as error:
                yield Rejection(base, str(error), None)
                continue
            for rows in divisors(job.rows // replicas):
                batch = replicas * rows
                step = dataclasses.replace(base, batch_size=batch, accumulation=job.rows // batch)
                yield from _policies(step, hardware, efficiency, job.adapter)


def needed_by(step: cost.Step, hardware: Hardware, adapter: Adapter | None = None) -> Buffers:
    """The Buffers of a device for a Step that trains all weights, or an adapter."""
    step = _with_kernel(step, hardware)
    needed = buffers(step, hardware.platform)
    needed = with_adapter(needed, step, adapter) if adapter else needed
    if hardware.platform != 'cpu':  # where both memories are one
        needed = offloaded(needed, step)
    return scheduled(needed, step, hardware.memory) if hardware.platform == 'gpu' else needed


def host_excess(needed: Buffers, step: cost.Step, hardware: Hardware) -> float:
    """Bytes that the devices of a machine keep in its memory beyond what is usable; negative if they fit."""
    devices = min(step.devices, hardware.machine)
    return devices * sum(needed.host.values()) - HOST_USABLE * hardware.host_memory


def _with_kernel(step, hardware):
    """The Step with the XLA block in place of 'auto' where the fused one cannot run."""
    attention = step.memory.attention
    fused = hardware.cuda and step.config.head_dim in inner_block(choice.FUSED).HEAD_DIMS
    if attention.kernel != choice.AUTO or fused:
        return step
    attention = dataclasses.replace(attention, kernel='xla')
    return dataclasses.replace(step, memory=dataclasses.replace(step.memory, attention=attention))


def _policies(step, hardware, efficiency, adapter=None):
    """Iterator of Rejections, then the fastest Plan of all memory policies that fit."""
    plans = []
    for offload_state in state_policies(hardware, adapter):
        memory = dataclasses.replace(step.memory, offload_state=offload_state)
        for outcome in _remats(dataclasses.replace(step, memory=memory), hardware, efficiency, adapter):
            if isinstance(outcome, Plan):
                plans.append(outcome)
            else:
                yield outcome
    if plans:
        yield min(plans, key=lambda plan: plan.seconds)


def _remats(step, hardware, efficiency, adapter):
    """Iterator of Plans of remat policies that fit, with as few chunks of the FFN as fit and passes over the
    queries only where nothing fits without, and of Rejections. Later policies keep less and compute more,
    except for those that keep attention's output."""
    usable, plans = USABLE * hardware.memory, []

    def under(remat, ffn_chunks, passes):
        memory = dataclasses.replace(step.memory, remat=remat, ffn_chunks=ffn_chunks, query_passes=passes)
        changed = dataclasses.replace(step, memory=memory)
        return changed, needed_by(changed, hardware, adapter)

    for remat in policies(hardware):
        whole = plans and plans[-1].step.memory.query_passes == 1
        if whole and (plans[-1].step.keeps_attention or not REMAT[remat].attention_once):
            continue
        counts = _counts(step, remat)
        smallest, needed = under(remat, *counts[-1])
        if not allowed(smallest, adapter):
            continue
        if needed.peak > usable:
            yield _too_large(smallest, needed, usable)
            continue
        if (excess := host_excess(needed, step, hardware)) > 0:
            limit = HOST_USABLE * hardware.host_memory
            yield Rejection(smallest, f'needs {(limit + excess) / GiB:,.1f} GiB of the usable '
                            f'{limit / GiB:,.1f} of a host', excess)
            continue
        fitted, needed = next(pair for pair in (under(remat, *n) for n in counts) if pair[1].peak <= usable)
        plans.append(Plan(fitted, timing.seconds(fitted, hardware, efficiency, adapter), needed, adapter))
        yield plans[-1]


def _counts(step, remat):
    """(ffn_chunks, query_passes) in the order in which they are tried: of decreasing memory."""
    if remat in ('none', 'dots'):  # chunks of the FFN would be recomputed, which is another policy
        return [(1, 1)]
    counts = [(n, 1) for n in FFN_CHUNKS if step.shard % n == 0]
    if REMAT[remat].in_passes and step.shard >= LONG_SHARD:
        counts += [(4 * n, n) for n in QUERY_PASSES if step.shard % (4 * n) == 0]
    return counts


def _too_large(step, needed, usable):
    sizes = needed.at_peak()
    largest = max(sizes, key=sizes.get)
    return Rejection(
        step,
        f'needs {needed.peak / GiB:,.1f} GiB of the usable {usable / GiB:,.1f}; the largest buffer is '
        f'{largest!r} with {sizes[largest] / GiB:,.1f} GiB',
        needed.peak - usable)


def best(job: Job, hardware: Hardware, devices: int,
         efficiency: timing.Efficiency = timing.Efficiency()) -> SearchResult:  # noqa: B008
    """A SearchResult with at least one plan.

    Raises:
      ValueError: if no plan is feasible, with the largest buffer, the excess and the cheapest remedies.
    """
    result = search(job, hardware, devices, efficiency)
    if result.plans:
        return result
    rows = f'{job.rows} row{"s" * (job.rows > 1)}'
    raise ValueError(f'no plan is feasible for {rows} of {job.seq_len} tokens on {devices} x {hardware.name}'
                     f': {_nearest(result)}; {_remedies(job, hardware, devices)}')


def _nearest(result):
    """The rejection with the smallest excess, as text."""
    too_large = [rejection for rejection in result.rejections if rejection.excess is not None]
    if not too_large:
        return result.reasons()[0][1]
    rejection = min(too_large, key=lambda r: r.excess)
    memory = rejection.step.memory
    return (f'the nearest, mesh {rejection.step.mesh} with {memory.attention.strategy} and remat '
            f'{memory.remat}, {rejection.reason}, {rejection.excess / GiB:,.1f} GiB too much')


def feasible(job: Job, hardware: Hardware, devices: int) -> bool:
    """Whether any plan fits; only the policies with the smallest memory are tried."""
    for mesh in meshes(job.config, devices, hardware):
        replicas = mesh[0] * mesh[1]
        if job.rows % replicas or job.seq_len % (2 * mesh[2]):
            continue
        remat = policies(hardware)[-1]
        memory = Memory(remat, Attention('ring', 1, CHUNKS), 1, LOSS_CHUNK, compute_dtype(hardware),
                        offload_state=state_policies(hardware, job.adapter)[-1])
        step = cost.Step(job.config, mesh, job.seq_len, replicas, job.rows // replicas, memory, job.dtype)
        chunks, passes = _counts(step, remat)[-1]
        memory = dataclasses.replace(memory, ffn_chunks=chunks, query_passes=passes)
        step = dataclasses.replace(step, memory=memory)
        try:
            step.check()
        except ValueError:
            continue
        if not allowed(step, job.adapter):
            continue
        needed = needed_by(step, hardware, job.adapter)
        if needed.peak <= USABLE * hardware.memory and host_excess(needed, step, hardware) <= 0:
            return True
    return False


def _remedies(job, hardware, devices):
    """The three changes that make the job feasible with the least additional device memory, as text."""
    options = []
    shorter = next((t for t in (job.seq_len >> n for n in range(1, 11))
                    if feasible(dataclasses.replace(job, seq_len=t), hardware, devices)), None)
    if shorter:
        options.append((0.0, f'a context of {shorter} tokens'))
    for other in [hardware, *(TABLE[name] for name in CLUSTERS if name != hardware.name)]:
        counts = (1 << n for n in range(13) if other is not hardware or 1 << n > devices)
        count = next((n for n in counts if feasible(job, other, n)), None)
        if count:
            options.append(
                (max(count * other.memory - devices * hardware.memory, 0), f'{count} x {other.name}'))
    if not options:
        return 'neither a shorter context nor 4096 devices of any hardware in the table suffice'
    return 'remedies, cheapest first: ' + ', or '.join(text for _, text in sorted(options)[:3])
