"""Accelerators in numbers, the basis of a plan: bytes, bytes per second in one direction, FLOP/s.

Sources, by the letter in the comment of each row:
  [N] the vendor's data sheet, as collected in github.com/stas00/ml-engineering, compute/accelerator, network
  [B] "How to Scale Your Model", github.com/jax-ml/scaling-book, tpus.md
  [C] docs.cloud.google.com/tpu/docs: v5e, v5p, v6e, tpu7x
  [M] what the driver leaves of the nominal memory, as in targets.py
  [A] assumption: a property of a cluster, not of a chip, or a figure without a known source
"""

import dataclasses
import difflib
from collections.abc import Collection

from lct.plan.targets import GPUS

GB, TB, GiB = 1e9, 1e12, 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of accelerator and the cluster that it usually belongs to.

    platform: 'gpu' or 'tpu'.
    flops: peak of dense bfloat16 products. memory: bytes of a device. bandwidth: of that memory.
    node_size: devices with fast links between all of them: a machine of GPUs, a pod of TPUs.
    inside: from a device to one neighbour in its node. inside_all: from a device to all of them at once, for
      collectives; on a TPU, both directions of one side of its torus.
    between: one flow between nodes. network: from a whole node to the others.
    host: from a device to the memory of its host.
    """

    name: str
    platform: str
    flops: float
    memory: float
    bandwidth: float
    node_size: int
    inside: float
    inside_all: float
    between: float
    network: float
    host: float


def _gpu(name, flops, memory, bandwidth, links, network, host):
    """links: (inside, inside_all). network: (between, network). A single number stands for both."""
    pair = lambda x: x if isinstance(x, tuple) else (x, x)
    return Hardware(name, 'gpu', flops, memory, bandwidth, 8, *pair(links), *pair(network), host)


def _tpu(name, flops, memory, bandwidth, pod, link, chip_network, host):
    return Hardware(name, 'tpu', flops, memory, bandwidth, pod, link, 2 * link, chip_network,
                    pod * chip_network, host)


TABLE = {hardware.name: hardware for hardware in (
    # 362.05 TFLOP/s, 864 GB/s, PCIe 4.0 x16 and no NVLink [N]; memory [M]. The network of Gradient's nodes
    # was not published. 50 Gb/s for a node of eight is [A] and lies in the range that is consistent with all
    # nine published durations. Networks of other clusters differ widely: pass --network to the planner.
    _gpu('l40s', 362.05e12, GPUS['l40s'].memory, 864 * GB, 31 * GB, 6.25 * GB, 31 * GB),
    # 312 TFLOP/s, NVLink3 300 GB/s, PCIe 4.0 [N]; memory [M]; eight HDR adapters of 200 Gb/s as in a DGX [N]
    _gpu('a100', 312e12, GPUS['a100'].memory, 2.04 * TB, 300 * GB, (25 * GB, 200 * GB), 31 * GB),
    # 989 TFLOP/s, 3.35 TB/s, NVLink4 450 GB/s, PCIe 5.0, DGX with eight adapters of 400 Gb/s [N]; memory [M]
    _gpu('h100', 989e12, GPUS['h100'].memory, 3.35 * TB, 450 * GB, (50 * GB, 400 * GB), 63 * GB),
    # compute and links of the H100, 4.8 TB/s [N]; memory [M]
    _gpu('h200', 989e12, GPUS['h200'].memory, 4.8 * TB, 450 * GB, (50 * GB, 400 * GB), 63 * GB),
    # 2250 TFLOP/s, 180 GB usable of 192, 8 TB/s, NVLink5 900 GB/s [N]; eight adapters of 400 Gb/s [A]
    _gpu('b200', 2250e12, 180 * GB, 8.0 * TB, 900 * GB, (50 * GB, 400 * GB), 63 * GB),
    # 1307 TFLOP/s, 192 GB, 5.3 TB/s, 64 GB/s to each of 7 peers [N]; eight adapters of 400 Gb/s [A]
    _gpu('mi300x', 1307e12, 192 * GB, 5.3 * TB, (64 * GB, 448 * GB), (50 * GB, 400 * GB), 63 * GB),
    # chips, links, pods, 25 GB/s of network and 15 GB/s of PCIe a host or chip [B]; a host has 4 chips
    _tpu('v4', 275e12, 32 * GiB, 1.2 * TB, 4096, 45 * GB, 6.25 * GB, 15 * GB),
    # 197 TFLOP/s, 16 GB, 819 GB/s [C]; links [B]; two adapters of 100 Gb/s for the 8 chips of a host [C]
    _tpu('v5e', 197e12, 16 * GiB, 819 * GB, 256, 45 * GB, 3.125 * GB, 15 * GB),
    # 459 TFLOP/s, 95 GB, 2765 GB/s, 50 Gb/s of network a chip [C]; links [B]
    _tpu('v5p', 459e12, 95 * GiB, 2765 * GB, 8960, 90 * GB, 6.25 * GB, 15 * GB),
    # 918 TFLOP/s, 32 GB, 1638 GB/s, 100 Gb/s of network a chip [C]; links, PCIe [B]
    _tpu('v6e', 918e12, 32 * GiB, 1638 * GB, 256, 90 * GB, 12.5 * GB, 32 * GB),
    # 2307 TFLOP/s, 192 GiB, 7380 GB/s, 100 Gb/s of network a chip [C]; 100 GB/s a link [N]; PCIe [A]
    _tpu('v7', 2307e12, 192 * GiB, 7380 * GB, 9216, 100 * GB, 12.5 * GB, 32 * GB),
)}


def find(name: str) -> Hardware:
    """The Hardware of a name.

    Raises:
      ValueError: for an unknown name, with the nearest ones.
    """
    return TABLE[lookup(name, TABLE, 'hardware')]


def lookup(name: str, table: Collection[str], kind: str) -> str:
    """name in lower case, a key of the table; kind is what the error calls it.

    Raises:
      ValueError: for an unknown name, with the nearest ones.
    """
    name = name.lower()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3, cutoff=0.3)
        nearest = f'nearest are {", ".join(near)} of' if near else 'it has'
        raise ValueError(f'{kind} {name!r} is not in the table; {nearest} {", ".join(table)}')
    return name
