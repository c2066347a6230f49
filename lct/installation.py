"""What must be the same in all processes of a run: code, packages and flags; and how they differ."""

import collections
import os
import platform
import re
import zlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'ml_dtypes')
PLUGINS = re.compile(r'jax[-_](cuda|rocm)\d*[-_](plugin|pjrt)|libtpu|nvidia[-_](nccl|cudnn)')
OPTIONS = ('jax_enable_x64', 'jax_default_matmul_precision', 'jax_default_prng_impl',
           'jax_threefry_partitionable')
FLAGS = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')
OWN_FLAGS = re.compile(r'--xla_dump|--xla_gpu_dump|--xla_force_host_platform_device_count')  # of one process
MOST_FIELDS, MOST_NAMES = 3, 3  # in a message


def describe() -> dict[str, str]:
    """{name: value} of the code of lct, the versions of its packages, and the flags of XLA and jax."""
    found = {'Python': platform.python_version()}
    plugins = {name for dist in metadata.distributions()
               if (name := dist.metadata['Name']) and PLUGINS.match(name)}
    for name in (*PACKAGES, *sorted(plugins)):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    folder = Path(__file__).parent
    for path in sorted(folder.rglob('*.py')):
        name = f'the code of {folder.name}/{path.relative_to(folder).as_posix()}'
        found[name] = f'{zlib.crc32(path.read_bytes()):08x}'
    for name in FLAGS:
        flags = (flag for flag in os.environ.get(name, '').split() if not OWN_FLAGS.match(flag))
        found[name] = ' '.join(sorted(flags))
    return found | {name: str(getattr(jax.config, name)) for name in OPTIONS}


def differences(values: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    """How the processes differ: '' or 'jax is 0.12.0 in process 0 (a) but 0.10.2 in process 1 (b), and ...'.

    values: {field: value} of each process. names: of the processes.
    """
    fields = sorted({field for one in values for field in one}, key=str)
    different = [field for field in fields if len({_text(one, field) for one in values}) > 1]
    parts = []
    for field in different[:MOST_FIELDS]:
        holders = collections.defaultdict(list)
        for one, name in zip(values, names):
            holders[_text(one, field)].append(name)
        parts.append(f'{field} is ' + ' but '.join(
            f'{value} in {_join(some)}' for value, some in list(holders.items())[:MOST_NAMES]))
    more = len(different) - len(parts)
    return ', and '.join(parts) + (f', and {more} more' if more else '')


def _text(values, field):
    if field not in values:
        return 'absent'
    value = str(values[field]) or 'empty'
    return value if len(value) <= 100 else f'{value[:80]}... (crc {zlib.crc32(value.encode()):08x})'


def _join(names):
    more = f' and {len(names) - MOST_NAMES} others' if len(names) > MOST_NAMES else ''
    return ', '.join(names[:MOST_NAMES]) + more
