"""Eight virtual CPU devices; programs are compiled fast rather than well."""

import os

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
    """A compiled training step takes hundreds of the 65,530 mappings that Linux gives a process; without them XLA
    cannot go on."""
    yield
    jax.clear_caches()
