"""The page of results is what its files say, and no figure of the README files stands there alone."""

import pathlib
import re

import results_page

ROOT = pathlib.Path(__file__).parents[1]
PAGE = results_page.RESULTS / 'README.md'
NUMBER = re.compile(r'(?<![\w.,-])\d(?:[\d,.]*\d)?')
SETTINGS = {  # no results: versions, defaults, statuses, published figures, counts of what is in a script
    '2.5', '3.11', '40', '60', '74', '75', '76', '120', '130', '500,000', '4090', '28', '102', '0.005'}


def prose(text: str) -> str:
    """The text without code, links and what is generated."""
    text = re.sub(r'<!-- flags.*?<!-- end of flags -->|## Sources.*', '', text, flags=re.DOTALL)
    return re.sub(r'```.*?```|`[^`]*`|\]\([^)]*\)', '', text, flags=re.DOTALL)


def test_the_page_is_what_the_script_writes():
    assert PAGE.read_text() == results_page.page(), 'run experiments/checks/results_page.py --write'


def test_every_number_of_the_readmes_is_on_the_page():
    known = set(NUMBER.findall(PAGE.read_text())) | SETTINGS
    for path in (ROOT / 'README.md', ROOT / 'experiments' / 'README.md'):
        text = prose(path.read_text())
        unknown = [(number, line) for line in text.splitlines() for number in NUMBER.findall(line)
                   if number not in known]
        assert not unknown, f'{path}: numbers without a file; add them to checks/results_page.py: {unknown}'


def test_results_in_tables_are_files_and_words():
    rows = [line for line in (ROOT / 'experiments' / 'README.md').read_text().splitlines()
            if line.startswith('| `') and not line.startswith('| `--')]
    assert len(rows) > 80
    for row in rows:
        result = prose(re.split(r'(?<!\\)\|', row)[-2])
        assert not NUMBER.search(result), f'a figure belongs on the page: {row}'


def test_every_file_of_results_is_on_the_page_or_in_a_table():
    text = PAGE.read_text() + (ROOT / 'experiments' / 'README.md').read_text()
    for path in results_page.RESULTS.rglob('*.json*'):
        name = path.relative_to(results_page.RESULTS).as_posix()
        assert name in text or name.startswith('compile_') or path.parent.name == 'smollm2', name
