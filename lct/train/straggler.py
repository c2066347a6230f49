"""Which host is slower than the others: all wait for it in every step, so its step time shows nothing.

At each checkpoint every process measures a fixed computation on its own devices, and the time its steps
waited for input; the beats of lct.peers carry both to process 0, which compares.
"""

import collections
import statistics
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lct import processes

SLOW = 1.5  # times the median of all processes
WINDOW = 3  # measurements, of which the median counts
INPUT_SHARE = 0.25  # of the step time, that one process waits longer for its input than the median one


class StragglerCheck:
    """The measurements of this process, and in the first one the comparison with the others'."""

    def __init__(self):
        self._windows, self._last = collections.defaultdict(dict), (None, 0.0, time.monotonic())
        if processes.measures_others():
            self._probe()  # compiles

    def measure(self, step: int, waited_s: float) -> str | None:
        """Call after a step whose results are there.

        waited_s: seconds that the steps of this stage have waited for input so far.

        Returns:
          A sentence that names the processes that are slow, in the first process; else None.
        """
        if not processes.measures_others():
            return None
        now, (last_step, last_waited, last_time) = time.monotonic(), self._last
        self._last = (step, waited_s, now)
        if last_step is None or step <= last_step or waited_s < last_waited:  # another stage began
            return None
        steps = step - last_step
        processes.report(step=step, probe_s=self._probe(), input_s=(waited_s - last_waited) / steps)
        for index, report in processes.reports().items():
            if report:
                self._windows[index][report['step']] = report
                for old in sorted(self._windows[index])[:-WINDOW]:
                    del self._windows[index][old]
        return compare(self._windows, (now - last_time) / steps)

    def _probe(self):
        """Seconds of matmuls on all devices of this process at once; the best of three."""
        devices, cpu = np.array(jax.local_devices()), jax.default_backend() == 'cpu'
        mesh = Mesh(devices, ('device',), axis_types=(AxisType.Auto,))  # not that of all processes
        size = 256 if cpu else 2048
        x = np.full((len(devices), size, size), 1e-3, jnp.float32 if cpu else jnp.bfloat16)
        times = []
        with jax.set_mesh(mesh):
            x = jax.device_put(x, NamedSharding(mesh, P('device')))
            for _ in range(3):
                began = time.perf_counter()
                jax.block_until_ready(_matmuls(x))
                times.append(time.perf_counter() - began)
        return min(times)


@jax.jit
def _matmuls(x):
    return jax.lax.fori_loop(0, 32, lambda _, y: (y @ x).astype(x.dtype), x)


def compare(windows: Mapping[int, Mapping[int, Mapping[str, float]]], step_s: float) -> str | None:
    """The sentence about slow processes, or None.

    windows: {process: {step: {probe_s, input_s}}}. step_s: seconds of a step, the same for all.
    """
    full = {i: list(window.values()) for i, window in windows.items() if len(window) == WINDOW}
    if len(full) < 2:
        return None
    middle = lambda key: {i: statistics.median(one[key] for one in rows) for i, rows in full.items()}
    probes, inputs = middle('probe_s'), middle('input_s')
    usual_probe, usual_input = (statistics.median_low(values.values()) for values in (probes, inputs))
    slow = [f'{processes.name_of(i)} takes {1e3 * seconds:.0f} ms for what takes the others '
            f'{1e3 * usual_probe:.0f} ms' for i, seconds in sorted(probes.items())
            if seconds > SLOW * usual_probe]
    slow += [f'{processes.name_of(i)} waits {1e3 * seconds:.0f} ms of each step for its input, the others '
             f'{1e3 * usual_input:.0f} ms' for i, seconds in sorted(inputs.items())
             if seconds - usual_input > INPUT_SHARE * step_s]
    return f'slow: {"; ".join(slow)}; all others wait for it in every step' if slow else None
