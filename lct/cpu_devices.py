"""Virtual devices on a machine without accelerators."""

import os

import jax

COUNT_FLAG = 'xla_force_host_platform_device_count'
PATIENCE = '--xla_cpu_collective_call_terminate_timeout_seconds'


def provide(count: int) -> None:
    """Let jax make `count` CPU devices, unless XLA_FLAGS has a number of them. Must run before jax computes
    anything, and raises RuntimeError where it can tell that it did not.

    Devices then wait for each other without an end. XLA's default ends the process after 40 s: too early for
    a process that was suspended, or for more devices than cores on long sequences. A collective that hangs
    is noticed by lct.watchdog.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    if PATIENCE not in flags:
        os.environ['XLA_FLAGS'] = f'{flags} {PATIENCE}={10**9}'.strip()
    if COUNT_FLAG not in flags:
        jax.config.update('jax_num_cpu_devices', count)
