"""The choice of the inner block: the fused one where it applies, plain XLA elsewhere, with the reason."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lct.ops.context_parallel import inner_block

AUTO = 'auto'
FUSED = 'triton'  # what 'auto' takes where it can


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
    if reason := obstacle(FUSED, head_dim, dtype):
        return Choice('xla', reason)
    if jnp.dtype(dtype) == jnp.float32:
        return Choice('xla', 'no matrix instruction multiplies float32 at full precision')
    return Choice(FUSED, f'the devices are {device()[1]} and the activations {jnp.dtype(dtype).name}')


def obstacle(kernel: str, head_dim: int | None = None, dtype: jax.typing.DTypeLike | None = None) -> str:
    """Why an inner block cannot run on the devices of the current mesh, '' if it can.

    head_dim, dtype: None where they are not known yet.
    """
    if kernel == 'xla':
        return ''
    if reason := _platform_obstacle():
        return reason
    block = inner_block(kernel)
    if reason := _capability_obstacle(*block.CAPABILITIES):
        return reason
    if kernel == 'triton' and (reason := _target_obstacle(block.triton)):
        return reason
    if head_dim is not None and head_dim not in block.HEAD_DIMS:
        return f'head_dim {head_dim} is not one of {", ".join(map(str, block.HEAD_DIMS))}'
    if dtype is not None and jnp.dtype(dtype).name not in block.DTYPES:
        return f'dtype {jnp.dtype(dtype).name} is not one of {", ".join(block.DTYPES)}'
    return ''


def _platform_obstacle():
    platform, kind = device()
    if platform != 'gpu':
        return f'the platform is {platform}'
    if kind.startswith('AMD'):
        return f'the devices are {kind} and the fused block is made for CUDA'
    return ''


def _capability_obstacle(lowest, beyond):
    capability = getattr(jax.devices()[0], 'compute_capability', None)  # None while compiling for others
    if capability is not None and not lowest <= float(capability) < beyond:
        return (f'the devices are {device()[1]} of compute capability {capability}, not {lowest} to below '
                f'{beyond}')
    return ''


def _target_obstacle(triton):
    try:  # newer jax compiles Triton for the devices of a list and for those that are present
        getattr(triton, 'get_gpu_info', str)()
    except ValueError:
        return f'jax {jax.__version__} compiles Triton for {device()[1]} only where one is present'
    return ''


def device() -> tuple[str, str]:
    """(platform, kind) of the current mesh, which may be one to compile for, or of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.platform, device.device_kind
