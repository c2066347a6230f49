"""Tables line up, token counts read as people write them."""

import pytest

from lct.text import (
    aligned,
    divisors_near,
    markdown_table,
    multiples_near,
    parse_length,
    short_length,
    table,
)


def test_columns_line_up_and_rules_set_header_and_totals_apart():
    assert table(('case', 's', 'note'), [('one', 1.5, 'x'), ('eleven', 10, ''), ('total', 11.5, '')],
                 left=(0, 2),
                 footer=1).splitlines() == [
        'case       s  note', '-' * 18, 'one      1.5  x', 'eleven    10', '-' * 18, 'total   11.5']
    assert aligned(('a', 1), (3, 4)) == 'a       1'
    assert markdown_table(('model', '1K'), [('base', 3)]) == '| model | 1K |\n|:--|--:|\n| base | 3 |'


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError):
        table(('a', 'b'), [(1,)])


@pytest.mark.parametrize(('text', 'length'), [('1M', 2**20), ('64k', 2**16), ('1000', 1000), ('12', 12)])
def test_lengths_are_read(text, length):
    assert parse_length(text) == length


@pytest.mark.parametrize('text', ['1.5K', '0', '1G', '', '-1', 'K'])
def test_other_texts_are_no_length(text):
    with pytest.raises(ValueError, match='not a number of tokens; write 1048576, 1M or 64K'):
        parse_length(text)


def test_lengths_are_written_short_and_read_back():
    assert [short_length(n) for n in (12, 1024, 1536, 131072, 2**20)] == ['12', '1K', '1.5K', '128K', '1M']
    assert all(parse_length(short_length(2**n)) == 2**n for n in range(25))


def test_the_nearest_values_that_divide():
    assert [multiples_near(n, 16) for n in (1000, 15, 17)] == ['992 or 1008', '16', '16 or 32']
    assert [divisors_near(n, d) for n, d in ((128, 3), (2, 4), (12, 5), (7, 2))] == [
        '2 or 4', '2', '4 or 6', '1 or 7']
