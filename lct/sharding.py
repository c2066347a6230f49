"""Mesh axes and the letters that map array dims onto them.

The alphabet of the whole package (einsum strings, docstring shapes and sharding rules):
B batch, T query or local sequence, S key/value sequence, N query heads, K key/value heads,
G = N / K, H head_dim, D embed_dim, F mlp_dim, V vocab, L layers.
"axis" is a mesh axis, "dim" an array dimension.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
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
# A ring holds one copy of the weights between its devices, as ZeRO-3 does: at a million tokens a replica per
# device would leave no room for the activations.
WEIGHT_RULES = {'D': ('fsdp', 'sequence'), 'N': 'tensor', 'K': 'tensor', 'F': 'tensor', 'V': 'tensor'}


def spec(letters):
    """PartitionSpec of an activation, e.g. spec('BTNH')."""
    return P(*(ACTIVATION_RULES.get(letter) for letter in letters))


def weight_spec(letters):
    """PartitionSpec of a stored parameter, e.g. weight_spec('LDNH'). Lone norm vectors ('LD', 'D')
    are replicated: sharding a few kilobytes would only add a gather per layer."""
    if letters in ('D', 'LD'):
        return P(*(None for _ in letters))
    return P(*(WEIGHT_RULES.get(letter) for letter in letters))


def make_mesh(degrees, devices=None):
    """Mesh over ('data', 'fsdp', 'sequence', 'tensor') with the given four degrees.

    Raises:
      ValueError: if there are not four positive degrees, fewer devices than their product, or more in a run
        of several processes: one without devices in the mesh could not take part.
    """
    degrees = tuple(int(d) for d in degrees)
    if len(degrees) != len(AXES) or min(degrees) < 1:
        raise ValueError(f'mesh {degrees} must be four positive degrees {AXES}; for example (1, 1, 8, 1)')
    whole_run = devices is None and jax.process_count() > 1
    devices = jax.devices() if devices is None else list(devices)
    needed = math.prod(degrees)
    product = ' * '.join(f'{name} {d}' for name, d in zip(AXES, degrees))
    if whole_run and needed != len(devices):
        raise ValueError(
            f'mesh {degrees} has {product} = {needed} devices but the {jax.process_count()} processes have '
            f'{len(devices)} ({devices[0].platform}); use a mesh of {len(devices)}, or a number of processes that '
            f'shares {needed} devices evenly'
        )
    if needed > len(devices):
        raise ValueError(
            f'mesh {degrees} needs {product} = {needed} devices but this process sees {len(devices)} '
            f'({devices[0].platform}); use a smaller mesh, or on CPU set '
            f'XLA_FLAGS=--xla_force_host_platform_device_count={needed}'
        )
    return Mesh(_arranged(degrees, devices[:needed]), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _arranged(degrees, devices):
    """devices as an array of the degrees: the last axes get the fastest links. On a TPU torus an axis is
    whole sides of it where the degrees allow, and the first axes go over the network between slices."""
    slices = {getattr(d, 'slice_index', 0) for d in devices} if devices[0].platform == 'tpu' else {0}
    left, between = len(slices), []
    for degree in degrees:
        between.append(math.gcd(degree, left))
        left //= between[-1]
    if left > 1:
        raise ValueError(f'mesh {degrees} does not divide over {len(slices)} TPU slices; use degrees whose product is '
                         'a multiple of their number')
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(degrees, devices, allow_split_physical_axes=True)
    inside = [degree // part for degree, part in zip(degrees, between)]
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)


def current_mesh():
    """The mesh set by jax.set_mesh as the tracer sees it, or None when there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def axis_size(name):
    """Degree of one axis of the current mesh; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[name]


def reshard(x, partition):
    """Move x to the partition on the current mesh; x itself without a mesh."""
    return x if current_mesh() is None else jax.reshard(x, partition)


def put(x, partition):
    """Place an array on the current mesh; on the default device without a mesh. Of several processes each has
    the whole array, and sends its own devices their parts."""
    if current_mesh() is None:
        return jnp.asarray(x)
    if jax.process_count() == 1:
        return jax.device_put(x, partition)
    x = np.asarray(x)
    where = NamedSharding(jax.sharding.get_mesh(), partition)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def fetch(x):
    """An array whole in host memory, in every process."""
    if not x.is_fully_addressable:
        x = jax.device_put(x, NamedSharding(x.sharding.mesh, P()))
    return np.asarray(x)


def collect(tree):
    """A tree of arrays that the first process can write: as they are if this process has them whole, else in
    host memory, for the first process alone.

    A stack of layers comes a layer at a time, so that no device has to hold more than one of them whole.
    """
    def one(x):
        if x.is_fully_addressable:
            return x
        if x.ndim < 3 or x.sharding.spec[0] is not None:
            return fetch(x)
        whole = np.empty(x.shape if jax.process_index() == 0 else 0, x.dtype)
        for i in range(x.shape[0]):
            layer = fetch(x[i])
            if whole.size:
                whole[i] = layer
        return whole

    return jax.tree.map(one, tree)


def gather(w, letters, dtype):
    """A stored parameter as it is used: in dtype, gathered over fsdp and sequence, still split over tensor.

    'reduced' leaves its gradient in one part per device until the transpose of this gather adds the parts up
    and scatters them, once, however many uses w had, and in float32. What travels forward is dtype: the
    compilers for accelerators move the cast before the gather.
    """
    if current_mesh() is None:
        return w.astype(dtype)
    dims = (None if letter == 'D' else WEIGHT_RULES.get(letter) for letter in letters)
    used = P(*dims, reduced={'data', 'fsdp', 'sequence'})
    return jax.reshard(w.astype(jnp.float32), used).astype(dtype)


def einsum(equation, x, w):
    """einsum of an activation with a weight, in the letters of the package.

    The weight is gathered where it is used, unless it was before (its gradient is scattered back by
    autodiff), the result gets the activation sharding its letters say and the dtype of x, and sums run in
    float32.
    """
    inputs, out = equation.split('->')
    # float32 means float32 on every device: TF32 and bfloat16 passes are for bfloat16 models
    exact = {'preferred_element_type': jnp.float32, 'precision': 'highest' if x.dtype == jnp.float32 else None}
    if current_mesh() is not None:
        exact['out_sharding'] = spec(out)
    return jnp.einsum(equation, x, gather(w, inputs.split(',')[1], x.dtype), **exact).astype(x.dtype)
