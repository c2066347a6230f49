"""Mesh axes and the letters that map array dims onto them.

The alphabet of the whole package (einsum strings, docstring shapes and sharding rules):
B batch, T query or local sequence, S key/value sequence, N query heads, K key/value heads, G = N / K,
H head_dim, D embed_dim, F mlp_dim, V vocab, L layers.
"axis" is a mesh axis, "dim" an array dimension.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp', 'sequence', 'tensor')  # slowest links first
BATCH_AXES = ('data', 'fsdp')

ACTIVATION_RULES = {
    'B': BATCH_AXES,
    'T': 'sequence',
    'S': 'sequence',
    'N': 'tensor',
    'K': 'tensor',
    'F': 'tensor',
    'V': 'tensor',
}
# A ring shares one copy of the weights among its devices, as ZeRO-3 does: at a million tokens a replica per
# device would leave no room for the activations.
WEIGHT_RULES = {'D': ('fsdp', 'sequence'), 'N': 'tensor', 'K': 'tensor', 'F': 'tensor', 'V': 'tensor'}


def spec(letters: str) -> P:
    """PartitionSpec of an activation, e.g. spec('BTNH')."""
    return P(*(ACTIVATION_RULES.get(letter) for letter in letters))


def weight_spec(letters: str) -> P:
    """PartitionSpec of a stored parameter, e.g. weight_spec('LDNH').

    Norm vectors ('LD', 'D') are replicated: sharding a few kilobytes would only add a gather per layer.
    """
    if letters in ('D', 'LD'):
        return P(*(None for _ in letters))
    return P(*(WEIGHT_RULES.get(letter) for letter in letters))


def make_mesh(degrees: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over ('data', 'fsdp', 'sequence', 'tensor') with the given four degrees.

    Raises:
      ValueError: if there are not four positive degrees, or fewer devices than their product; in a run of
        several processes also if there are more, because a process without devices in the mesh could not run
        its programs.
    """
    degrees = tuple(int(d) for d in degrees)
    if len(degrees) != len(AXES) or min(degrees) < 1:
        raise ValueError(f'mesh {degrees} must be four positive degrees {AXES}; for example (1, 1, 8, 1)')
    all_processes = devices is None and jax.process_count() > 1
    devices = jax.devices() if devices is None else list(devices)
    needed = math.prod(degrees)
    product = ' * '.join(f'{name} {d}' for name, d in zip(AXES, degrees))
    if all_processes and needed != len(devices):
        raise ValueError(
            f'mesh {degrees} has {product} = {needed} devices but the {jax.process_count()} processes have '
            f'{len(devices)} ({devices[0].platform}); use a mesh of {len(devices)}, or a number of processes '
            f'that shares {needed} devices evenly'
        )
    if needed > len(devices):
        raise ValueError(
            f'mesh {degrees} needs {product} = {needed} devices but this process has {len(devices)} '
            f'({devices[0].platform}); use {_smaller(degrees, len(devices))}, or on CPU set '
            f'XLA_FLAGS=--xla_force_host_platform_device_count={needed}'
        )
    return Mesh(_arranged(degrees, devices[:needed]), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _smaller(degrees, count):
    """A mesh of at most count devices with a shorter ring, if that suffices, in words."""
    data, fsdp, sequence, tensor = degrees
    room = count // (data * fsdp * tensor)
    if not room:
        return 'a smaller mesh'
    return f'a smaller mesh such as {(data, fsdp, min(sequence, 1 << (room.bit_length() - 1)), tensor)}'


def _arranged(degrees, devices):
    """devices as an array of shape degrees: the last axes get the fastest links.

    On a TPU torus an axis covers whole dimensions of the torus where the degrees allow it, and the first axes
    span the network between slices.
    """
    slices = {getattr(d, 'slice_index', 0) for d in devices} if devices[0].platform == 'tpu' else {0}
    remaining, across = len(slices), []
    for degree in degrees:
        across.append(math.gcd(degree, remaining))
        remaining //= across[-1]
    if remaining > 1:
        raise ValueError(f'mesh {degrees} does not divide over {len(slices)} TPU slices; use degrees whose '
                         'product is a multiple of their number')
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(degrees, devices, allow_split_physical_axes=True)
    within = [degree // slices_of_axis for degree, slices_of_axis in zip(degrees, across)]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The abstract mesh set by jax.set_mesh, or None when there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def axis_size(name: str) -> int:
    """Degree of one axis of the current mesh; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[name]


def reshard(x: jax.Array, partition: P) -> jax.Array:
    """x with the partition on the current mesh; x itself without a mesh."""
    return x if current_mesh() is None else jax.reshard(x, partition)


def put(x: Any, partition: P) -> jax.Array:
    """Place an array on the current mesh, or on the default device without a mesh.

    In a run of several processes each holds the whole array and places the shards of its own devices.
    """
    if current_mesh() is None:
        return jax.device_put(x)
    if jax.process_count() == 1:
        return jax.device_put(x, partition)
    x = np.asarray(x)
    sharding = NamedSharding(jax.sharding.get_mesh(), partition)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array in host memory, in every process."""
    if not x.is_fully_addressable:
        x = jax.device_put(x, NamedSharding(x.sharding.mesh, P()))
    return np.asarray(x)


def collect(tree: Any) -> Any:
    """A tree of arrays that the first process can write.

    Arrays that this process can address are returned as they are. The others are gathered into host memory: a
    stack of layers in the first process only (it is empty in the others), one layer at a time, so that no
    device has to hold more than one whole layer.
    """
    def one(x):
        if x.is_fully_addressable:
            return x
        if x.ndim < 3 or x.sharding.spec[0] is not None:
            return fetch(x)
        gathered = np.empty(x.shape if jax.process_index() == 0 else 0, x.dtype)
        for i in range(x.shape[0]):
            layer = fetch(x[i])
            if gathered.size:
                gathered[i] = layer
        return gathered

    return jax.tree.map(one, tree)


def _used_dims(letters):
    """The axes of a weight's dims where it is used."""
    return (None if letter == 'D' else WEIGHT_RULES.get(letter) for letter in letters)


def gather(w: jax.Array, letters: str, dtype: Any) -> jax.Array:
    """A stored parameter as it is used: in dtype, gathered over fsdp and sequence, still sharded over tensor.

    'reduced' keeps one partial gradient per device until the transpose of this gather sums and scatters them:
    once, in float32, however many uses w had. The forward communicates dtype: compilers for accelerators move
    the cast before the gather.
    """
    if current_mesh() is None:
        return w.astype(dtype)
    used = P(*_used_dims(letters), reduced={'data', 'fsdp', 'sequence'})
    return jax.reshard(w.astype(jnp.float32), used).astype(dtype)


def einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum of an activation with a weight, in the letters of the package.

    The weight is gathered here unless it already was; autodiff scatters its gradient back. The result has the
    activation sharding of its letters and the dtype of x; sums are accumulated in float32.
    """
    inputs, out = equation.split('->')
    letters = inputs.split(',')
    w = gather(w, letters[1], x.dtype)
    if equation.startswith('BT') and x.shape[0] == 1:
        # The gradient of w then sums over T alone: for two dims XLA on CPUs copies its operands transposed.
        x, w = _without_batch(x, w, letters)
        return _with_batch(_einsum(equation.replace('BT', 'T'), x, w), out)
    return _einsum(equation, x, w)


def _einsum(equation, x, w):
    return _product(equation, x, w) if x.dtype == jnp.float32 else _narrow_product(equation, x, w)


def _product(equation, x, w, out=None):
    """einsum summed in float32, in the dtype of x, with the PartitionSpec out or the one of its letters."""
    # float32 means float32 on every device: TF32 and bfloat16 passes are for bfloat16 models
    precision = 'highest' if x.dtype == jnp.float32 else None
    options = {'preferred_element_type': jnp.float32, 'precision': precision}
    if current_mesh() is not None:
        options['out_sharding'] = spec(equation.split('->')[1]) if out is None else out
    return jnp.einsum(equation, x, w, **options).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_product(equation, x, w):
    """_product of bfloat16 whose backward multiplies bfloat16 too. Autodiff would convert a weight and the
    gradient to float32 first, for which accelerators have slower units: the product of two bfloat16 is exact
    in float32, so that nothing else changes. XLA on CPUs needs the conversion."""
    return _product(equation, x, w)


def _narrow_forward(equation, x, w):
    return _product(equation, x, w), (x, w)


def _narrow_backward(equation, saved, grad):
    (x, w), (inputs, out) = saved, equation.split('->')
    of_x, of_w = inputs.split(',')
    return (_gradient(f'{out},{of_w}->{of_x}', grad, w, x), _gradient(f'{of_x},{out}->{of_w}', x, grad, w))


def _gradient(equation, a, b, of):
    """_product of a and b in the dtype and the sharding of the gradient of `of`: partial sums over the axes
    over which it is 'reduced'."""
    def product(dtype, a, b):
        return _product(equation, a.astype(dtype), b.astype(dtype), out).astype(of.dtype)

    out = None
    if current_mesh() is not None:
        own = jax.typeof(of).sharding.spec
        out = P(*own.partitions, unreduced=own.reduced)
    return lax.platform_dependent(a, b, cpu=functools.partial(product, jnp.float32),
                                  default=functools.partial(product, of.dtype))


_narrow_product.defvjp(_narrow_forward, _narrow_backward)


def _without_batch(x, w, letters):
    """x [1, T, ...] without B and a gathered w whose gradient is summed over the axes of T alone; those of B
    have one device."""
    x = reshard(x, P(None, *spec(letters[0])[1:]))
    if current_mesh() is not None:
        w = jax.reshard(w, P(*_used_dims(letters[1]), reduced={'sequence'}))
    return lax.squeeze(x, (0,)), w


def _with_batch(x, letters):
    return reshard(x[None], spec(letters))
