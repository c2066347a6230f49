"""Eight virtual CPU devices; programs are compiled fast rather than well."""

import os

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
    """Hundreds of compiled programs together have more pieces of memory than Linux gives a process (65,530), and it
    crashes."""
    yield
    jax.clear_caches()
