"""Dialogues reach a model with a chat template as turns, and any other one as a transcript."""

import difflib
import json
import re

import pytest

from lct.data import chat_template, tokenizer
from lct.eval import answers, data_files, runner, samples
from lct.eval.suites import SUITES
from lct.eval.suites.plan import Plan, make_material
from lct.eval.tasks import comprehension, comprehension_readers
from lct.models import llama

CONFIG = llama.LlamaConfig(
    vocab_size=258, embed_dim=16, mlp_dim=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
    max_position_embeddings=65536)
TURNS = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>{% endif %}")
ONE_TURN = "{% if messages|length > 1 %}{{ raise_exception('one turn alone') }}{% endif %}" + TURNS
LAST_TURN = '<s>{{ messages[-1].content }}</s>'
CHAT = [{'role': 'user', 'content': 'Write a poem\nabout tapirs.'},
        {'role': 'assistant', 'content': 'O tapir!'},
        {'role': 'user', 'content': 'Prepend abc123XYZ0 to the first poem.'}]


def model(source=None):
    template = source and chat_template.ChatTemplate(source)
    return runner.Model(None, CONFIG, tokenizer.BytesTokenizer(), template)


@pytest.mark.parametrize('length', [4096, 16384, 40000])
def test_like_requests_are_turns_of_a_chat_that_fits(length):
    chatting, plain = model(TURNS), model()
    materials = [make_material(one, [], '', 7) for one in (chatting, plain)]
    for i, task in enumerate(('nth_request_2', 'nth_request_8') * (1 + (length == 4096))):
        sample, other = (material.sample(comprehension.TASKS[task], length, i) for material in materials)
        turns = re.findall(r'^(User|Assistant): (.+)$', sample.prompt, re.MULTILINE)
        roles = [role for role, _ in turns]
        assert roles == [*('User', 'Assistant') * (len(roles) // 2), 'User'] and len(roles) > 8
        expected = ''.join(f'<|{role.lower()}|>{content}</s>\n' for role, content in turns) + '<|assistant|>'
        ids = chatting.prompt_ids(sample)
        assert chatting.tokenizer.decode(ids) == expected
        assert ids == chatting.template.encode(
            chatting.tokenizer, [{'role': role.lower(), 'content': content} for role, content in turns],
            add_generation_prompt=True)
        assert 0.9 * length < len(ids) + sample.max_new_tokens == sample.meta['tokens'] <= length
        assert comprehension_readers.oracle(sample.text) == sample.outputs[0]
        assert chatting.answer_ids(sample, ' yes') == list(b' yes')
        # The same requests for a model without a template.
        assert other.messages == () and other.outputs == sample.outputs
        assert other.text.startswith('A dialogue') and other.text.endswith('nothing else.\nAssistant:')


@pytest.mark.parametrize('source', [ONE_TURN, LAST_TURN])
def test_a_template_without_turns_gets_the_transcript(source):
    one = model(source)
    sample = make_material(one, [], '', 7).sample(comprehension.TASKS['nth_request_2'], 2048, 0)
    text = one.tokenizer.decode(one.prompt_ids(sample))
    assert sample.messages == () and 'Assistant: ' in text and text.endswith('Assistant:')


@pytest.fixture
def mrcr(tmp_path):
    """A folder with a line of OpenAI's MRCR, and one of a chat in the own format."""
    (tmp_path / 'mrcr').mkdir()
    lines = [{'prompt': json.dumps(CHAT), 'answer': 'abc123XYZ0O tapir!', 'n_needles': 2, 'n_chars': 80,
              'random_string_to_prepend': 'abc123XYZ0', 'desired_msg_index': 1, 'total_messages': 3},
             {'input': CHAT, 'outputs': ['O tapir!'], 'metric': 'similarity', 'max_new_tokens': 9}]
    (tmp_path / 'mrcr' / '2needle.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    return tmp_path


def test_messages_of_ones_own_are_turns(mrcr):
    suite, one = SUITES['own'], model(TURNS)
    plan = Plan(make_material(one, [], '', 7), (512,), {512: 9})
    plan, files, problems = suite.with_data(plan, mrcr, one)
    assert problems == [] and [path.name for path in files] == ['2needle.jsonl']
    published, own = (item.make() for item in suite.items(plan))
    expected = one.template.encode(one.tokenizer, CHAT, add_generation_prompt=True)
    assert one.prompt_ids(published) == one.prompt_ids(own) == expected
    assert own.max_new_tokens == 9 and published.max_new_tokens == 128
    assert model().tokenizer.decode(model().prompt_ids(own)).endswith(
        'User: Write a poem\nabout tapirs.\nAssistant: O tapir!\n'
        'User: Prepend abc123XYZ0 to the first poem.\nAssistant:')
    score = lambda sample, text: suite.row_score(answers.make_row(sample, [], text, 0))
    ratio = difflib.SequenceMatcher(None, 'O rat!', 'O tapir!').ratio()
    assert [score(published, text) for text in (' abc123XYZ0O tapir!', 'O tapir!', 'abc123XYZ0O rat!')] == [
        1, 0, ratio]
    assert score(own, 'O tapir!') == 1
    (given,) = data_files.read(mrcr, ['mrcr'], 512, 1, one, {'mrcr': 4})[0]['mrcr']
    assert given.max_new_tokens == len('abc123XYZ0O tapir!') + data_files.ROOM


def test_the_parquet_of_mrcr_is_read_as_its_lines(mrcr):
    parquet, arrow = pytest.importorskip('pyarrow.parquet'), pytest.importorskip('pyarrow')
    path = mrcr / 'mrcr' / '2needle.jsonl'
    first = json.loads(path.read_text().splitlines()[0])
    expected = data_files.read(mrcr, ['mrcr'], 512, 1, model())[0]
    parquet.write_table(arrow.Table.from_pylist([first]), path.with_suffix('.parquet'))
    path.unlink()
    assert data_files.task_names(mrcr) == ['mrcr']
    assert data_files.read(mrcr, ['mrcr'], 512, 1, model()) == (expected, [])


@pytest.mark.parametrize(('fields', 'message'), [
    ({'input': [{'role': 'user'}]}, "needs messages of a 'role' and a 'content' alone, both text"),
    ({'input': []}, "needs messages of a 'role'"),
    ({'input': CHAT[:2]}, "ends with a message of the role 'assistant'; the last one must be a user's"),
    ({'random_string_to_prepend': 'abc', 'answer': 'xyz', 'prompt': '[]'}, "that begins with 'random_string"),
    ({'random_string_to_prepend': 'x', 'answer': 'xyz', 'prompt': '['}, "a 'prompt' that is not valid JSON"),
    ({'random_string_to_prepend': 'x', 'answer': 'xyz', 'prompt': '{}'}, "needs text or messages in 'input'"),
])
def test_what_is_no_chat_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        samples.from_ruler({'outputs': ['x'], **fields}, 0, 'own', 9)


def test_a_chat_that_a_template_refuses_is_named_with_its_line(mrcr):
    with pytest.raises(ValueError, match='2needle.jsonl line 1: .* refuses these messages: one turn alone'):
        data_files.read(mrcr, ['mrcr'], 512, 9, model(ONE_TURN))
