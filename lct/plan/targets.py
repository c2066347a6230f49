"""Compile-only meshes of machines that are not present: GPUs and TPUs.

XLA is given the numbers of a GPU and compiles for it through the jax CUDA plugin (extra 'aot-cuda'); a TPU
topology is known by name to libtpu (extra 'aot-tpu'). Neither executes anything: the result is the scheduled
program and its memory.
"""

import collections
import dataclasses
import math
import os
import re

import jax
import numpy as np
from jax.experimental import topologies

from lct import sharding

GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The properties of a CUDA device that XLA needs.

    Sizes in bytes, bandwidth in bytes/s. memory is what the driver leaves of the nominal size. Sources:
    NVIDIA's data sheets, and the table of compute capabilities in the CUDA programming guide.
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

    def describe(self) -> str:
        """The target_config of the CUDA plugin, a protobuf in text form."""
        major, minor = self.capability
        # plain 9.0 excludes Hopper's own matrix instructions; the devices are 9.0a
        feature = 'feature_extension: ACCELERATED_FEATURES' if major >= 9 else ''
        return f'''
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
              core_count: {self.cores} clock_rate_ghz: {self.clock_ghz} fpus_per_core: {self.fpus_per_core}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_cache}
              shared_memory_per_core: {self.shared_per_core} shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_per_block}
              threads_per_core_limit: {self.threads_per_core}
              threads_per_block_limit: 1024 threads_per_warp: 32
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }}
            platform_name: "CUDA" device_description_str: "{self.label}"
            dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
            runtime_version {{ major: 12 minor: 8 patch: 0 }}'''


GPUS = {
    'l40s': Gpu('NVIDIA L40S', (8, 9), 142, 2.52, 47_810_936_832, 864_000_000_000, 96 << 20, 100 << 10,
                99 << 10,
                threads_per_core=1536),
    'a100': Gpu('NVIDIA A100-SXM4-80GB', (8, 0), 108, 1.41, 85_100_068_864, 2_039_040_000_000, 40 << 20,
                164 << 10,
                163 << 10, fpus_per_core=64),
    'h100': Gpu('NVIDIA H100 80GB HBM3', (9, 0), 132, 1.98, 84_942_979_072, 3_352_320_000_000, 50 << 20,
                228 << 10,
                227 << 10),
    'h200': Gpu('NVIDIA H200', (9, 0), 132, 1.98, 151_397_597_184, 4_800_000_000_000, 50 << 20, 228 << 10,
                227 << 10),
    # memory as in hardware.py
    'rtx4090': Gpu('NVIDIA GeForce RTX 4090', (8, 9), 128, 2.52, int(0.98 * (24 << 30)), 1_008_000_000_000,
                   72 << 20, 100 << 10, 99 << 10, threads_per_core=1536),
}

# A slice wraps around to a torus along a side that is a multiple of these: of 4 on the chips with 3-d links,
# of the pod's 16 on those with 2-d links (Cloud TPU documentation, "TPU versions"). By default the compiler
# takes every slice for an open grid.
TPU_WRAPS = {'v5p': 4, 'v5e': 16, 'v6e': 16}


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for.

    platform: 'cuda' or 'tpu'. kind: of the devices, such as 'l40s' or 'v5p'. shape: (nodes, GPUs of a node),
    or the sides of the torus.
    """

    platform: str
    kind: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of devices."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """The text form that parse reads, such as 'l40s:512'."""
        size = self.count if self.platform == 'cuda' else 'x'.join(map(str, self.shape))
        return f'{self.kind}:{size}'


def parse(text: str) -> Target:
    """'l40s:512' or 'v5p:4x4x4' -> Target.

    Raises:
      ValueError: for an unknown device, a torus of the wrong dimension, or GPUs that do not fill their nodes.
    """
    kind, _, size = text.partition(':')
    if kind in GPUS and re.fullmatch('[1-9][0-9]*', size):
        count = int(size)
        if count > GPUS_PER_NODE and count % GPUS_PER_NODE:
            raise ValueError(
                f'target {text}: {count} GPUs do not fill nodes of {GPUS_PER_NODE}; use a multiple')
        return Target('cuda', kind, (-(-count // GPUS_PER_NODE), min(count, GPUS_PER_NODE)))
    if kind in TPU_WRAPS and re.fullmatch('[1-9][0-9]*(x[1-9][0-9]*)+', size):
        shape = tuple(int(side) for side in size.split('x'))
        dims = 3 if TPU_WRAPS[kind] == 4 else 2
        if len(shape) != dims:
            example = 'x'.join('4' * dims)
            raise ValueError(f'target {text}: a slice of {kind} has {dims} sides; write for example '
                             f'{kind}:{example}')
        return Target('tpu', kind, shape)
    raise ValueError(
        f'target {text!r} is not one of {"|".join(GPUS)}:COUNT or {"|".join(TPU_WRAPS)}:SIDExSIDE; '
        'for example l40s:512 or v5p:4x4x4'
    )


def mesh(target: Target, degrees: tuple[int, int, int, int]) -> jax.sharding.Mesh:
    """Compile-only mesh of a Target over sharding.AXES, its devices in the order of a real run.

    Raises:
      ValueError: if there is no such topology, if the degrees do not fit it, or if the extra that
        compiles for it is missing.
    """
    try:
        devices = _topology(target).devices
    except (ImportError, RuntimeError) as error:  # a missing plugin fails in several ways
        raise ValueError(
            f"target {target.name} is not available: {error}; install the extra 'aot-{target.platform}' "
            'of this package'
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
    # libtpu otherwise queries the metadata server, and lets only one process of a machine load it
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    wrap = [side % TPU_WRAPS[target.kind] == 0 for side in target.shape]
    return topologies.get_topology_desc(
        platform='tpu', topology_name=target.name, wrap=tuple(wrap + [False] * (3 - len(wrap)))
    )


# By default a transfer waits for computation or for another transfer, because only one collective may be in
# flight and a ring step has several. A real run on GPUs needs the same options in XLA_FLAGS; TPUs need none.
CUDA_OPTIONS = {
    'xla_gpu_enable_latency_hiding_scheduler': True,
    'xla_gpu_experimental_parallel_collective_overlap_limit': 8,
}


def options(target: Target) -> dict[str, bool | int]:
    """Compiler options with which the transfers of a Target overlap with computation."""
    return CUDA_OPTIONS if target.platform == 'cuda' else {}


def memory(target: Target) -> int | None:
    """Bytes of a device, where the compiler does not enforce the limit itself; else None."""
    return GPUS[target.kind].memory if target.platform == 'cuda' else None


def neighbour_distances(target: Target, mesh: jax.sharding.Mesh, axis: str) -> dict[int, int]:
    """{distance in links of the torus: number of neighbours at that distance} for the rings on an axis.

    Empty for GPUs, whose links are not a torus.
    """
    if target.platform != 'tpu':
        return {}
    position = mesh.axis_names.index(axis)
    devices = mesh.devices.swapaxes(0, position)
    pairs = zip(devices.ravel(), np.roll(devices, -1, 0).ravel())
    return dict(sorted(collections.Counter(_distance(target, *pair) for pair in pairs).items()))


def _distance(target, one, other):
    """Links of the torus between two devices."""
    total = 0
    for a, b, side in zip(one.coords, other.coords, target.shape):
        links = abs(a - b)
        total += min(links, side - links) if side % TPU_WRAPS[target.kind] == 0 else links
    return total
