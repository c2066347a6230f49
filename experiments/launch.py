"""Start a script as several processes of this machine, which work together through jax.distributed.

    python experiments/launch.py --nprocs 4 experiments/extend.py --config experiments/configs/smoke.py --workdir runs/smoke

What will run on a cluster is rehearsed here, by default on CPUs (set JAX_PLATFORMS for anything else): the devices of
the mesh are shared between the processes. Only the first process is shown. Ctrl-C reaches all of them, once each time
(the first: finish the step and save; the second: stop; the third ends them whatever they do). When one dies the others
are ended, and it is said which died and what it said last.
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

STOPPED = 130  # exit status of a script that was asked to stop and saved
LAST_LINES = 12
PATIENCE_S = 2.0  # for the others to end by themselves, as they do when all found the same mistake


class Process:
    """One of the processes, and the last lines that it said."""

    def __init__(self, index, command, environment, show):
        self.index, self.shown = index, show is not None
        self.last = collections.deque(maxlen=LAST_LINES)
        # a session of its own: the terminal's Ctrl-C must come once, from here
        self.popen = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      text=True, errors='replace', start_new_session=True)
        self._reader = threading.Thread(target=self._read, args=(show,), daemon=True)
        self._reader.start()

    def _read(self, show):
        for line in self.popen.stdout:
            if line.startswith('[Gloo] Rank'):  # how it greets each of its connections
                continue
            self.last.append(line.rstrip('\n'))
            if show is not None:
                print(show + self.last[-1], flush=True)

    @property
    def status(self):
        """Its exit status, a signal as a negative number; None while it runs."""
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


def run(nprocs, script, arguments, port, show_all):
    """Start the processes and stay until all have ended. Returns the exit status."""
    group, asked = [], []

    def forward(number, _frame):
        asked.append(number)
        for process in group:  # one that waits for another hears nothing less than SIGKILL
            process.send(number if len(asked) < 3 else signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    address = f'127.0.0.1:{port}'
    for index in range(nprocs):
        environment = {
            'JAX_PLATFORMS': 'cpu', **os.environ, 'PYTHONUNBUFFERED': '1', 'JAX_COORDINATOR_ADDRESS': address,
            'JAX_COORDINATOR_BIND_ADDRESS': address,  # by default jax listens to the whole network
            'JAX_NUM_PROCESSES': str(nprocs), 'JAX_PROCESS_ID': str(index),
        }
        show = f'[{index}] ' if show_all else '' if index == 0 else None
        group.append(Process(index, [sys.executable, script, *arguments], environment, show))
    while any(process.status is None for process in group) and not any(process.failed for process in group):
        time.sleep(0.05)
    dead = [process for process in group if process.failed]
    if dead:
        patience = time.monotonic() + PATIENCE_S
        while any(process.status is None for process in group) and time.monotonic() < patience:
            time.sleep(0.05)
        # the first is the cause, unless jax aborted it for want of another whose death was seen a moment later
        dead += [process for process in group if process.failed]
        dead.sort(key=lambda process: process.status == -signal.SIGABRT)
        for process in group:  # SIGTERM would ask it to save, which it cannot do alone
            process.send(signal.SIGKILL)
    for process in group:
        process.finish()
    if not dead:
        return max(process.status for process in group)
    if len(asked) > 2 or asked and dead[0].status in (-signal.SIGINT, -signal.SIGTERM):  # before it could listen
        return STOPPED
    return report(dead[0], nprocs)


def report(dead, nprocs):
    """Say which process died, and how. Returns the exit status."""
    how = f'ended with exit status {dead.status}'
    if dead.status < 0:
        how = f'was ended by {signal.Signals(-dead.status).name}'
    print(f'launch: process {dead.index} of {nprocs} {how}; the others were ended', file=sys.stderr)
    if not dead.shown and dead.last:
        print('its last lines:', *dead.last, sep='\n  ', file=sys.stderr)
    return 128 - dead.status if dead.status < 0 else dead.status


def free_port(wanted):
    """The wanted port, or for 0 one that nobody uses."""
    with socket.socket() as probe:
        try:
            probe.bind(('127.0.0.1', wanted))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f'--port {wanted} cannot be used ({error}); leave it out and a free one is taken') from error
        return probe.getsockname()[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--nprocs', type=int, required=True, help='number of processes')
    parser.add_argument('--port', type=int, default=0, help='where they meet, on this machine; default: a free one')
    parser.add_argument('--all', action='store_true', help='show what every process says, with its number before it')
    parser.add_argument('script', help='a Python script, such as experiments/extend.py')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='those of the script')
    args = parser.parse_args()
    try:
        if args.nprocs < 1:
            raise ValueError(f'--nprocs {args.nprocs} must be at least 1')
        if not pathlib.Path(args.script).is_file():
            raise ValueError(f'script {args.script} does not exist; name a Python file, after the flags of launch.py')
        port = free_port(args.port)
    except ValueError as error:
        print('error:', error, file=sys.stderr)
        sys.exit(1)
    sys.exit(run(args.nprocs, args.script, args.arguments, port, args.all))


if __name__ == '__main__':
    main()
