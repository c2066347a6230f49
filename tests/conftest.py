"""Eight virtual CPU devices; programs are compiled fast rather than well, once for all workers."""

import gc
import importlib.metadata
import os

FLAGS = ['--xla_force_host_platform_device_count=8', '--xla_cpu_opt_preset=fast_compile']
# Later versions have a single emitter and do not know this flag.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
    FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *FLAGS])
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config):
    """The compilation cache lies beside pytest's own, and `pytest --cache-clear` empties it. Through the
    environment the scripts that tests start share it."""
    folder = str(config.cache.mkdir('jax_programs'))
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
    jax.config.update('jax_compilation_cache_dir', folder)
    gc.freeze()  # what is imported stays: collections in the middle of tracing need not look at it
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
    """A compiled training step takes hundreds of the 65,530 mappings that Linux gives a process; without them
    XLA cannot go on."""
    yield
    jax.clear_caches()
