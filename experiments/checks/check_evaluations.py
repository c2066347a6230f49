"""Random evaluations of a tiny model beside a plain rerun: same rows, same scores, nothing lost.

    python experiments/checks/check_evaluations.py --evaluations 500 --kills 20 --output FILE

An evaluation is a work directory and one to three calls of evaluate.py with random suites, tasks, lengths and
samples, each on a random mesh with a random --batch-tokens and --piece, every other one with a --session that
all evaluations share. Many are interrupted: by a signal at a random moment, in the middle of a line, by a
full disk, some by a real SIGKILL. An interrupted call is repeated with other flags until it ends. Then every
row, the scores and the table are compared with those of plain_evaluation.py, which answers one sample and
makes one whole forward pass at a time.
The model is experiments/base with more positions. Set JAX_COMPILATION_CACHE_DIR.
"""

import argparse
import collections
import contextlib
import csv
import io
import json
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback

import jax
import numpy as np
from drill import CHECKS, start
from evaluation_place import Call, Place
from plain_evaluation import TIE, difference

from lct.cli import prefixes as disk_prefixes
from lct.eval import answers, prefixes
from lct.eval.results_file import strict
from lct.eval.suites import SUITES

# Caches of one size and batches of one or two rows: most of the time goes into compilation.
LENGTHS, SEEDS = (384, 512), (1,)
MESHES = ('1,1,1,1', '1,1,1,1', '1,1,2,1')
BATCH_TOKENS, CHUNKS = (512, 1024), (None, None, 128)
SESSION_GB, MIN_TOKENS = 0.02, 32  # few, so that texts are deleted, and worth a file
FAULTS = ('none', 'none', 'none', 'signal', 'signal', 'torn line', 'full disk')
INFEASIBLE = 0.05  # of the calls may be too short for their tasks, and must then change nothing
MESH_DEPENDENT = 'adversarial'  # its needles straddle the shards of the sequence axis


class Stopped(BaseException):
    """A process that ends in the middle of a line."""


class Differs(Exception):
    """What is not as in the plain rerun."""


# ---------------------------------------------------------------------------------------------------
# One evaluation
# ---------------------------------------------------------------------------------------------------


class Evaluation:
    """A work directory, its random calls, and what they should have left in it."""

    def __init__(self, place: Place, number: int, first_seed: int, counts: collections.Counter):
        self.place, self.counts = place, counts
        self.rng = random.Random(f'{first_seed}/{number}')
        self.kind = self.rng.choice(['text', 'text', 'text', 'code', 'own'])
        self.seed, self.workdir = self.rng.choice(SEEDS), place.folder / 'run'
        self.items = collections.defaultdict(dict)  # {suite: {key: item}}
        self.loss_plan, self.loss_keys, self.log = None, {}, []

    def run(self, kill: bool) -> None:
        shutil.rmtree(self.workdir, ignore_errors=True)
        for number in range(self.rng.choice((1, 2, 3))):
            call = self.random_call()
            fits = self.place.fits(self.kind, self.seed, call)
            fault = 'kill' if kill and not number else self.rng.choice(FAULTS) if fits else 'none'
            if not fits:
                self.refused(call)
                continue
            while fault != 'none':
                self.log.append(f'{call} with {fault}')
                if self.faulty(call, fault):
                    break
                fault = self.rng.choice(FAULTS)
            else:
                self.log.append(f'{call}')
                self.call(call)
            self.expect(call)
        self.compare()

    def random_call(self) -> Call:
        if self.kind == 'own':
            tasks = self.rng.choice([(), ('letters',), ('letters', 'digits')])
            return Call(('own',), tasks, LENGTHS[:1], self.rng.choice((1, 3, 6)), MESHES)
        known = [name for name, suite in SUITES.items() if not suite.needs_data
                 and (name == 'repository') <= (self.kind == 'code')]
        want_fitting = self.rng.random() >= INFEASIBLE
        while True:
            chosen = tuple(sorted(self.rng.sample(known, self.rng.choice((1, 1, 2)))))
            known_tasks = [SUITES[name].tasks for name in chosen if SUITES[name].tasks]
            tasks = [self.rng.sample(one, min(len(one), self.rng.choice((1, 2)))) for one in known_tasks]
            lengths = tuple(sorted(self.rng.sample(LENGTHS, self.rng.choice((1, 2)))))
            meshes = tuple(mesh for mesh in MESHES if MESH_DEPENDENT not in chosen or mesh != '1,1,2,1')
            call = Call(chosen, tuple(sorted(sum(tasks, []))), lengths, self.rng.choice((1, 2)), meshes)
            if not want_fitting or self.place.fits(self.kind, self.seed, call):
                return call

    def arguments(self, call: Call) -> list[str]:
        """The flags of a call with a random mesh, --batch-tokens, --piece and --session."""
        chunk = self.rng.choice(CHUNKS)
        session = ['--session', str(self.place.folder / 'texts'), '--session-gb', str(SESSION_GB)]
        return [
            '--model', str(self.place.folder / 'model'), '--workdir', str(self.workdir), '--seed',
            str(self.seed), '--suite', ','.join(call.suites), '--lengths', ','.join(map(str, call.lengths)),
            '--samples', str(call.samples), '--mesh', self.rng.choice(call.meshes), '--batch-tokens',
            str(self.rng.choice(BATCH_TOKENS)), *(['--tasks', ','.join(call.tasks)] if call.tasks else []),
            *(['--piece', str(chunk)] if chunk else []), *self.rng.choice(([], session)),
            *self.place.flags(self.kind)]

    def call(self, call: Call) -> None:
        """Run a call in this process."""
        self.counts['calls'] += 1
        sys.argv = ['evaluate.py', *self.arguments(call)]
        output, began = io.StringIO(), time.monotonic()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            self.place.main()
        self.place.seconds = time.monotonic() - began
        reused = re.findall(r'([\d,]+) of [\d,]+ tokens reused', output.getvalue())
        self.counts['tokens reused'] += sum(int(number.replace(',', '')) for number in reused)
        lost = [line for line in output.getvalue().splitlines() if 'holds' in line and 'answers' in line]
        if lost:
            raise Differs(f'an evaluation says {lost[0]}')

    def refused(self, call: Call) -> None:
        """A call that does not fit is refused in a sentence before it changes anything."""
        before = contents(self.workdir)
        try:
            self.call(call)
        except ValueError:
            self.counts['refused'] += 1
        else:
            raise Differs(f'{call} was not refused')
        if contents(self.workdir) != before:
            raise Differs(f'{call} was refused, but changed the work directory')

    def faulty(self, call: Call, fault: str) -> bool:
        """Run a call that a fault may stop; whether it reached its end."""
        try:
            if fault == 'kill':
                ended = self.killed(call)
            elif fault == 'signal':
                ended = self.signalled(call)
            else:
                ended = self.at_an_answer(call, fault)
        except (KeyboardInterrupt, Stopped, OSError):
            ended = False
        self.counts[fault if not ended else f'{fault}, too late'] += 1
        return ended

    def signalled(self, call: Call) -> bool:
        signal.setitimer(signal.ITIMER_REAL, self.rng.uniform(0, 1.2) * self.place.seconds)
        try:
            self.call(call)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return True

    def at_an_answer(self, call: Call, fault: str) -> bool:
        """Stop a call in the middle of a line, or with a full disk, at one of its first answers."""
        left, append = [self.rng.randrange(1, 9)], answers.append

        def broken(file, row, identity=''):
            left[0] -= 1
            if left[0]:
                append(file, row, identity)
            elif fault == 'full disk':
                raise OSError(28, 'No space left on device', file.name)
            else:
                line = json.dumps(row)
                file.write(line[:self.rng.randrange(len(line))])
                file.flush()
                raise Stopped

        answers.append = broken
        try:
            self.call(call)
        finally:
            answers.append = append
        return True

    def killed(self, call: Call) -> bool:
        """SIGKILL a process of its own after a random number of answers."""
        command = [CHECKS.parent / 'evaluate.py', *self.arguments(call)]
        process, lines = start(command, {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}), self.rng.randrange(6)
        while process.poll() is None and sum(
                path.read_bytes().count(b'\n') for path in self.workdir.glob('*.jsonl')) < lines:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return process.returncode == 0

    # -----------------------------------------------------------------------------------------------
    # Comparison
    # -----------------------------------------------------------------------------------------------

    def expect(self, call: Call) -> None:
        """Note what a call that ended must have left."""
        plan = self.place.plan(self.kind, self.seed, call)
        for name in call.suites:
            if name == 'loss':
                self.loss_plan = plan
                keys = [('loss', max(plan.lengths), i) for i in range(call.samples)]
                self.loss_keys |= dict.fromkeys(keys)
            else:
                self.items[name] |= {item.key: item for item in SUITES[name].items(plan)}
                self.items[name, 'plan'] = plan

    def compare(self) -> None:
        names = [name for name in self.items if isinstance(name, str)]
        results = {}
        if names or self.loss_plan:
            results = json.loads((self.workdir / 'results.json').read_text())['results']
        wanted = {*names, *(['loss'] if self.loss_plan else [])}
        if {*results} != wanted:
            raise Differs(f'results.json tells of {sorted(results)}, not of {sorted(wanted)}')
        for name in names:
            rows = self.compare_rows(name)
            self.compare_scores(name, rows, results[name])
        if self.loss_plan:
            self.compare_losses(results['loss'])
        left = [path.name for path in self.workdir.glob('.*')]
        if left:
            raise Differs(f'temporary files are left: {left}')

    def kept(self, name: str, keys) -> dict:
        """The rows of a suite on disk, which must be those of the keys, in order."""
        path = self.workdir / f'{name}.jsonl'
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [row for row in lines if name != 'loss' or row['task'] == 'loss']  # not 'identifiers'
        found = [answers.key_of(row) for row in lines]
        if found != sorted(keys):
            raise Differs(f'{path.name} has {len(found)} rows, not {len(keys)}, the first not in common '
                          f'{sorted({*found} ^ {*keys})[:1]}')
        self.counts['rows'] += len(lines)
        return dict(zip(found, lines, strict=True))

    def compare_rows(self, name: str) -> list[dict]:
        """The rows of a suite as the plain model gives them."""
        found, out = self.kept(name, self.items[name]), []
        for key, item in self.items[name].items():
            plain, margin = self.place.plain.answer((self.kind, name, self.seed), item, found[key]['text'])
            plain = json.loads(json.dumps(plain))
            if differs := difference(found[key], plain):
                if margin > TIE:
                    raise Differs(f'{name} {key}: {differs}; the second choice is {margin:.4f} behind')
                self.counts['rows with near ties'] += 1
                plain |= {field: found[key][field] for field in plain}
            out.append(plain)
        return SUITES[name].in_order(out)

    def compare_scores(self, name: str, rows: list[dict], found: dict) -> None:
        """The result and the table of a suite beside those of the plain rows."""
        suite, plan = SUITES[name], self.items[name, 'plan']
        plain = json.loads(json.dumps(strict({'count': len(rows), **suite.scores(plan, rows)})))
        if differs := difference(found, plain) or difference(plain, found):
            raise Differs(f'results.json, {name}{differs}')
        with (self.workdir / 'results.csv').open(newline='') as file:
            table = [row for row in csv.DictReader(file) if row['suite'] == name]
        means = collections.defaultdict(list)
        for row in rows:
            means[row['task'], str(row['length'])].append(suite.row_score(row))
        for (task, length), scores in means.items():
            cells = [row for row in table if row['task'] == task and row['at'] == length]
            right = len(cells) == 1 and int(cells[0]['count']) == len(scores) and np.isclose(
                float(cells[0]['score']), np.mean(scores), atol=1e-4)
            if name not in ('icl', 'needle') and not right:
                raise Differs(f'results.csv has {cells} for {task} at {length}, plainly {np.mean(scores)}')
            self.counts['scores'] += 1

    def compare_losses(self, result: dict) -> None:
        found, plain = self.kept('loss', self.loss_keys), self.place.plain.loss_rows(self.loss_plan)
        for row in plain:
            # Losses near the bounds of a key token may fall on either side.
            meta = {**row['meta']}
            key, total = meta.pop('key'), meta.pop('key_loss')
            kept = found[answers.key_of(row)]
            differs = difference(kept, json.loads(json.dumps(strict({**row, 'meta': meta}))))
            if differs or abs(kept['meta']['key'] - key) > 1 or abs(kept['meta']['key_loss'] - total) > 2.1:
                raise Differs(f'loss {answers.key_of(row)}: {differs}, key tokens {kept["meta"]["key"]}, '
                              f'plainly {key}')
        by_document = collections.defaultdict(list)
        for row in plain:
            by_document[row['document']].append(row['meta']['means'])
        means = np.mean([np.mean(one, 0) for one in by_document.values()], 0)
        if not np.allclose(result['mean'], means, atol=1e-3) or result['num_windows'] != len(plain):
            raise Differs(f'results.json, loss {result["mean"]} of {result["num_windows"]} windows, plainly '
                          f'{means.tolist()} of {len(plain)}')
        self.counts['scores'] += len(means)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--evaluations', type=int, default=500)
    parser.add_argument('--kills', type=int, default=20, help='evaluations with a real SIGKILL')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, help='the number of one evaluation')
    parser.add_argument('--output', type=pathlib.Path, help='for the result as JSON')
    args = parser.parse_args()
    jax.config.update('jax_num_cpu_devices', 2)
    jax.config.update('jax_disable_most_optimizations', True)  # compiled quickly
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    disk_prefixes.MIN_TOKENS = prefixes.MIN_TOKENS = MIN_TOKENS
    with tempfile.TemporaryDirectory() as folder:
        result = check(args, Place(pathlib.Path(folder)))
    print(json.dumps(result, indent=1))
    raise SystemExit(bool(result['different']))


def check(args, place):
    """Run all evaluations; the result for --output."""
    counts, different, began = collections.Counter(), [], time.monotonic()
    numbers = range(args.evaluations) if args.only is None else [args.only]
    for number in numbers:
        one = Evaluation(place, number, args.seed, counts)
        try:
            one.run(number >= args.evaluations - args.kills)
        except Differs as differs:
            different.append({'evaluation': number, 'what': str(differs), 'calls': one.log})
        except Exception as error:
            traceback.print_exc()
            different.append({'evaluation': number, 'what': repr(error), 'calls': one.log})
        result = {'evaluations': number + 1, 'counts': dict(sorted(counts.items())), 'different': different}
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + '\n')
        print(f'{number + 1} of {args.evaluations}, {len(different)} different, '
              f'{time.monotonic() - began:.0f} s', file=sys.stderr, flush=True)
    return result


if __name__ == '__main__':
    main()
