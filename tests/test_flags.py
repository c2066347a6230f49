"""The flags of all scripts: the table in experiments/README.md is current, one spelling for one meaning."""

import collections

import flag_table
import pytest

from lct.cli.model import parse_lengths

SECOND_SPELLINGS = {  # of one meaning, not to come back
    '--out': '--output', '--json': '--output', '--results': '--output', '--recipe': '--config',
    '--field': '--text-field', '--max-length': '--length', '--batch': '--rows'}


@pytest.fixture(scope='module')
def rows():
    return flag_table.flags()


def test_the_table_is_what_the_script_writes():
    assert flag_table.in_readme()[1] == flag_table.table(), 'run experiments/checks/flag_table.py --write'


def test_every_flag_says_what_it_means_and_no_two_mean_the_same(rows):
    meanings = collections.defaultdict(set)
    for flag, script, text in rows:
        assert text, f'{flag} of {script}.py has no help'
        meanings[text].add(flag)
    assert {text: flags for text, flags in meanings.items() if len(flags) > 1} == {}


def test_one_spelling_for_one_meaning(rows):
    assert [(flag, script) for flag, script, _ in rows if flag in SECOND_SPELLINGS] == []


def test_lengths_are_refused_with_how_to_write_them(capsys):
    assert parse_lengths('--lengths', '8K,1M,100') == (8192, 2**20, 100)
    with pytest.raises(ValueError, match='--lengths 8Q must be lengths in tokens, such as 8K,64K'):
        parse_lengths('--lengths', '8Q')
    with pytest.raises(SystemExit):
        flag_table.parser_of('ask').parse_args(['--length', '64Q', '--model', 'base', '--files', 'x'])
    assert "'64Q' is not a number of tokens; write 1048576, 1M or 64K" in capsys.readouterr().err
