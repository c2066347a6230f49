"""Start a script as several processes of this machine, which work together through jax.distributed.

    python experiments/launch.py --nprocs 4 experiments/extend.py \\
        --config experiments/configs/smoke.py --workdir runs/smoke

This rehearses what will run on a cluster, by default on CPUs (set JAX_PLATFORMS for anything else): the
processes share the devices of the mesh. Only the output of the first process is shown. Ctrl-C is forwarded to
all of them: the first finishes the step and saves, the second stops, the third kills the processes. When a
process dies the others are ended, and the launcher reports which one died and its last lines; the same
command continues the run.
"""

import argparse
import collections
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

from lct.exit_status import PEER_LOST, STOPPED, STUCK, UNWRITABLE

LAST_LINES = 12
PATIENCE_S = 2.0  # for the others to end by themselves, as they do when all found the same error
CAUSE_S = 10.0  # for the one that the others have lost to end
POLL_S = 0.05


class Process:
    """A process and its last lines of output. prefix: precedes its lines on stdout; None hides them."""

    def __init__(self, index, command, environment, prefix):
        self.index, self.shown = index, prefix is not None
        self.last_lines = collections.deque(maxlen=LAST_LINES)
        # in its own session, or the terminal would send each Ctrl-C a second time
        self.popen = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors='replace', start_new_session=True)
        self._reader = threading.Thread(target=self._read, args=(prefix,), daemon=True)
        self._reader.start()

    def _read(self, prefix):
        for line in self.popen.stdout:
            if line.startswith('[Gloo] Rank'):  # printed for each of its connections
                continue
            self.last_lines.append(line.rstrip('\n'))
            if prefix is not None:
                print(prefix + self.last_lines[-1], flush=True)

    @property
    def status(self):
        """Exit status, a signal as a negative number; None while the process runs."""
        return self.popen.poll()

    @property
    def failed(self):
        return self.status not in (None, 0, STOPPED)

    def send(self, number):
        if self.status is None:
            self.popen.send_signal(number)

    def finish(self):
        self.popen.wait()
        self._reader.join(timeout=5)


def run(nprocs, command, port, show_all):
    """Start the processes and wait until all have ended. Returns the exit status."""
    group, signals = [], []

    def forward(number, _frame):
        signals.append(number)
        for process in group:  # a process that waits for another reacts to nothing less than SIGKILL
            process.send(number if len(signals) < 3 else signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    for index in range(nprocs):
        prefix = f'[{index}] ' if show_all else '' if index == 0 else None
        group.append(Process(index, command, process_environment(index, nprocs, port), prefix))
    wait(group, lambda: any(process.failed for process in group))
    dead = first_failure(group)
    for process in group:
        process.finish()
    if dead is None:
        return max(process.status for process in group)
    # a process may have ended before it could handle the signal
    if len(signals) > 2 or signals and dead.status in (-signal.SIGINT, -signal.SIGTERM):
        return STOPPED
    return report_failure(dead, group)


def process_environment(index, nprocs, port):
    """The environment variables of a process, which meets the others at a port of this machine."""
    address = f'127.0.0.1:{port}'
    return {
        'JAX_PLATFORMS': 'cpu', **os.environ, 'PYTHONUNBUFFERED': '1', 'JAX_COORDINATOR_ADDRESS': address,
        'JAX_COORDINATOR_BIND_ADDRESS': address,  # by default jax listens to the whole network
        'JAX_NUM_PROCESSES': str(nprocs), 'JAX_PROCESS_ID': str(index),
    }


def wait(group, until):
    """Wait until no process runs, or until() is true."""
    while any(process.status is None for process in group) and not until():
        time.sleep(POLL_S)


def first_failure(group):
    """The process whose failure is the cause of the others', or None. Kills those that still run."""
    failed = [process for process in group if process.failed]
    if not failed:
        return None
    # a process that misses another one ends too, maybe before the end of that other is noticed here
    follows = lambda process: process.status in (-signal.SIGABRT, PEER_LOST)
    end = time.monotonic() + CAUSE_S
    wait(group, lambda: any(process.failed and not follows(process) for process in group)
         or time.monotonic() >= end)
    end = time.monotonic() + PATIENCE_S
    wait(group, lambda: time.monotonic() >= end)
    failed += [process for process in group if process.failed and process not in failed]
    failed.sort(key=follows)
    for process in group:  # SIGTERM would request it to save, which it cannot do alone
        process.send(signal.SIGKILL)
    return failed[0]


def report_failure(dead, group):
    """Print which process died, its status and its last lines. Returns the exit status."""
    end = f'ended with exit status {dead.status}; the others were ended'
    if dead.status < 0:
        end = f'was ended by {signal.Signals(-dead.status).name}; the others were ended'
    if dead.status < 0 or dead.status in (UNWRITABLE, STUCK, PEER_LOST):
        end += '; the same command continues from the last checkpoint'
    print(f'launch: process {dead.index} of {len(group)} {end}', file=sys.stderr)
    lines = list(dead.last_lines)
    if lines and lines[-1].startswith('error: '):  # it says why by itself
        del lines[:-1]
    if not dead.shown and lines and lines[-1] not in group[0].last_lines:
        print('its last lines:', *lines, sep='\n  ', file=sys.stderr)
    return 128 - dead.status if dead.status < 0 else dead.status


def free_port(wanted):
    """The wanted port, or for 0 one that is free."""
    with socket.socket() as probe:
        try:
            probe.bind(('127.0.0.1', wanted))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f'--port {wanted} cannot be used ({error}); leave it out and a free one is taken') from error
        return probe.getsockname()[1]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--nprocs', type=int, required=True, help='number of processes')
    parser.add_argument('--port', type=int, default=0,
                        help='port of this machine where the processes meet; default: a free one')
    parser.add_argument('--all', action='store_true',
                        help='show the output of every process, its number before each line')
    parser.add_argument('script', help='a Python script, such as experiments/extend.py')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='arguments of the script')
    args = parser.parse_args()
    try:
        if args.nprocs < 1:
            raise ValueError(f'--nprocs {args.nprocs} must be at least 1')
        if not pathlib.Path(args.script).is_file():
            raise ValueError(f'script {args.script} does not exist; '
                             'name a Python file, after the flags of launch.py')
        port = free_port(args.port)
    except ValueError as error:
        print('error:', error, file=sys.stderr)
        sys.exit(1)
    sys.exit(run(args.nprocs, [sys.executable, args.script, *args.arguments], port, args.all))


if __name__ == '__main__':
    main()
