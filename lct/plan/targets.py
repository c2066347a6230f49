"""Machines that need not be at hand: compile-only meshes for GPUs and TPUs.

A GPU is described to XLA by its numbers and compiled for by the jax CUDA plugin (extra 'aot-cuda'); a TPU
topology by its name, through libtpu (extra 'aot-tpu'). Neither executes anything: what comes out is the
scheduled program and the memory that it was given.
"""

import dataclasses
import math
import os
import re

from jax.experimental import topologies

from lct import sharding

GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA asks of a CUDA device.

    Sizes in bytes, bandwidth in bytes/s. Sources: NVIDIA's data sheets and the CUDA programming guide's table of
    compute capabilities; memory is what the driver leaves of the nominal size.
    """

    label: str
    capability: tuple
    cores: int
    clock_ghz: float
    memory: int
    bandwidth: int
    l2_cache: int
    shared_per_core: int
    shared_per_block: int
    threads_per_core: int = 2048
    fpus_per_core: int = 128

    def describe(self):
        """The text that the CUDA plugin takes as target_config."""
        major, minor = self.capability
        # 9.0 alone forbids Hopper's own matrix instructions; 9.0a is what runs there
        feature = 'feature_extension: ACCELERATED_FEATURES' if major >= 9 else ''
        return f'''
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
              core_count: {self.cores} clock_rate_ghz: {self.clock_ghz} fpus_per_core: {self.fpus_per_core}
              device_memory_size: {self.memory} memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_cache}
              shared_memory_per_core: {self.shared_per_core} shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_per_block}
              threads_per_core_limit: {self.threads_per_core} threads_per_block_limit: 1024 threads_per_warp: 32
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }}
            platform_name: "CUDA" device_description_str: "{self.label}"
            dnn_version_info {{ major: 9 minor: 8 patch: 0 }} runtime_version {{ major: 12 minor: 8 patch: 0 }}'''


GPUS = {
    'l40s': Gpu('NVIDIA L40S', (8, 9), 142, 2.52, 47_810_936_832, 864_000_000_000, 96 << 20, 100 << 10, 99 << 10,
                threads_per_core=1536),
    'a100': Gpu('NVIDIA A100-SXM4-80GB', (8, 0), 108, 1.41, 85_100_068_864, 2_039_040_000_000, 40 << 20, 164 << 10,
                163 << 10, fpus_per_core=64),
    'h100': Gpu('NVIDIA H100 80GB HBM3', (9, 0), 132, 1.98, 84_942_979_072, 3_352_320_000_000, 50 << 20, 228 << 10,
                227 << 10),
    'h200': Gpu('NVIDIA H200', (9, 0), 132, 1.98, 151_397_597_184, 4_800_000_000_000, 50 << 20, 228 << 10,
                227 << 10),
}

# A slice closes to a torus along a side that is a multiple of these: on the 3-d chips of four, on the 2-d chips of
# the pod's own sixteen (Cloud TPU documentation, "TPU versions"). Left alone, the compiler takes every slice for
# an open grid.
TPU_WRAPS = {'v5p': 4, 'v5e': 16, 'v6e': 16}


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for: platform 'cuda' or 'tpu', its kind ('l40s', 'v5p') and its shape, nodes x GPUs or
    the sides of the torus."""

    platform: str
    kind: str
    shape: tuple

    @property
    def count(self):
        return math.prod(self.shape)

    @property
    def name(self):
        size = self.count if self.platform == 'cuda' else 'x'.join(map(str, self.shape))
        return f'{self.kind}:{size}'


def parse(text):
    """'l40s:512' or 'v5p:4x4x4' -> Target.

    Raises:
      ValueError: for an unknown device, a torus of the wrong dimension, or GPUs that do not fill their nodes.
    """
    kind, _, size = text.partition(':')
    if kind in GPUS and re.fullmatch('[1-9][0-9]*', size):
        count = int(size)
        if count > GPUS_PER_NODE and count % GPUS_PER_NODE:
            raise ValueError(f'target {text}: {count} GPUs do not fill nodes of {GPUS_PER_NODE}; use a multiple')
        return Target('cuda', kind, (-(-count // GPUS_PER_NODE), min(count, GPUS_PER_NODE)))
    if kind in TPU_WRAPS and re.fullmatch('[1-9][0-9]*(x[1-9][0-9]*)+', size):
        shape = tuple(int(side) for side in size.split('x'))
        dims = 3 if TPU_WRAPS[kind] == 4 else 2
        if len(shape) != dims:
            example = 'x'.join('4' * dims)
            raise ValueError(f'target {text}: a slice of {kind} has {dims} sides; write for example {kind}:{example}')
        return Target('tpu', kind, shape)
    raise ValueError(
        f'target {text!r} is not one of {"|".join(GPUS)}:COUNT or {"|".join(TPU_WRAPS)}:SIDExSIDE; '
        'for example l40s:512 or v5p:4x4x4'
    )


def mesh(target, degrees):
    """Compile-only mesh over ('data', 'fsdp', 'sequence', 'tensor') of a Target, in the order of devices that a
    run there would have.

    Raises:
      ValueError: if there is no such topology, if the degrees do not fit it, or if the optional extra that compiles
        for it is missing.
    """
    try:
        devices = _topology(target).devices
    except (ImportError, RuntimeError) as error:  # a plugin that is not there fails in several ways
        raise ValueError(
            f"target {target.name} cannot be had: {error}; it needs the extra 'aot-{target.platform}' of this package"
        ) from error
    try:
        return sharding.make_mesh(degrees, devices)
    except NotImplementedError as error:
        raise ValueError(
            f'mesh {degrees} does not fit {target.name}: each degree must be a product of sides of the torus'
        ) from error


def _topology(target):
    if target.platform == 'cuda':
        shape = 'x'.join(map(str, (1, *target.shape)))  # partitions of the network x nodes x GPUs
        return topologies.get_topology_desc(
            platform='cuda', topology_name=shape, topology=shape, target_config=GPUS[target.kind].describe()
        )
    # libtpu otherwise asks the cloud who it is, and lets only one process of a machine load it
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    wrap = [side % TPU_WRAPS[target.kind] == 0 for side in target.shape]
    return topologies.get_topology_desc(
        platform='tpu', topology_name=target.name, wrap=tuple(wrap + [False] * (3 - len(wrap)))
    )


# Without these a transfer waits for computation, or for another transfer: by default only one collective may be in
# flight, and a hop has several. A real run on GPUs wants the same in XLA_FLAGS; TPUs need none.
CUDA_OPTIONS = {
    'xla_gpu_enable_latency_hiding_scheduler': True,
    'xla_gpu_experimental_parallel_collective_overlap_limit': 8,
}


def options(target):
    """Compiler options under which the transfers of a Target hide behind computation."""
    return CUDA_OPTIONS if target.platform == 'cuda' else {}


def memory(target):
    """Bytes of a device, where the program must be checked against them; None where the compiler does that itself."""
    return GPUS[target.kind].memory if target.platform == 'cuda' else None


def neighbour_distances(target, mesh, axis):
    """How far apart the neighbours of a ring on an axis lie, in links of the torus: {distance: number of hops}.

    Empty for GPUs, whose links are no torus.
    """
    if target.platform != 'tpu':
        return {}
    position = mesh.axis_names.index(axis)
    here = mesh.devices.swapaxes(0, position)
    count = {}
    for i in range(here.shape[0]):
        for one, other in zip(here[i].flat, here[(i + 1) % here.shape[0]].flat):
            far = 0
            for a, b, side in zip(one.coords, other.coords, target.shape):
                step = abs(a - b)
                far += min(step, side - step) if side % TPU_WRAPS[target.kind] == 0 else step
            count[far] = count.get(far, 0) + 1
    return dict(sorted(count.items()))
