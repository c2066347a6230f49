"""Results of suites as cells of a CSV, tables, figures and sentences, and the page made of them."""

import json
import math
import pathlib
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from lct.eval import answers, results_file, scoring
from lct.eval.report import html as html_report
from lct.eval.report import svg, tables
from lct.eval.samples import Sample
from lct.eval.suites import SUITES
from lct.eval.suites.plan import Plan

SMOLLM2 = pathlib.Path(__file__).parents[1] / 'experiments' / 'results' / 'smollm2'
REPORT = {
    'about': {'model': 'm'}, 'trained': 1024, 'samples': {'1024': 2}, 'results': {
        'adversarial': {'tasks': {'latest': {'1024': {
            'target': 0.5, 'stale': 0.25, 'mixed': 0.25, 'none': 0, 'interval': [0.2, 0.8], 'count': 4}}}},
        'icl': {'tasks': {'parity': {
            'curve': dict.fromkeys(
                '124', {'accuracy': 0.5, 'interval': [0.3, 0.7], 'count': 8, 'gain': None}),
            'chosen': dict.fromkeys(
                '124', {'accuracy': 0.75, 'interval': [0.5, 0.9], 'count': 8, 'gain': 0.25}),
            'chance': 0.25, 'references': {'elimination': {'1': 0.5, '2': 0.75, '4': 1.0}}}}},
        'repository': {'tasks': {'defines': {'1024': {'mean': 50.0, 'interval': None, 'count': 4}}}},
        'loss': {
            'edges': [0, 64, 128], 'mean': [3.0, 2.5], 'stderr': [None, None], 'num_windows': 1,
            'documents': 1,
            'growing': {'contexts': [64, 112], 'targets': 16, 'mean': [2.75, 2.25], 'stderr': [0.5, None],
                        'effective_context': 112},
            'identifiers': {'edges': [1, 64, 128, 256], 'mean': [1.25, None, 4.5], 'counts': [8, 0, 1000],
                            'stderr': [0.125, None, None], 'bundles': [3, 0, 1]},
            'border': {'edges': [0, 1, 2], 'mean': [2.5, 2.625], 'stderr': [None, None], 'num_windows': 1,
                       'documents': 1},
            'long_ppl': {'key_tokens': 5, 'of': 128, 'context': 32, 'value': 4.25, 'nats': math.log(4.25),
                         'stderr': 0.1, 'documents': 5},
            'short': {'length': 64, 'extended': 2.5, 'base': 2.25, 'difference': 0.25, 'stderr': 0.125,
                      'num_windows': 2, 'documents': 2},
        },
    },
}


def test_every_suite_has_its_figure_table_and_cells():
    page = html_report.page(REPORT)
    for drawing in re.findall('<svg.*?</svg>', page, re.DOTALL):
        ElementTree.fromstring(drawing)
    assert page.count('<svg') == 6 and '50 right, 25 misled' in page and 'model chooses' in page
    assert 'since one round of the labels: choosing +25<' in page
    assert 'over bundles of this repository' in page
    assert 'elimination' in page and '3.000' in page
    assert [cell[:2] for cell in tables.cells(REPORT)] == [
        ('adversarial', 'latest'), *[('icl', 'parity')] * 3, *[('icl', 'parity_chosen')] * 3,
        ('repository', 'defines'), *[('loss', 'loss')] * 2, *[('loss', 'growing')] * 2,
        *[('loss', 'border')] * 2, *[('loss', 'identifiers')] * 2, ('loss', 'long_ppl'), ('loss', 'short')]
    text = tables.terminal(REPORT)
    for phrase in (
            '50 right, 25 misled', 'parity_chosen', 'all questions are about one text',
            'nats per token, the same 16  2.750  2.250', '1,000',
            'is lowest, 2.250 nats, after 112 tokens of context; 112 tokens come within 1%',
            'on 5 of 128 tokens', 'at most 7.39',
            'all windows come from one document, so the error of these means is unknown', '(documents: 2)',
            '2.5000 nats, the base model 2.2500, difference +0.2500 ± 0.1250'):
        assert phrase in text and phrase.partition('  ')[0] in page


def test_figures_can_be_read_by_everyone():
    page = html_report.page(REPORT)
    drawings = re.findall('<svg.*?</svg>', page, re.DOTALL)
    assert all(re.match(r'<svg role="img" aria-label="[^"]+"', drawing) for drawing in drawings)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len({*ids}) and {*re.findall(r'url\(#([^)]+)', page)} <= {*ids}
    labels = [label for drawing in drawings for label in re.findall(r'>([^<>]+)</text>', drawing)]
    assert {'trained to 1K', '128', 'chance'} <= {*labels} and '90.5097' not in labels
    assert 'var(--ink, #10241F)' in page and '--ink:#E4ECE9' in page
    # Each line has its own dash or marker, so that none hides another.
    series = {name: ([1, 2], [0.5, 0.5], None) for name in 'abc'}
    lines = re.findall(r'stroke-dasharray: ([^;]+);[^"]*stroke-width: ([^;"]+)',
                       svg.curves(series, 'x', 'y').text)
    assert len({*lines}) >= 3
    assert svg.powers_of_two(8, 1024) == [2**i for i in range(3, 11)] and svg.powers_of_two(90.5, 100) == [90]
    assert len(svg.powers_of_two(1, 2**40)) <= 12


def test_committed_results_give_the_committed_csv(tmp_path):
    tables.write_csv(tmp_path / 'results.csv', json.loads((SMOLLM2 / 'results.json').read_text()))
    assert (tmp_path / 'results.csv').read_bytes() == (SMOLLM2 / 'results.csv').read_bytes()


def test_intervals_of_losses_follow_students_t():
    one = {**REPORT['results']['loss'], 'documents': 4}
    found = {cell[1:3]: cell[3:6] for cell in tables.cells({'results': {'loss': one}})}
    # Two-sided 95% points of the published tables, by degrees of freedom.
    t = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    assert found['growing', 64] == pytest.approx((2.75, 2.75 - t[3] * 0.5, 2.75 + t[3] * 0.5), abs=1e-3)
    assert found['short', 64] == pytest.approx((0.25, 0.25 - t[1] * 0.125, 0.25 + t[1] * 0.125), abs=1e-3)
    assert found['identifiers', 1] == pytest.approx(
        (1.25, 1.25 - t[2] * 0.125, 1.25 + t[2] * 0.125), abs=1e-3)
    assert found['long_ppl', 32] == pytest.approx(
        (4.25, 4.25 * math.exp(-t[4] / 10), 4.25 * math.exp(t[4] / 10)), abs=1e-2)
    assert found['growing', 112] == (2.25, '', '') and found['identifiers', 128] == (4.5, '', '')
    assert 'perplexity 4.25 (95% interval 3.22 to 5.61)' in ' '.join(SUITES['loss'].sentences(one))


def test_intervals_stay_above_what_is_possible():
    loss = {'edges': [0, 64], 'mean': [1.0], 'stderr': [0.5], 'num_windows': 2, 'documents': 2,
            'long_ppl': {'key_tokens': 5, 'of': 128, 'context': 32, 'value': 1.5, 'nats': math.log(1.5),
                         'stderr': 0.2, 'documents': 2},
            'identifiers': {'edges': [1, 64], 'mean': [1.25], 'counts': [8]},  # of an earlier version
            'short': {'length': 64, 'extended': 2.5, 'base': 2.25, 'difference': 0.25, 'stderr': 0.125,
                      'num_windows': 2, 'documents': 2}}
    low = {cell[1]: cell[4] for cell in tables.cells({'results': {'loss': loss}})}
    assert low['loss'] == 0 and low['long_ppl'] == 1 and low['short'] < -1 and low['identifiers'] == ''
    assert 'over bundles' not in html_report.page({**REPORT, 'results': {'loss': loss}})


def test_few_documents_are_mentioned():
    sentences = lambda n: ' '.join(SUITES['loss'].sentences({'documents': n, 'mean': [1.0]}))
    assert 'the windows come from 4 documents: with so few the intervals are wide' in sentences(4)
    assert sentences(5) == ''


def test_losses_that_are_not_finite_are_left_out():
    wrong = {
        'edges': [0, 64, 128], 'mean': [3.0, math.inf], 'stderr': [0.5, math.nan], 'num_windows': 2,
        'documents': 2,
        'growing': {'contexts': [64, 112], 'targets': 16, 'mean': [-math.inf, math.nan],
                    'stderr': [math.nan] * 2, 'effective_context': None},
        'identifiers': {'edges': [1, 64, 128], 'mean': [1.25, math.inf], 'counts': [8, 2]},
        'border': {'edges': [0, 1, 2], 'mean': [math.nan, 2.5], 'stderr': [0.5, 0.5], 'num_windows': 2,
                   'documents': 2},
        'short': {'length': 64, 'extended': math.inf, 'base': 2.25, 'difference': math.inf,
                  'stderr': math.nan, 'num_windows': 2, 'documents': 2},
    }
    report = results_file.strict({**REPORT, 'results': {'loss': wrong}})
    json.dumps(report, allow_nan=False)
    assert [cell[1:4] for cell in tables.cells(report)] == [
        ('loss', 0, 3.0), ('border', 1, 2.5), ('identifiers', 1, 1.25)]
    page, text = html_report.page(report), tables.terminal(report)
    assert page.count('<svg') == 2  # the growing context has no point
    for phrase in ('some losses are NaN or infinite',
                   'a loss of this or of the base model is NaN or infinite'):
        assert phrase in page and phrase in text
    assert 'within 1% of the loss' not in page


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    open = ()

    def handle_starttag(self, tag, attrs):
        self.open = (*self.open, tag) if tag != 'meta' else self.open

    def handle_startendtag(self, tag, attrs):
        assert 'svg' in self.open  # HTML itself has no such tags

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag
        self.open = self.open[:-1]


def test_the_page_is_sound_html():
    check_html(html_report.page(REPORT))


def check_html(page):
    parser = Balanced()
    parser.feed(page)
    assert parser.open == () and page.startswith('<!doctype html>')


def test_the_colour_scale_is_fixed():
    assert '0.00' not in svg.heat_map([1024], ['0%'], [[None]], 1024, '').text
    low, high = (svg.heat_map([1024], ['0%'], [[score]], 1024, '').text for score in (0.0, 1.0))
    assert '#f0496e' in low and '#0cd79f' in high


def test_the_needles_of_an_excerpt_count_together():
    suite, plan = SUITES['needle'], Plan(None, (512, 1024), {512: 2, 1024: 2}, depths=(0.0, 0.5, 1.0))
    found = {(length, i): (i * 7 + length) % 4 > 0 for length in plan.lengths for i in range(6)}
    sample = lambda length, i: Sample('needle', length, i, '', '', ['4321'], 9, {})
    rows = [answers.make_row(sample(*key), [], '4321' * right, 0) for key, right in found.items()]
    got = suite.scores(plan, rows)
    columns = [[float(found[length, i]) for i in range(start, start + 3)]
               for length in plan.lengths for start in (0, 3)]
    assert got['excerpts'] == 4 and got['mean'] == sum(map(sum, columns)) / 12
    assert got['interval'] == list(scoring.clustered_interval(columns, [0, 0, 1, 1]))
    assert 'over 4 excerpts' in next(suite.figures(got, 512)).caption and 'over 4' in suite.sentences(got)[0]
    one = suite.scores(plan, rows[:3])
    assert one['interval'] is None and 'more samples lie in more' in suite.sentences(one)[0]
    assert 'interval' not in next(suite.figures(one, 512)).caption
    assert [suite.text_of({'index': i}) for i in (0, 10, 11, 22)] == [0, 0, 1, 2]
