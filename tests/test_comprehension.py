"""Comprehension tasks: solvable from the prompt and not from shared words, within the budget, scored as a
person would."""

import itertools
import json
import pathlib
import re
import zlib

import numpy as np
import pytest

from lct.data import tokenizer as tokenizers
from lct.data.corpus.documents import Document
from lct.eval import answers, scoring
from lct.eval.suites import SUITES
from lct.eval.tasks import (
    associations,
    comprehension,
    comprehension_readers,
    nth_request,
    qa_documents,
    reference_readers,
    story,
)
from lct.eval.tasks.graph import Walk
from lct.eval.tasks.material import Material

BASE = pathlib.Path(__file__).parent.parent / 'experiments' / 'base' / 'tokenizer.json'
TEXT = [Document('a', '\n'.join(f'Line {i} of the text says {i * 7}, or so one hears.' for i in range(300)))]
TOKENIZER = tokenizers.load(BASE)
SUITE = SUITES['comprehension']
COMMON = set('a an the of to in on by at and is was has been that who which what whose it from with'.split())


@pytest.fixture(scope='module')
def materials():
    return [Material(TOKENIZER, TEXT, seed=seed) for seed in (42, 42, 1)]


@pytest.fixture(scope='module')
def material(materials):
    return materials[0]


def score(sample, text):
    return SUITE.row_score(answers.make_row(sample, [], text, 0))


@pytest.mark.parametrize('task', comprehension.DEFAULTS)
def test_an_oracle_is_right_and_the_budget_is_full_and_kept(materials, task):
    (material, again, other), config = materials, comprehension.TASKS[task]
    for length in (1024, 4096):
        made = [material.sample(config, length, i) for i in range(8)]
        assert [one.meta['tokens'] for one in made] == [material.tokens_used(one) for one in made]
        assert max(one.meta['tokens'] for one in made) <= length
        assert np.median([one.meta['tokens'] for one in made]) >= (0.92 if length == 1024 else 0.97) * length
        assert [score(one, comprehension_readers.oracle(one.text)) for one in made] == [1] * 8
        assert [score(one, reference_readers.silent(one.text)) for one in made] == [0] * 8
        assert all(1 <= len(material.counter.tokenizer.encode(one.answer)) <= one.max_new_tokens
                   for one in made)
    assert made[5] == again.sample(config, 4096, 5)  # without earlier samples and lengths
    assert made[5].prompt != other.sample(config, 4096, 5).prompt


@pytest.mark.parametrize('task', ['association_1', 'nth_request_2', 'passages', 'story_count'])
def test_targets_are_spread_over_depths(material, task):
    made = [material.sample(comprehension.TASKS[task], 2048, i) for i in range(60)]
    counts, _ = np.histogram([d for one in made for d in one.meta['depths']], bins=4, range=(0, 1))
    assert counts.min() >= 0.12 * counts.sum()


def stems(text):
    """The first four letters of the words that carry meaning."""
    return {word[:4] for word in re.findall('[a-z]+', text.lower()) if word not in COMMON}


def test_no_line_shares_a_word_with_a_question():
    for kind in associations.KINDS:
        lines = [kind.line.format(name='', clue=row[0]) for row in kind.rows]
        questions = [asked.format(answer=answer) for row in kind.rows
                     for asked, answer in zip(kind.questions, row[1:], strict=True) if answer]
        for line, question in itertools.product(lines, questions):
            assert not stems(line) & stems(question), (line, question)
        assert len({row[0] for row in kind.rows}) == len(kind.rows)
        everything = ' '.join([*lines, *questions])
        assert not any(scoring.contains_value(everything, name) for name in associations.NAMES)
    assert sum(len(kind.rows) for kind in associations.KINDS) > 140
    assert not any(one in other for one, other in itertools.permutations(associations.NAMES, 2))


def test_one_person_alone_fits_a_question(material):
    for i in range(40):
        sample = material.sample(comprehension.TASKS['association_2'], 1024, i)
        names = [name for name in associations.NAMES if scoring.contains_value(sample.prompt, name)]
        assert sorted(names) == sorted([*sample.outputs, *sample.meta['wrong']]) and len(names) == 8


def test_two_seeds_agree(materials):
    def known_lines(material):
        """Scores of a reader that knows half of the associations."""
        for i in range(100):
            sample = material.sample(comprehension.TASKS['association_1'], 512, i)
            line = re.search(f'.*{sample.outputs[0]}.*', sample.prompt)[0]
            yield zlib.crc32(line.replace(sample.outputs[0], '').encode()) % 2

    (low, high), (other_low, other_high) = (
        scoring.wilson(np.mean([*known_lines(material)]), 100) for material in materials[1:])
    assert max(low, other_low) < min(high, other_high) and high - low < 0.2


def test_like_requests_stay_in_their_order(material):
    config = comprehension.TASKS['nth_request_4']
    made = [material.sample(config, 2048, i) for i in range(8)]
    assert [one.meta['number'] for one in made] == [1, 2, 3, 4] * 2
    for one in made:
        exchanges = re.findall(r'User: (Write .+)\nAssistant: (.+)', one.prompt)
        request = next(request for request, text in exchanges if text == one.outputs[0])
        alike = [text for again, text in exchanges if again == request]
        assert len(alike) == len({*alike}) == 4 and alike[one.meta['number'] - 1] == one.outputs[0]
        assert one.meta['chance'] == pytest.approx(
            np.mean([scoring.similarity(text, one.outputs) for text in alike]))
        assert 0.3 < one.meta['chance'] < 0.85
        kind = re.match('Write a (.+) about the', request)[1]
        # Requests for something else about the subject, and for the same about another one.
        near = {again for again, _ in exchanges} - {request}
        assert sum(again.endswith(request.partition('about')[2]) for again in near) >= config.near
        assert sum(again.startswith(f'Write a {kind} ') for again in near) >= config.near
    assert max(len(one.outputs[0]) for one in made) < 200  # from where difflib ignores frequent letters
    assert set(nth_request.KINDS) >= {'letter', 'poem'}


def test_walks_are_those_of_a_breadth_first_search():
    edges = np.array([[0, 1], [1, 2], [0, 2], [2, 3], [3, 0], [1, 4], [4, 2]])
    assert [Walk('', steps).answers(edges, 0) for steps in (1, 2, 3)] == [[1, 2], [3, 4], []]


def test_counts_are_spread_and_no_other_line_is_a_visit(material):
    made = [material.sample(comprehension.TASKS['story_count'], 2048, i) for i in range(16)]
    assert sorted(int(one.outputs[0]) for one in made) == sorted([*story.VISITS] * 2)
    order = material.sample(comprehension.TASKS['story_order'], 2048, 0)
    assert all(order.prompt.count(f'the {thing}.\n') == 2 for thing in order.outputs)


def test_hard_distractors_state_the_same_of_others(material):
    for i in range(8):
        sample = material.sample(comprehension.TASKS['passages'], 2048, i)
        assert len(sample.meta['wrong']) >= 5 and sample.prompt.count(sample.outputs[0]) == 1
        assert sample.meta['chance'] == 1 / (1 + len(sample.meta['wrong']))
        question = sample.prompt.rpartition('\nQuestion: ')[2]
        town, kind = re.search(r'the ([A-Z]\w+) (\w+)', question).groups()
        assert len({*re.findall(rf'(\w+) {kind}\b', sample.prompt)}) >= 5  # such buildings elsewhere
        assert len({*re.findall(rf'{town} (\w+)', sample.prompt)}) >= 5  # other buildings in town


SCORES = (  # metric, answer, references, score
    ('similarity', 'Dear heron, come back.', ['Dear heron, come back.'], 1),
    ('similarity', 'Here it is:\n\n Dear heron, come back. ', ['Dear heron, come back.'], 1),
    ('similarity', '', ['Dear heron'], 0), ('similarity', 'abcd', ['abxy'], 0.5),
    ('similarity', 'abcd\nabxy', ['abxy'], 0.5), ('similarity', 'ab\ncd', ['ab\ncd'], 1),
    ('set_f1', 'qk417, ab012', ['ab012', 'qk417'], 1),
    ('set_f1', '`QK417` and [ab012].', ['ab012', 'qk417'], 1),
    ('set_f1', '中qk417和ab012', ['ab012', 'qk417'], 1), ('set_f1', 'qk417', ['ab012', 'qk417'], 2 / 3),
    ('set_f1', 'The nodes are:\nqk417, zz999\nab012 -> qk417', ['qk417'], 2 / 3),
    ('set_f1', '\n\n* **qk417**\n* ab012\n* ab012\n\nzz999 -> xx111', ['ab012', 'qk417'], 1),
    ('set_f1', '1. qk417\n2. zz999\nQuestion: to ab012', ['ab012', 'qk417'], 0.5),
    ('set_f1', 'xqk4170', ['qk417'], 0),
    ('set_f1', 'none', ['qk417'], 0), ('set_f1', '', ['qk417'], 0),
    ('order', '1. the kite\n2. the Drum', ['kite', 'drum'], 1), ('order', 'drum, kite', ['kite', 'drum'], 0),
    ('order', 'kite', ['kite', 'drum'], 0), ('order', 'kites, drum, kite', ['kite', 'drum'], 0),
    ('order', '首先kite,然后drum', ['kite', 'drum'], 1),
    ('number', '3', ['3'], 1), ('number', 'Three times.', ['3'], 1), ('number', '3次', ['3'], 1),
    ('number', 'None', ['1'], 0), ('number', '13', ['3'], 0), ('number', '1,000', ['1000'], 1),
    ('number', 'fourteen', ['4'], 0), ('number', '4 or 5', ['5'], 0), ('number', '', ['3'], 0),
)


@pytest.mark.parametrize(('metric', 'text', 'outputs', 'expected'), SCORES)
def test_answers_are_scored_as_a_person_would(metric, text, outputs, expected):
    assert scoring.METRICS[metric](text, outputs) == pytest.approx(expected)


def test_the_first_named_value_counts():
    first = lambda text: scoring.names_first(text, 'Ida', ['Oskar', 'Idania'])
    assert first('Ida.') == first('It is **ida**, not Oskar') == first('Ida\nQuestion: Who? Oskar') == 1
    assert first('Oskar, Ida') == first('Idania') == first('') == first('Idas') == 0


def test_natural_questions_are_read_and_scored(tmp_path):
    path = tmp_path / 'nq.json'
    passage = lambda name, i: {'title': f'{name} {i}', 'text': f'The {name} of {i} is x{i}y{name}. ' * 6}
    path.write_text(json.dumps([
        {'question': f'what is {i}?', 'answers': [f'x{i}yright', f'x{i}'],
         'positive_ctxs': [passage('right', i)] * (i != 3), 'negative_ctxs': [passage('other', i)],
         'hard_negative_ctxs': [passage('near', i), passage('close', i)]} for i in range(30)]))
    sources = qa_documents.read_sources({'nq': path})
    assert set(sources) == {'nq'} and len(sources['nq'].questions) == 29  # one has no positive passage
    material = Material(TOKENIZER, TEXT, sources=sources)
    sample = material.sample(comprehension.TASKS['passages_nq'], 1024, 4)
    assert sample.prompt.count('x5yright') == 6 and 'near 5' in sample.prompt and 'close 5' in sample.prompt
    assert score(sample, 'X5YRIGHT it is') == 1 and score(sample, 'x4') == 0
    with pytest.raises(ValueError, match='no file of the questions of squad is given; name it with --squad'):
        material.sample(comprehension.TASKS['passages_squad'], 1024, 0)
    path.write_text('[{"question": "?", "answers": []}]')
    with pytest.raises(ValueError, match='is not a file of Natural Questions'):
        qa_documents.read_sources({'nq': path})


def test_the_chance_level_is_in_the_result(material):
    made = [material.sample(comprehension.TASKS[task], 1024, i)
            for task in ('association_1', 'graph_parents') for i in range(2)]
    rows = [answers.make_row(one, [], one.outputs[0], 1) for one in made]
    result = SUITE.scores(None, rows)
    chance = {task: records[1024]['chance'] for task, records in result['tasks'].items()}
    assert chance['association_1'] == 12.5
    # The score of a node taken at random, over all nodes.
    nodes = [{*re.findall(r'\b[a-z]{2}\d{3}\b', one.prompt)} for one in made[2:]]
    expected = [np.mean([score(one, node) for node in own]) for one, own in zip(made[2:], nodes, strict=True)]
    assert chance['graph_parents'] == pytest.approx(100 * np.mean(expected), abs=0.01)
    assert result['tasks']['association_1'][1024]['mean'] == 100
    assert SUITE.sentences(result) == ['by chance, guessing among answers of the kind: association_1 12.5, '
                                       f"graph_parents {chance['graph_parents']:.1f}"]


def test_impossible_parameters_are_refused(material):
    for config, message in ((associations.Association('', 3), '3 hops'),
                            (associations.Association('', 1, others=24), '24 other people are more'),
                            (nth_request.NthRequest('', 1), '1 like requests must be 2 to 10'),
                            (story.Order(events=1), '1 events must be 2')):
        with pytest.raises(ValueError, match=message):
            material.sample(config, 4096, 0)
    for task, config in comprehension.DEFAULTS.items():
        with pytest.raises(ValueError, match=f'length 100 is too small for {task}'):
            material.sample(config, 100, 0)
