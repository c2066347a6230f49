"""Generated forms: the wordings of the evaluations are none of them, and every answer can be read."""

import collections
import itertools
import json
import pathlib
import re

import numpy as np
import pytest

from lct.data import tokenizer as tokenizers
from lct.data.batches.memory_source import MemorySource
from lct.data.corpus.documents import Document
from lct.data.synthetic.forms import chains, counts, documents, facts, records, shots
from lct.data.synthetic.forms.passages import ANSWER, NOVEL, Fragment, PassageEncoder, text_of
from lct.data.synthetic.forms.wordings import merge
from lct.eval.tasks import adversarial_needles, icl, qa_documents, ruler, ruler_text
from lct.eval.tasks.material import Material

BYTES = tokenizers.load('bytes')
SIZES = (60, 120, 250, 500, 1500)
MAKERS = {'facts': facts.facts, 'chains': chains.chains, 'counts': counts.counts, 'shots': shots.shots,
          'records': records.records}


def problems(make, count=150):
    """Problems of many sizes."""
    for i in range(count):
        yield make(np.random.default_rng(i), SIZES[i % len(SIZES)])


def pattern(template):
    """A template of an evaluation as a pattern for any names and values."""
    return re.sub(r'\\\{\w+\\\}', r'[^\\n.?]+', re.escape(template.strip()))


def held_out_patterns():
    """The statements, questions and frames of all evaluations."""
    rules = adversarial_needles.RULES.values()
    statements = [ruler_text.needle('{type_name}', '{name}', '{value}'), adversarial_needles.PLAIN,
                  adversarial_needles.VOID, qa_documents.FRIEND, ruler_text.NOISE]
    statements += [text for rule in rules for text in (rule.right, rule.wrong, rule.instruction)]
    statements += [text for field in qa_documents.FIELDS.values() for text in field]
    literal = [r'SET \S+ TO \S+\.', r'Input: .*\nOutput:', r'Document \d+:\n', r'\b1\. \w+\n2\. \w+\n3\. ',
               r'stored under']
    return [*map(pattern, statements), *literal]


def evaluation_prompts():
    """{task: prompts} of every task with a wording of its own, over a text without any."""
    text = '\n'.join(f'{i} ' + 'zq ' * (i % 9 + 3) for i in range(400))
    material = Material(BYTES, [Document('text', text)])
    configs = [*ruler.TASKS.values(), *adversarial_needles.DEFAULTS.values()]
    prompts = {config.task: [material.sample(config, 6000, i).text for i in range(3)] for config in configs}
    for name in ('topics', 'sentiment', 'lookup'):
        prompts[name] = [icl.sample(icl.task(name), 8, 4 * i, 0, BYTES).text for i in range(3)]
    return prompts


def runs_of_words(text, n=6):
    tokens = re.findall(r'[A-Za-z]+|[^\sA-Za-z\d]', text)
    return {' '.join(run) for run in zip(*(tokens[i:] for i in range(n)), strict=False)
            if sum(token.isalpha() for token in run) >= n - 1}


@pytest.fixture(scope='module')
def tokenizer():
    return tokenizers.load(pathlib.Path(__file__).parents[1] / 'experiments' / 'base')


@pytest.fixture(scope='module')
def stream(tokenizer):
    """Training text: rows of the stream of every kind, and many problems."""
    code = [np.array(tokenizer.encode(f'def f_{i}(x):\n    return x + {i}\n' * 40)) for i in range(20)]
    kinds = {'text': 0.1, 'recall': 0.2, 'copy': 0.1, 'forms': 0.6}
    source = MemorySource(code, tokenizer, kinds)
    rows = [tokenizer.decode(source.next_row(512)['tokens']) for _ in range(80)]
    return rows + [problem.text for make in MAKERS.values() for problem in problems(make, 150)]


def test_no_wording_of_an_evaluation_is_trained_on(stream):
    patterns = held_out_patterns()
    everything = '\n'.join(stream)
    for one in patterns:
        assert not (found := re.search(one, everything)), found
    # The patterns are those of the prompts.
    prompts = '\n'.join(itertools.chain(*evaluation_prompts().values()))
    unused = [one for one in patterns if not re.search(one, prompts)]
    assert len(unused) <= 2, unused


def test_no_six_words_that_the_prompts_of_a_task_share_are_trained_on(stream):
    trained = set().union(*map(runs_of_words, stream))
    for task, prompts in evaluation_prompts().items():
        shared = set.intersection(*map(runs_of_words, prompts))
        assert not (found := shared & trained), (task, found)
        assert shared or task in ('topics', 'sentiment', 'lookup', 'qa_1', 'qa_2'), task


def test_a_wording_that_leaks_would_be_found(monkeypatch):
    monkeypatch.setattr(facts.wordings, 'RELATIONS', ('stored under',))
    texts = ' '.join(problem.text for problem in problems(facts.facts, 30))
    assert any(re.search(one, texts) for one in held_out_patterns())


@pytest.mark.parametrize('seq_len', [1, 30, 64, 200, 512, 3000])
def test_documents_fill_a_row_exactly(tokenizer, seq_len):
    encoder = PassageEncoder(tokenizer)
    haystack = np.array(tokenizer.encode('one line of text\nand another\n' * 200), np.int32)
    for seed in range(12):
        rows = documents.form_documents(np.random.default_rng(seed), encoder, haystack, seq_len)
        assert sum(len(ids) + 1 for ids, _ in rows) == seq_len
        assert all(len(ids) == len(weights) and weights.dtype == np.float32 for ids, weights in rows)
        again = documents.form_documents(np.random.default_rng(seed), encoder, haystack, seq_len)
        assert all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(rows, again, strict=True))


@pytest.mark.parametrize('name', ['bytes', 'trained'])
def test_a_problem_in_a_row_reads_as_its_text_and_its_answers_have_their_weight(tokenizer, name):
    tokenizer = BYTES if name == 'bytes' else tokenizer
    encoder = PassageEncoder(tokenizer)
    for make in MAKERS.values():
        for problem in problems(make, 20):
            passages = [*problem.head, *problem.statements, *problem.tail]
            rows = encoder.encode(passages)
            for passage, (ids, weights) in zip(passages, rows, strict=True):
                assert tokenizer.decode(ids.tolist()) == text_of(passage)
                answers = ''.join(one.text for one in passage if one.weight == ANSWER)
                # A token at the end of an answer may hold what follows it, and belongs to that.
                found = tokenizer.decode(ids[weights == np.float32(ANSWER)].tolist())
                assert answers.startswith(found) and len(answers) - len(found) <= 2 * len(passage)


def test_statements_are_at_line_starts(tokenizer):
    encoder = PassageEncoder(tokenizer)
    haystack = np.array(tokenizer.encode('no line end in this text ' * 300), np.int32)
    lines = [[Fragment(f'{word}.\n', 0.0)] for word in ('FIRST', 'SECOND', 'LAST')]
    rows = [[], encoder.encode(lines[:2]), encoder.encode(lines[2:])]
    for seed in range(20):
        filler = (haystack[:90].copy(), np.ones(90, np.float32))
        ids, _ = documents._assemble(np.random.default_rng(seed), encoder, rows, filler, True)
        text = '\n' + tokenizer.decode(ids.tolist())
        assert all('\n' + word in text for word in ('FIRST', 'SECOND', 'LAST'))


def test_the_stream_continues_from_a_state(tokenizer):
    text = [np.array(tokenizer.encode('some text\n' * 300))]
    first, second = (MemorySource(text, tokenizer, {'forms': 1.0}) for _ in range(2))
    for _ in range(5):
        first.next_row(300)
    second.state = json.loads(json.dumps(first.state))
    assert (first.next_row(300)['tokens'] == second.next_row(300)['tokens']).all()


def test_fragments_keep_the_space_before_a_key_or_value():
    merged = merge([Fragment('a ', 0.1), Fragment('key', 0.0), Fragment('', 0.1), Fragment(' is ', 0.1),
                    Fragment('5', 8.0), Fragment('\n', 0.1)])
    assert merged == [('a', 0.1), (' key', 0.0), (' is', 0.1), (' 5', 8.0), ('\n', 0.1)]


# ---------------------------------------------------------------------------------------------------
# Readers, which find every answer from the text before it
# ---------------------------------------------------------------------------------------------------


def answers_of(passage):
    return [one.text.strip() for one in passage if one.weight == ANSWER]


def contains(text, string):
    return re.search(rf'(?<![\w-]){re.escape(string)}(?![\w-])', text)


def test_the_answer_to_a_question_about_a_fact_is_beside_its_key():
    for problem in problems(facts.facts, 200):
        novel = [[one.text.strip() for one in statement if one.weight == NOVEL]
                 for statement in problem.statements]
        for passage in problem.tail:
            question = text_of(passage)
            for answer in answers_of(passage):
                own = [pair for pair in novel if any(contains(answer, string) for string in pair)]
                assert any(contains(question, string) for pair in own for string in pair
                           if not contains(answer, string))


def test_the_newest_value_is_the_last_and_all_values_are_all_in_order():
    rng = np.random.default_rng(0)
    for _ in range(100):
        made = facts._draw_facts(rng, 'hyphened', 'number', 12, 3)
        key = made.pairs[0][0]
        values = [value for own, value in made.pairs if own == key]
        assert answers_of(facts.newest_value(rng, made, [key])) == [values[-1]]
        assert ' '.join(answers_of(facts.all_values(rng, made, [key]))) == ' '.join(values)


def test_chains_lead_to_their_answers():
    for problem in problems(chains.chains, 300):
        values = {}
        for passage in problem.statements:
            one, other = (part.text.strip() for part in passage if part.weight in (NOVEL, 0.2))
            name, source = (other, one) if one.isdigit() or one in values else (one, other)
            values[name] = values.get(source, source)
        for passage in problem.tail:
            answers, question = answers_of(passage), text_of(passage)
            flat = answers if len(answers) > 1 else answers[0].split(' ')
            if flat[0].isdigit():
                assert any(contains(question, name) and value == flat[0] for name, value in values.items())
            else:
                value = values[flat[0]]
                assert [name for name in values if values[name] == value] == flat
                assert contains(question, value)


def test_the_most_frequent_are_more_frequent_than_all_others():
    for problem in problems(counts.counts, 300):
        listed = ''.join(map(text_of, problem.statements))
        listed = collections.Counter(re.findall(r'(?<!\w)[\w#*.-]+(?!\w)', listed))
        answers = answers_of(problem.tail[0])
        flat = answers if len(answers) > 1 else answers[0].split(' ')
        least = min(listed[item] for item in flat)
        ignored = {*counts.FILLERS, 'vote', 'saw', '-'}
        others = [n for item, n in listed.items() if item not in flat and item not in ignored]
        assert least > max(others, default=0)
        for passage in problem.tail[1:]:
            item = next(item for item in listed if contains(text_of(passage).split('?')[0], item))
            assert str(listed[item]) == answers_of(passage)[0]


def test_the_answer_about_a_record_is_in_the_line_of_that_record():
    for problem in problems(records.records, 200):
        lines = [text_of(passage) for passage in problem.statements]
        for passage in problem.tail:
            answer = answers_of(passage)[0]
            assert any(contains(line, answer) for line in lines)


def test_examples_of_a_rule_agree():
    rng = np.random.default_rng(0)
    for _ in range(30):
        for make in (shots.ciphers, shots.thresholds, shots.moods):
            rule, labels = make(rng), {}
            for _ in range(60):
                x, y = rule.example(rng)
                assert labels.setdefault(x, y) == y
