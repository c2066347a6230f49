"""Break training runs on purpose and check what they do: one line per drill.

    python experiments/checks/drills.py [--only 1,6,8] [--workdir runs/drills]

Each drill trains a tiny model on virtual CPU devices, causes one fault (a killed process, a flipped bit, a
full disk, a lost peer) and prints its number, the fault, what happened, and pass or fail. Drills that need
what this machine lacks are listed. Exit status 1 if a drill failed.
"""

import argparse
import importlib
import json
import pathlib
import shutil
import signal
import time

from drill import CHECKS, DRILLS, Failed, NotHere


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', help='numbers of the drills to run, such as 1,6,8; default: all')
    parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/drills'))
    parser.add_argument('--output', type=pathlib.Path, help='write the rows as JSON')
    args = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the drilled processes would ignore it
    for path in sorted(CHECKS.glob('drill_*.py')):
        if path.name != 'drill_training.py':
            importlib.import_module(path.stem)
    chosen = {int(number) for number in args.only.split(',')} if args.only else None
    rows = []
    for index, drill in enumerate(sorted(DRILLS, key=lambda drill: drill.number)):
        if chosen is None or drill.number in chosen:
            rows.append(run(drill, args.workdir / f'{drill.number:02d}_{index}'))
            if args.output:
                args.output.write_text(json.dumps(rows, indent=1))
    counts = {result: sum(row['result'] == result for row in rows) for result in ('pass', 'FAIL', 'not here')}
    print(', '.join(f'{count} {result}' for result, count in counts.items()))
    raise SystemExit(counts['FAIL'] > 0)


def run(drill, folder):
    """Run one drill in a fresh folder, print its line, and return it as a dict."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began, result = time.monotonic(), 'pass'
    try:
        happened = drill.function(folder)
    except NotHere as missing:
        happened, result = str(missing), 'not here'
    except Failed as failed:
        happened, result = str(failed), 'FAIL'
    except Exception as error:
        happened, result = f'the drill itself broke: {type(error).__name__}: {error}', 'FAIL'
    if result != 'FAIL':
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - began
    print(f'{drill.number:2d} | {drill.fault} | {happened} | {result} | {seconds:.0f} s', flush=True)
    return {'number': drill.number, 'fault': drill.fault, 'happened': happened, 'result': result}


if __name__ == '__main__':
    main()
