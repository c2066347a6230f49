"""The choice of the inner block: the fused one where it applies, plain XLA elsewhere, with the reason."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

from lct.ops.kernels import triton_attention

AUTO = 'auto'
CAPABILITY = 8.0  # of a CUDA device: its matrix instructions take bfloat16


class Choice(NamedTuple):
    """kernel: a key of context_parallel.KERNELS. reason: the clause that follows 'because'."""

    kernel: str
    reason: str

    def __str__(self) -> str:
        return f'{self.kernel}, because {self.reason}'


def choose(kernel: str, head_dim: int, dtype: jax.typing.DTypeLike) -> Choice:
    """The inner block that the kernel of a config stands for, on the devices of the current mesh.

    kernel: 'auto', or the name of an inner block, which is taken as it is. dtype: of the activations.
    """
    if kernel != AUTO:
        return Choice(kernel, 'the config names it')
    if obstacle := triton_obstacle(head_dim, dtype):
        return Choice('xla', obstacle)
    if jnp.dtype(dtype) == jnp.float32:
        return Choice('xla', 'no matrix instruction multiplies float32 at full precision')
    return Choice('triton', f'the devices are {_device()[1]} and the activations {jnp.dtype(dtype).name}')


def triton_obstacle(head_dim: int | None = None, dtype: jax.typing.DTypeLike | None = None) -> str:
    """Why the fused Triton block cannot run on the devices of the current mesh, '' if it can.

    head_dim, dtype: None where they are not known yet.
    """
    supported = triton_attention.HEAD_DIMS
    if not triton_attention.INTERPRET and (obstacle := _device_obstacle()):
        return obstacle
    if head_dim is not None and head_dim not in supported:
        return f'head_dim {head_dim} is not one of {", ".join(map(str, supported))}'
    if dtype is not None and jnp.dtype(dtype).name not in triton_attention.DTYPES:
        return f'dtype {jnp.dtype(dtype).name} is not one of {", ".join(triton_attention.DTYPES)}'
    return ''


def _device_obstacle():
    platform, kind = _device()
    if platform != 'gpu':
        return f'the platform is {platform}'
    if kind.startswith('AMD'):
        return f'the devices are {kind} and the fused block is made for CUDA'
    capability = getattr(jax.devices()[0], 'compute_capability', None)  # None while compiling for others
    if capability is not None and float(capability) < CAPABILITY:
        return f'the devices are {kind} of compute capability {capability}, below {CAPABILITY}'
    try:  # newer jax compiles for the devices of a list and for those that are present
        getattr(triton, 'get_gpu_info', str)()
    except ValueError:
        return f'jax {jax.__version__} compiles Triton for {kind} only where one is present'
    return ''


def _device():
    """(platform, kind) of the current mesh, which may be one to compile for, or of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.platform, device.device_kind
