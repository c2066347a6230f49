"""The flags of all scripts that a user runs, as the table in experiments/README.md.

    python experiments/checks/flag_table.py          # prints it
    python experiments/checks/flag_table.py --write  # replaces it in experiments/README.md

tests/test_flags.py compares the two.
"""

import argparse
import collections
import functools
import importlib
import pathlib
import sys

EXPERIMENTS = pathlib.Path(__file__).parents[1]
BEGIN, END = '<!-- flags: written by checks/flag_table.py -->', '<!-- end of flags -->'
ENTRIES = ('main', 'run', 'parse_args', 'flags')  # the function of a script that parses its flags


LONG, PIPE = 160, '\\|'  # characters of a meaning; a pipe within a cell


class Parsed(Exception):
    """Raised in place of parsing, with the parser."""


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser of a script, before it parses anything."""
    def stop(self, *args, **kwargs):
        raise Parsed(self)

    module = importlib.import_module(script)
    entry = next(getattr(module, name) for name in ENTRIES if hasattr(module, name))
    original, argv = argparse.ArgumentParser.parse_args, sys.argv
    argparse.ArgumentParser.parse_args, sys.argv = stop, [f'{script}.py']
    try:
        entry()
    except Parsed as parsed:
        return parsed.args[0]
    finally:
        argparse.ArgumentParser.parse_args, sys.argv = original, argv
    raise ValueError(f'{script}.py has no function of {", ".join(ENTRIES)} that parses flags')


def scripts() -> list[str]:
    """The names of all scripts in experiments/, without those in its folders."""
    return sorted(path.stem for path in EXPERIMENTS.glob('*.py'))


@functools.cache
def flags() -> list[tuple[str, str, str]]:
    """[(flag, script, what it says about it)]."""
    found = []
    for script in scripts():
        for action in parser_of(script)._actions:
            if action.option_strings and '--help' not in action.option_strings:
                help_text = ' '.join((action.help or '').split()) % {'default': action.default}
                if not help_text and action.choices:
                    help_text = ', '.join(map(str, action.choices))
                found.append((action.option_strings[0], script, help_text))
    return found


def table() -> str:
    """The table in markdown: a flag, what most scripts say about it, and the scripts that have it."""
    found = {}
    for flag, script, text in flags():
        found.setdefault(flag, {})[script] = text
    lines = ['| flag | meaning | scripts |', '|:--|:--|:--|']
    for flag, by_script in sorted(found.items()):
        meanings = collections.Counter(by_script.values())
        meaning = max(meanings, key=lambda text: (bool(text), len(text) <= LONG, meanings[text], len(text)))
        meaning = meaning if len(meaning) <= LONG else meaning[:LONG].rpartition(' ')[0] + ' ...'
        lines.append(f'| `{flag}` | {meaning.replace("|", PIPE)} | {", ".join(sorted(by_script))} |')
    return '\n'.join(lines)


def in_readme() -> tuple[str, str, str]:
    """experiments/README.md as (text before the table, the table, text after it)."""
    text = (EXPERIMENTS / 'README.md').read_text()
    before, _, rest = text.partition(BEGIN + '\n')
    inside, _, after = rest.partition('\n' + END)
    return before + BEGIN + '\n', inside, '\n' + END + after


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--write', action='store_true')
    args = parser.parse_args()
    if args.write:
        before, _, after = in_readme()
        (EXPERIMENTS / 'README.md').write_text(before + table() + after)
    else:
        print(table())


if __name__ == '__main__':
    sys.path.insert(0, str(EXPERIMENTS))
    main()
