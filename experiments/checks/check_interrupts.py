"""Interrupts ask.py at random moments; after each one the next question must get its right answer.

    python experiments/checks/check_interrupts.py --interrupts 200

Every process gets questions through a pipe and one SIGINT after each, at a random moment of starting, reading
or answering; half of the readings that were interrupted are interrupted again when the next question
continues them. A SIGINT before the model is loaded may end the process; then the next one must answer. The
model is experiments/base with more positions.
"""

import argparse
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1]
QUESTION, PROBE = 'What is the second function for?', 'What does add return?'
PER_PROCESS = 5  # interrupts
POSITIONS, FUNCTIONS = 20_480, 350  # a text that takes some seconds to read
LIMIT_S = 300
ANSWERED, STOPPED = 'tokens answered', 'stopped'


class Ask:
    """A running ask.py. seen: its lines so far, of stdout and stderr together."""

    def __init__(self, folder: pathlib.Path, session: bool):
        command = [sys.executable, EXPERIMENTS / 'ask.py', '--model', folder / 'model', '--files',
                   folder / 'files', '--max-new-tokens', '12', '--piece', '64']
        command += ['--session', folder / 'session'] if session else []
        self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=1)
        self.lines, self.position = [], 0
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def send(self, question: str) -> None:
        self.process.stdin.write(question + '\n')
        self.process.stdin.flush()

    def wait(self, mark: str) -> list[str]:
        """The lines up to the next one with the mark; fewer if the process ends."""
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            new = self.lines[self.position:]
            at = next((i for i, line in enumerate(new) if mark in line), None)
            if at is not None:
                self.position += at + 1
                return new[:at + 1]
            if self.process.poll() is not None and len(self.lines) == self.position + len(new):
                return new
            time.sleep(0.01)
        raise SystemExit(f'no line with {mark!r} within {LIMIT_S} s; the last lines are {self.lines[-5:]}')

    def answer(self, question: str) -> str:
        """The answer to a question."""
        self.send(question)
        lines = self.wait(ANSWERED)
        if not lines or ANSWERED not in lines[-1]:
            raise SystemExit(f'no answer after an interrupt; the last lines are {self.lines[-8:]}')
        text = ''.join(lines)
        return text[text.rindex(question):text.rindex('\n', 0, len(text) - 1)]

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(LIMIT_S)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--interrupts', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=pathlib.Path, help='JSON of the result')
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it, also for ask.py
    with tempfile.TemporaryDirectory() as folder:
        check(args, pathlib.Path(folder))


def check(args, folder):
    make_inputs(folder)
    Ask(folder, session=False).end()  # compiles
    start, first = time.monotonic(), Ask(folder, session=False)
    first.wait('read ')
    seconds_to_read = time.monotonic() - start
    expected = first.answer(PROBE)
    start = time.monotonic()
    first.answer(QUESTION)
    seconds_to_answer = time.monotonic() - start
    first.end()
    rng, counts, done = random.Random(args.seed), dict.fromkeys(('starting', 'reading', 'answering'), 0), 0
    while done < args.interrupts:
        if rng.random() < 0.7:  # the others find what an earlier process read
            shutil.rmtree(folder / 'session', ignore_errors=True)
        ask, is_read, phase = Ask(folder, session=bool(done // PER_PROCESS % 2)), False, ''
        for i in range(min(PER_PROCESS, args.interrupts - done)):
            if i:
                ask.send(QUESTION)
            time.sleep(rng.uniform(0, 1.2) * (seconds_to_answer if is_read else seconds_to_read))
            ask.process.send_signal(signal.SIGINT)
            done += 1
            lines = ask.wait(STOPPED)
            phase = phase_of(lines, is_read, i)
            counts[phase] += 1
            if not any('the next question' in line for line in lines):  # not yet ready for one: it ends
                ask.process.wait(LIMIT_S)
                ask = Ask(folder, session=True)
            elif phase == 'reading' and rng.random() < 0.5:
                continue
            if ask.answer(PROBE) != expected:
                raise SystemExit(f'another answer after interrupt {done}: {ask.lines[-12:]}')
            is_read = True
        if not is_read and ask.answer(PROBE) != expected:
            raise SystemExit(f'another answer after interrupt {done}: {ask.lines[-12:]}')
        ask.end()
        print(f'{done} interrupts: {counts}', flush=True)
    print(f'after the interrupts the next question got its right answer: {done} interrupts, {counts}')
    if args.output:
        args.output.write_text(json.dumps({'interrupts': done, 'seed': args.seed, 'while': counts}) + '\n')


def phase_of(lines, was_read, number):
    """What was interrupted, by the lines before the interrupt."""
    if was_read or any(line.startswith('read ') for line in lines):
        return 'answering'
    return 'reading' if number or any(line.startswith('reading') for line in lines) else 'starting'


def make_inputs(folder):
    """The model with positions for a text that takes a while, and the text."""
    shutil.copytree(EXPERIMENTS / 'base', folder / 'model')
    config = json.loads((folder / 'model' / 'config.json').read_text()) | {
        'max_position_embeddings': POSITIONS}
    (folder / 'model' / 'config.json').write_text(json.dumps(config))
    (folder / 'files').mkdir()
    for i in range(2):
        body = ''.join(f'def f{i}_{j}(left, right):\n    return left * {j} + right\n\n'
                       for j in range(FUNCTIONS))
        (folder / 'files' / f'{i}.py').write_text(body)


if __name__ == '__main__':
    main()
