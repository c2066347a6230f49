"""Accelerators in numbers, the basis of a plan: bytes, bytes per second in one direction, FLOP/s.

Sources, by the letter in the comment of each row:
  [N] the vendor's data sheet, as collected in github.com/stas00/ml-engineering, compute/accelerator, network
  [B] "How to Scale Your Model", github.com/jax-ml/scaling-book, tpus.md
  [C] docs.cloud.google.com/tpu/docs: v5e, v5p, v6e, tpu7x
  [W] NVIDIA's architecture papers: GA102 (2020), Ada (2022), RTX Blackwell (2025), in their tables of peak
      rates; bfloat16 with float32 accumulation, dense
  [D] NVIDIA's data sheets of L4, A10, L40, A40, RTX A6000, RTX 6000 Ada, GH200, GB200 NVL72; half of the
      rates that they print with sparsity
  [M] what the driver leaves of the nominal memory, as in targets.py
  [A] assumption: a property of a cluster, not of a chip, or a figure without a known source
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Collection

from lct.plan.targets import GPUS

GB, TB, GiB = 1e9, 1e12, 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of accelerator and the cluster that it usually belongs to.

    platform: 'gpu', 'tpu' or 'cpu'.
    flops: peak of dense bfloat16 products, of float32 on a CPU.
    memory: bytes of a device. bandwidth: of that memory.
    node_size: devices with fast links between all of them: a machine of GPUs, a pod of TPUs.
    inside: from a device to one neighbour in its node. inside_all: from a device to all of them at once, for
      collectives; on a TPU, both directions of one side of its torus.
    between: one flow between nodes. network: from a whole node to the others.
    host: from a device to the memory of its host. host_memory: bytes of one machine, by default 2 TB as in a
      DGX H100 [N].
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
    host_memory: float = 2 * TB

    @property
    def machine(self) -> int:
        """Devices that share the memory of a host."""
        return 4 if self.platform == 'tpu' else min(self.node_size, 8)

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU of NVIDIA."""
        return self.platform == 'gpu' and not self.name.startswith('mi')


def _gpu(name, flops, memory, bandwidth, links, network, host):
    """links: (inside, inside_all). network: (between, network). A single number stands for both."""
    pair = lambda x: x if isinstance(x, tuple) else (x, x)
    return Hardware(name, 'gpu', flops, memory, bandwidth, 8, *pair(links), *pair(network), host)


def _card(name, flops, memory, bandwidth, host):
    """A card without fast links: what goes between two of a machine goes through the bus, and machines are
    on a network of 25 Gb/s and have 256 GB [A]. memory: nominal bytes, of which 2% are the driver's [A]."""
    return Hardware(name, 'gpu', flops, 0.98 * memory, bandwidth, 8, host * 0.6, host * 0.6,
                    3.125 * GB, 3.125 * GB, host, 256 * GB)


def _tpu(name, flops, memory, bandwidth, pod, link, chip_network, host):
    return Hardware(name, 'tpu', flops, memory, bandwidth, pod, link, 2 * link, chip_network,
                    pod * chip_network, host, 400 * GB)  # as a machine of v4 [C]


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
    # 71 TFLOP/s, 24 GiB, 936 GB/s [W]; PCIe 4.0 x16
    _card('rtx3090', 71e12, 24 * GiB, 936 * GB, 31 * GB),
    # 165.2 TFLOP/s, 24 GiB, 1008 GB/s [W]; PCIe 4.0 x16
    _card('rtx4090', 165.2e12, 24 * GiB, 1008 * GB, 31 * GB),
    # 209.5 TFLOP/s, 32 GiB, 1792 GB/s [W]; PCIe 5.0 x16
    _card('rtx5090', 209.5e12, 32 * GiB, 1792 * GB, 63 * GB),
    # 154.8 TFLOP/s, 48 GiB, 768 GB/s [D]; PCIe 4.0 x16
    _card('a6000', 154.8e12, 48 * GiB, 768 * GB, 31 * GB),
    # 364.2 TFLOP/s, 48 GiB, 960 GB/s [D]; PCIe 4.0 x16
    _card('rtx6000ada', 364.2e12, 48 * GiB, 960 * GB, 31 * GB),
    # 149.7 TFLOP/s, 48 GB with ECC, 696 GB/s [D]; PCIe 4.0 x16
    _card('a40', 149.7e12, 48 * GB, 696 * GB, 31 * GB),
    # 181 TFLOP/s, 48 GB with ECC, 864 GB/s [D]; PCIe 4.0 x16
    _card('l40', 181e12, 48 * GB, 864 * GB, 31 * GB),
    # 121 TFLOP/s, 24 GB with ECC, 300 GB/s [D]; PCIe 4.0 x16
    _card('l4', 121e12, 24 * GB, 300 * GB, 31 * GB),
    # 125 TFLOP/s, 24 GB with ECC, 600 GB/s [D]; PCIe 4.0 x16. The A10G of AWS: 70 TFLOP/s (AWS, G5)
    _card('a10', 125e12, 24 * GB, 600 * GB, 31 * GB),
    _card('a10g', 70e12, 24 * GB, 600 * GB, 31 * GB),
    # 312 TFLOP/s, 40 GB, 1555 GB/s, NVLink3 300 GB/s [N]; the network of a DGX
    _gpu('a100-40gb', 312e12, 0.98 * 40 * GiB, 1555 * GB, 300 * GB, (25 * GB, 200 * GB), 31 * GB),
    # 990 TFLOP/s, 96 GB, 4 TB/s [N]; one to a machine of 480 GB, 450 GB/s to its host [D]; one adapter of
    # 400 Gb/s [A]
    Hardware('gh200', 'gpu', 990e12, 0.98 * 96 * GB, 4.0 * TB, 1, 450 * GB, 450 * GB, 50 * GB, 50 * GB,
             450 * GB, 480 * GB),
    # 2500 TFLOP/s, 186 GB, 8 TB/s, 72 in one NVLink domain at 900 GB/s, 225 GB/s to the host [D]; an adapter
    # of 400 Gb/s each [A]
    Hardware('gb200', 'gpu', 2500e12, 0.98 * 186 * GB, 8.0 * TB, 72, 900 * GB, 900 * GB, 50 * GB,
             72 * 50 * GB, 225 * GB),
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
    # a core: 16 GFLOP/s in float32, 4 GiB, 10 GB/s, all of it [A]; this machine has what cpu() says
    Hardware('cpu', 'cpu', 16e9, 4 * GiB, 10 * GB, 4096, 10 * GB, 10 * GB, GB, GB, 10 * GB),
)}
# of clusters, which a search for a remedy tries
CLUSTERS = ('l40s', 'a100', 'h100', 'h200', 'b200', 'mi300x', 'v4', 'v5e', 'v5p', 'v6e', 'v7')
TPU_KINDS = {'v5 lite': 'v5e', 'v5e': 'v5e', 'v5': 'v5p', 'v6': 'v6e', 'tpu7': 'v7', 'v4': 'v4'}


def of_device(kind: str, platform: str) -> Hardware | None:
    """The row of a device that jax describes as `kind`, such as 'NVIDIA GeForce RTX 4090'; None without."""
    kind = kind.lower()
    if platform == 'tpu':
        return next((TABLE[row] for sign, row in TPU_KINDS.items() if sign in kind), None)
    parts = re.split(r'[\s-]+', kind)
    names = {''.join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, i + 4)}
    if 'a100' in names and '40gb' in parts:
        return TABLE['a100-40gb']
    found = [name for name in TABLE if name in names and name != 'cpu']
    return TABLE[max(found, key=len)] if found else None


def cpu(devices: int, memory: float) -> Hardware:
    """Virtual devices on the CPU of this machine, which share its cores and its memory in bytes."""
    core = TABLE['cpu']
    share = (os.cpu_count() or 1) / devices
    return dataclasses.replace(core, flops=core.flops * share, bandwidth=core.bandwidth * share,
                               memory=memory / devices)


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
