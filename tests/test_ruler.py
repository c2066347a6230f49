"""RULER's tasks: solvable from the prompt alone, within the budget, pure, even; its files and shuffles."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from lct.data import tokenizer as tokenizers
from lct.data.corpus.documents import Document
from lct.eval import samples, scoring
from lct.eval.tasks import (
    needle_placement,
    prompt_fitting,
    qa_documents,
    reference_readers,
    ruler,
    ruler_text,
)
from lct.eval.tasks.material import ChatOverhead, Material

BASE = pathlib.Path(__file__).parent.parent / 'experiments' / 'base' / 'tokenizer.json'
TEXT = [Document('a', '\n\n'.join(
    f'Paragraph {i} goes on for a while (as {i * i} did). It says little, costs nothing and ends here!  \n'
    f'    code_{i} = call(x[{i}], y={i % 7})' for i in range(300)))]
TOKENIZERS = {'bytes': tokenizers.load('bytes'), 'base': tokenizers.load(BASE)}


@pytest.fixture(scope='module')
def materials():
    return {name: Material(tokenizer, TEXT) for name, tokenizer in TOKENIZERS.items()}


def used(material, sample):
    return material.counter.bos + len(material.counter.tokenizer.encode(sample.text)) + sample.max_new_tokens


@pytest.mark.parametrize('task', ruler.TASKS)
@pytest.mark.parametrize(
    ('name', 'length'), [('base', 1024), ('base', 4096), ('bytes', 4096), ('bytes', 16384)]
)
def test_an_oracle_is_right_and_the_budget_is_full_and_kept(materials, name, length, task):
    material, config = materials[name], ruler.task(task)
    made = [material.sample(config, length, i) for i in range(8)]
    sizes = [used(material, sample) for sample in made]
    assert max(sizes) <= length
    assert np.median(sizes) >= (0.9 if task.startswith('qa') else 0.97) * length
    assert [sample.meta['tokens'] for sample in made] == sizes
    assert [scoring.score(task, reference_readers.oracle(s.text), s.outputs) for s in made] == [1.0] * 8
    assert [scoring.score(task, reference_readers.silent(s.text), s.outputs) for s in made] == [0.0] * 8
    assert all(answer not in s.text.rpartition('Question:')[2] for s in made for answer in s.outputs)


RULERS_OWN = (
    'niah_single_1', 'niah_single_2', 'niah_single_3', 'niah_multikey_1', 'niah_multikey_2',
    'niah_multikey_3', 'niah_multivalue', 'niah_multiquery', 'vt', 'cwe', 'fwe', 'qa_1', 'qa_2')


def test_the_thirteen_tasks_have_rulers_parameters():
    assert len(set(RULERS_OWN) & set(ruler.TASKS)) == 13
    allowed = {task: ruler.TASKS[task].max_new_tokens for task in RULERS_OWN}
    assert {task: n for task, n in allowed.items() if not task.startswith('niah')} == {
        'vt': 30, 'cwe': 120, 'fwe': 50, 'qa_1': 32, 'qa_2': 32}
    assert {n for task, n in allowed.items() if task.startswith('niah')} == {128}
    references = {'niah_multivalue': 4, 'niah_multiquery': 4, 'vt': 5, 'cwe': 10, 'fwe': 3}
    material = Material(TOKENIZERS['bytes'], TEXT)
    for task in RULERS_OWN:
        assert len(material.sample(ruler.TASKS[task], 8192, 0).outputs) == references.get(task, 1)


def test_a_sample_is_a_function_of_its_own_arguments(materials):
    fresh = Material(TOKENIZERS['base'], TEXT)
    for task, config in ruler.TASKS.items():
        again = fresh.sample(config, 2048, 5)  # without earlier samples and lengths
        assert again == materials['base'].sample(config, 2048, 5), task
        assert again != materials['base'].sample(config, 2048, 6)
        assert again.prompt != Material(TOKENIZERS['base'], TEXT, seed=1).sample(config, 2048, 5).prompt


@pytest.mark.parametrize(
    'task', ['niah_single_1', 'niah_single_2', 'niah_multikey_3', 'niah_multivalue', 'qa_1']
)
def test_targets_are_spread_evenly_over_depths(materials, task):
    depths = [
        d for i in range(60) for d in materials['bytes'].sample(ruler.task(task), 8192, i).meta['depths']
    ]
    counts, _ = np.histogram(depths, bins=5, range=(0, 1))
    assert counts.min() >= 0.12 * len(depths) and counts.max() <= 0.28 * len(depths)
    for number in (8, 13, 21):  # any first few samples already cover the text
        assert max(np.diff([0, *sorted(depths[:number]), 1])) < 0.35


def test_an_answer_is_at_its_depth_and_nowhere_else(materials):
    material = materials['base']
    for i in range(10):
        sample = material.sample(ruler.task('niah_multivalue'), 4096, i)
        context = sample.prompt.split('\n\n', 1)[1].rpartition('Question:')[0]
        for answer, depth in zip(sample.outputs, sample.meta['depths'], strict=True):
            assert context.count(answer) == 1
            line_start = context.rfind('\n', 0, context.index(answer)) + 1
            before = len(material.counter.tokenizer.encode(context[:line_start]))
            assert before / len(material.counter.tokenizer.encode(context)) == pytest.approx(depth, abs=2e-3)


def test_distractors_have_distinct_names(materials):
    for kind in ('niah_multikey_2', 'niah_multikey_3'):
        sample = materials['bytes'].sample(ruler.task(kind), 65536, 0)
        names, values = zip(*reference_readers.NEEDLE.findall(sample.prompt), strict=True)
        assert len(set(names)) == len(names) > 300
        assert len(set(values)) == len(values)


def test_every_parameter_has_its_effect(materials):
    material = materials['bytes']

    def right(config):
        sample = material.sample(config, 16384, 1)
        assert scoring.score(config.task, reference_readers.oracle(sample.text), sample.outputs) == 1
        return sample

    assert (
        len(right(ruler.task('niah_single_2', keys=6, values=2, queries=3, value_kind='words')).outputs) == 6
    )
    sample = right(ruler.task('vt', chains=3, hops=6, haystack='text', example=False))
    assert len(sample.outputs) == 7 and sample.prompt.count('SET ') == 21
    sample = right(ruler.task('cwe', common=5, example=False, levels=((0, 20, 2, 0, 0, 0),)))
    assert sample.meta['repeats'] == [20, 2]
    sample = right(ruler.task('fwe', alpha=1.5, word_len=4, vocab_size=100, top_words=5))
    assert len(sample.outputs) == 5 and all(len(word) == 4 for word in sample.outputs)
    assert right(ruler.task('qa_2', documents=7)).meta['documents'] == 7


def test_frequencies_are_the_zeta_distributions(materials):
    # Shares at alpha 2: 60.8%, 15.2%, 6.8%, 3.8%, 2.4% of all words, of which those below rank n are lost.
    sample = materials['base'].sample(ruler.task('fwe'), 16384, 0)
    counts = np.array(sample.meta['counts'])
    np.testing.assert_allclose(counts / counts[0], 1 / np.arange(1, 6) ** 2, rtol=0.02)
    total = counts[0] * np.pi ** 2 / 6
    assert sample.prompt.count('...') == counts[0] and counts[3] / total == pytest.approx(0.038, abs=1e-3)


def test_fixed_shuffles_are_rulers(materials):
    # RULER itself, measured: of 12 documents the target is always number 10, of 2 always number 2.
    fixed = needle_placement.RulerFixed(42)
    assert fixed.place_documents(None, 0, ['target'], list(range(11))).index('target') == 9
    assert fixed.place_documents(None, 0, ['target'], [1]) == [1, 'target']
    material = Material(TOKENIZERS['bytes'], TEXT, placement=fixed)
    made = [material.sample(ruler.task('qa_1', documents=12), 8192, i) for i in range(4)]
    assert {sample.prompt.split(sample.outputs[0])[0].count('Document ') for sample in made} == {10}
    orders = set()
    for i in range(4):  # the same place in the order of needles for every first value, second value, ...
        sample = material.sample(ruler.task('niah_multivalue'), 8192, i)
        orders.add(tuple(np.argsort([sample.prompt.index(value) for value in sample.outputs])))
    assert len(orders) == 1
    patterns = set()
    for i in range(3):  # a word of the list has the place of its rank
        sample = material.sample(ruler.task('cwe'), 8192, i)
        items = reference_readers.LIST_ITEM.findall(sample.prompt.rpartition('Keep count')[2])
        patterns.add(
            tuple(sample.outputs.index(item) if item in sample.outputs else -1 for item in items[:200])
        )
    assert len(patterns) == 1


def test_word_lists_of_a_length_are_of_one_level(materials):
    material = materials['bytes']
    for length in (2048, 3000, 4096, 5000, 5500, 6000, 8192):
        levels = [material.sample(ruler.task('cwe'), length, i).meta['repeats'] for i in range(12)]
        assert levels == levels[:1] * 12
        assert length >= 4096 or levels[0] != [30, 3]
    assert levels[0] == [30, 3]


class Merging(tokenizers.BytesTokenizer):
    """A vocabulary whose tokens reach across line ends: no sum of fragments is right."""

    def encode(self, text):
        return list(re.sub(r'(?s)(?<=\n)..|.\n', 'm', text).encode())


def test_a_tokenizer_that_merges_over_lines_stays_in_the_budget():
    material = Material(Merging(), TEXT)
    for task in ('niah_single_2', 'niah_multikey_2', 'vt', 'cwe', 'qa_1'):
        for i in range(3):
            sample = material.sample(ruler.task(task), 8192, i)
            size = used(material, sample)
            assert 0.9 * 8192 < size <= 8192 and sample.meta['tokens'] == size


class Blocks(tokenizers.BytesTokenizer):
    """Splits long texts into blocks, whose ends cost a token each."""

    def encode(self, text):
        return super().encode(text) + [0] * (len(text) // 100_000)


def test_a_tokenizer_that_splits_long_texts_into_blocks_stays_in_the_budget():
    material = Material(Blocks(), TEXT)
    for i in range(3):
        sample = material.sample(ruler.task('niah_single_1'), 131072, i)
        assert 131000 < used(material, sample) == sample.meta['tokens'] <= 131072


def test_bad_input_is_named():
    material = Material(TOKENIZERS['bytes'], TEXT)
    with pytest.raises(ValueError, match="unknown task 'niah'.*niah_single_1, .*qa_2"):
        ruler.task('niah')
    for task in ruler.TASKS:
        with pytest.raises(
            ValueError, match=f'length 300 is too small for {task}: .* take [0-9]+ tokens or more'
        ):
            material.sample(ruler.task(task), 300, 0)
    needed = int(re.search(r'take (\d+)', str(pytest.raises(
        ValueError, material.sample, ruler.task('niah_single_1'), 300, 0).value))[1])
    material.sample(ruler.task('niah_single_1'), needed, 0)
    with pytest.raises(ValueError, match='hold no text'):
        Material(TOKENIZERS['bytes'], []).sample(ruler.task('niah_single_2'), 4096, 0)
    with pytest.raises(ValueError, match='alpha 1.0 must be above 1'):
        material.sample(ruler.task('fwe', alpha=1.0), 4096, 0)
    for kinds in ({'value_kind': 'hex'}, {'name_kind': 'hex'}):
        with pytest.raises(
            ValueError, match="unknown kind 'hex' of names or values; use one of numbers, words"
        ):
            material.sample(ruler.task('niah_single_2', **kinds), 4096, 0)
    fixed = Material(TOKENIZERS['bytes'], TEXT, placement=needle_placement.RulerFixed())
    with pytest.raises(ValueError, match='41 needles in text are more than the 40 depths'):
        fixed.sample(ruler.task('niah_single_2', keys=41), 16384, 0)
    with pytest.raises(ValueError, match="unknown haystack 'essay'"):
        material.sample(ruler.task('niah_single_2', haystack='essay'), 4096, 0)


def test_a_short_word_list_is_refused_not_repeated(tmp_path):
    (tmp_path / 'words').write_text('\n'.join(ruler_text.InventedWords(0)[i] for i in range(90)))
    lexicon = ruler_text.load_lexicon(tmp_path / 'words')
    assert lexicon.source == 'words'
    material = Material(TOKENIZERS['bytes'], TEXT, lexicon=lexicon)
    with pytest.raises(ValueError, match='holds 90, too few to fill length 65536 of cwe'):
        material.sample(ruler.task('cwe'), 65536, 0)
    (tmp_path / 'few').write_text('one two\nthree\nfour\n')
    material = Material(TOKENIZERS['bytes'], TEXT, lexicon=ruler_text.load_lexicon(tmp_path / 'few'))
    with pytest.raises(ValueError, match=r'list of words \(few\) holds 2, and cwe takes more than 35'):
        material.sample(ruler.task('cwe'), 4096, 0)
    with pytest.raises(ValueError, match='does not exist'):
        ruler_text.load_lexicon(tmp_path / 'none')


def test_invented_words_never_repeat():
    words = list(ruler_text.InventedWords(3))
    assert len(set(words)) == len(words) == 75 ** 3


@pytest.fixture
def squad(tmp_path):
    paragraphs = [[{'context': f'Article {a} paragraph {p} says x{a}y{p}.\n\nMore words follow.', 'qas': [
        {'question': f'What does {a}-{p} say?', 'is_impossible': p == 2,
         'answers': [{'text': f'x{a}y{p}'}, {'text': f'says x{a}y{p}'}] if p != 2 else []}]}
        for p in range(3)] for a in range(30)]
    path = tmp_path / 'dev.json'
    path.write_text(json.dumps({'data': [{'paragraphs': x} for x in paragraphs]}))
    return path


def test_questions_of_squad(squad):
    given = qa_documents.read_squad(squad)
    assert len(given.texts) == 90 and len(given.questions) == 60  # the impossible ones are left out
    first = given.question(0, 90)
    assert (
        first.answers == ['x0y0', 'says x0y0'] and first.targets == (0,) and first.hard_distractors == (1, 2)
    )
    material = Material(TOKENIZERS['bytes'], TEXT, sources={'one_hop': given})
    sample = material.sample(ruler.task('qa_1'), 2048, 3)
    assert sample.outputs == ['x1y1', 'says x1y1'] and sample.meta['source'] == 'SQuAD (dev.json)'
    assert sample.outputs[0] in sample.prompt and 'Article 1 paragraph 2' in sample.prompt
    assert scoring.score('qa_1', 'it is X1Y1', sample.outputs) == 1
    with pytest.raises(ValueError, match='holds 90 documents, too few to fill length 65536'):
        material.sample(ruler.task('qa_1'), 65536, 0)


def test_questions_of_hotpotqa(tmp_path):
    path = tmp_path / 'hotpot.json'
    path.write_text(
        json.dumps(
            [
                {
                    'question': f'Who {i}?',
                    'answer': f'person {i}',
                    'context': [[f'Title {i} {j}', ['One. ', f'It was person {i}.']] for j in range(10)],
                }
                for i in range(20)
            ]
        )
    )
    given = qa_documents.read_hotpotqa(path)
    assert len(given.texts) == 200 and given.question(21, 200).answers == ['person 1']
    assert given.question(1, 200).targets == tuple(range(10, 20))
    material = Material(TOKENIZERS['bytes'], TEXT, sources={'two_hop': given})
    sample = material.sample(ruler.task('qa_2'), 4096, 2)
    assert sample.prompt.count('person 2.') == 10 and sample.meta['documents'] > 10
    for broken in ('{', '{"data": 3}', '[{"question": 1}]'):
        path.write_text(broken)
        with pytest.raises(ValueError, match='is not a file of HotpotQA'):
            qa_documents.read_hotpotqa(path)


def test_files_of_ruler_come_back(tmp_path, materials):
    made = [materials['base'].sample(ruler.task('vt'), 2048, i) for i in range(3)]
    path = tmp_path / 'vt' / 'validation.jsonl'
    samples.write(path, [samples.to_ruler(sample) for sample in made])
    assert samples.read_ruler(path, 30) == (made, [])
    fields = json.loads(path.read_text().splitlines()[0])
    assert set(fields) >= {'index', 'input', 'outputs', 'length', 'length_w_model_temp', 'answer_prefix'}


def test_old_files_of_ruler_and_broken_lines(tmp_path):
    path = tmp_path / 'niah_single_1' / 'validation.jsonl'
    path.parent.mkdir()
    path.write_bytes(
        b'\n'.join(
            [
                # Without a prefix; the index is an offset.
                b'{"index": 777, "input": "old", "outputs": ["1"], "length": 50}',
                b'{"index": 777, "input": "new", "outputs": ["2"], "length": 50, "answer_prefix": " It is",'
                b' "token_position_answer": 3}',
                b'{"index": 1, "input": "cut',
                b'[1]',
                b'{"index": 2, "outputs": ["2"]}',
                b'\xff\xfe',
                b'{"index": 3, "input": "single", "output": "4", "length": 9}',
                b'',
            ]
        )
    )
    got, problems = samples.read_ruler(path, 128)
    assert [(s.index, s.text, s.outputs) for s in got] == [
        (0, 'old', ['1']), (1, 'new It is', ['2']), (6, 'single', ['4'])]
    assert [re.search(r'line (\d)', text)[1] for text in problems] == ['3', '4', '6', '5']
    assert {(s.task, s.max_new_tokens) for s in got} == {('niah_single_1', 128)}


def test_overhead_of_a_chat_template_is_kept_free(materials):
    material = Material(TOKENIZERS['base'], TEXT, overhead=ChatOverhead(50))
    sample = material.sample(ruler.task('niah_single_1'), 1024, 0)
    assert 0.97 * 1024 - 50 < used(material, sample) <= 1024 - 50


def test_a_partial_line_fills_the_room_that_complete_lines_leave():
    counter = prompt_fitting.TokenCounter(TOKENIZERS['bytes'])
    lines, tokens = prompt_fitting.append_partial_line(
        counter, ['ab\n'], np.array([3]), 'one two three\n', 12)
    assert lines == ['ab\n', 'one two\n'] and tokens.tolist() == [3, 8]
    assert prompt_fitting.append_partial_line(counter, [], np.zeros(0, int), 'one\n', 3)[0] == []


def test_a_cyclic_text_starts_over():
    counter = prompt_fitting.TokenCounter(TOKENIZERS['bytes'])
    text = prompt_fitting.CyclicText(counter, ['aa\n', 'bbb\n', 'c\n'])
    lines, tokens = text.excerpt(1, 16)
    assert lines == ['bbb\n', 'c\n', 'aa\n', 'bbb\n', 'c\n'] and tokens.sum() == 15
    assert text.excerpt(0, 2)[0] == []


def test_provenance_names_what_samples_are_made_of(materials):
    got = json.loads(json.dumps(materials['base'].provenance()))
    assert got == {
        'tokenizer': TOKENIZERS['base'].fingerprint, 'seed': 42, 'overhead': 0, 'haystack': 'embedded',
        'words': 'generated', 'placement': 'stratified',
        'questions': {'one_hop': 'generated people, 1 hop', 'two_hop': 'generated people, 2 hops'}}


def test_samples_are_frozen(materials):
    with pytest.raises(dataclasses.FrozenInstanceError):
        materials['bytes'].sample(ruler.task('vt'), 4096, 0).prompt = ''
