"""Bodies of requests and objects of answers, as clients of the OpenAI API send and read them."""

import json

import pytest

from lct.models.sampling import Sampling
from lct.serve import requests, responses
from lct.serve.errors import ApiError
from lct.serve.responses import Answer, End, Text, Token

USER = [{'role': 'user', 'content': 'hi'}]
CHAT, COMPLETION = {'model': 'm', 'messages': USER}, {'model': 'm', 'prompt': 'hi'}


def parse(fields, **changes):
    return requests.parse({**fields, **changes}, 'messages' in fields, 'm')


def test_a_request_has_the_defaults_of_the_api():
    chat, completion = parse(CHAT), parse(COMPLETION)
    assert chat == requests.Query(USER, None, None, (), Sampling(1.0, 1.0), None, None, False, False)
    assert completion == requests.Query(None, 'hi', 16, (), Sampling(1.0, 1.0), None, None, False, False)
    assert requests.parse({'prompt': 'hi'}, False, 'any name') == completion


def test_fields_are_read():
    query = parse(CHAT, max_tokens=5, max_completion_tokens=5, stop='a', seed=-3, temperature=0.5, top_p=0.9,
                  logprobs=True, top_logprobs=2, stream=True, stream_options={'include_usage': True}, n=1,
                  user='me', response_format={'type': 'text'}, presence_penalty=0.0, tools=None)
    assert query == requests.Query(USER, None, 5, ('a',), Sampling(0.5, 0.9), -3, 2, True, True)
    assert parse(CHAT, logprobs=True).logprobs == 0 and parse(CHAT, logprobs=False).logprobs is None
    assert parse(COMPLETION, logprobs=3, stop=['a', 'b']).stops == ('a', 'b')
    assert parse(CHAT, max_tokens=None, stop=None, seed=None, temperature=None) == parse(CHAT)


@pytest.mark.parametrize('changes', [{'temperature': 0}, {'temperature': 0, 'top_p': 0.5}, {'top_p': 0}])
def test_a_temperature_of_zero_is_greedy(changes):
    assert parse(CHAT, **changes).sampling is None


def test_prompts_are_one_text_or_its_tokens():
    assert parse({'prompt': ['hi']}).prompt == 'hi'
    assert parse({'prompt': [[1, 2]]}).prompt == parse({'prompt': [1, 2]}).prompt == [1, 2]


def test_the_parts_of_a_message_are_joined():
    parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
    messages = [{'role': 'developer', 'content': 'c'}, {'role': 'user', 'content': parts, 'name': 'me'}]
    assert parse({'messages': messages}).messages == [
        {'role': 'system', 'content': 'c'}, {'role': 'user', 'content': 'ab'}]


@pytest.mark.parametrize(('fields', 'changes', 'param', 'message'), [
    (CHAT, {'n': 2}, 'n', '2 is not supported; leave it out'),
    (CHAT, {'n': True}, 'n', 'is not supported'),
    (CHAT, {'tools': [{}]}, 'tools', 'is not supported'),
    (CHAT, {'response_format': {'type': 'json_object'}}, 'response_format', 'is not supported'),
    (CHAT, {'frequency_penalty': 0.1}, 'frequency_penalty', 'is not supported'),
    (COMPLETION, {'echo': True}, 'echo', 'is not supported'),
    (CHAT, {'temprature': 0}, "'temprature'", "unknown field 'temprature'"),
    (CHAT, {'prompt': 'hi'}, "'prompt'", 'unknown field'),
    (CHAT, {'model': 'other'}, 'model', "the model 'other' does not exist; use 'm'"),
    (CHAT, {'messages': []}, 'messages', 'must be a list of at least one message'),
    (CHAT, {'messages': ['hi']}, 'messages[0]', 'must be an object whose role is one of'),
    (CHAT, {'messages': [{'role': 'user'}]}, 'messages[0].content', 'must be a text, got nothing'),
    (CHAT, {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 'messages[0].content[0]',
     "must be of the type 'text'"),
    (CHAT, {'messages': [{'role': 'assistant', 'content': '', 'tool_calls': [1]}]}, 'messages[0].tool_calls',
     'are not supported'),
    (COMPLETION, {'prompt': None}, 'prompt', 'must be a text, got nothing'),
    (COMPLETION, {'prompt': ['a', 'b']}, 'prompt', 'must be one text or one list of token ids'),
    (COMPLETION, {'prompt': [True]}, 'prompt', 'must be one text or one list of token ids'),
    (COMPLETION, {'prompt': []}, 'prompt', 'must be one text or one list of token ids'),
    (COMPLETION, {'prompt': 'a\ud800'}, 'prompt', r"has half of a character, '\ud800'"),
    (CHAT, {'max_tokens': 0}, 'max_tokens', '0 must be a whole number in 1..'),
    (CHAT, {'max_tokens': 4, 'max_completion_tokens': 5}, 'max_tokens', '4 is not the 5 of max_completion'),
    (CHAT, {'temperature': 2.5}, 'temperature', '2.5 is not in 0..2'),
    (CHAT, {'temperature': '0'}, 'temperature', "'0' must be a number"),
    (CHAT, {'temperature': 10**400}, 'temperature', 'must be a number'),
    (CHAT, {'top_p': -1}, 'top_p', '-1 is not in 0..1'),
    (CHAT, {'seed': 1.5}, 'seed', '1.5 must be a whole number'),
    (CHAT, {'stop': ['a', '']}, 'stop', 'has an empty text'),
    (CHAT, {'stop': ['a'] * 17}, 'stop', 'up to 16'),
    (CHAT, {'stop': [1]}, 'stop', 'must be a text, got a number'),
    (CHAT, {'top_logprobs': 1}, 'top_logprobs', 'needs logprobs to be true'),
    (CHAT, {'logprobs': 1}, 'logprobs', 'must be true or false, got a number'),
    (COMPLETION, {'logprobs': 21}, 'logprobs', '21 must be a whole number in 0..20'),
    (CHAT, {'stream': 'yes'}, 'stream', 'must be true or false, got a text'),
    (CHAT, {'stream_options': {}}, 'stream_options', 'only where stream is true'),
])
def test_what_is_wrong_is_refused_by_its_name(fields, changes, param, message):
    with pytest.raises(ApiError) as raised:
        parse(fields, **changes)
    error = raised.value.body()['error']
    assert error['param'] == param and message in error['message']
    assert error['type'] == 'invalid_request_error'
    assert raised.value.status == (404 if param == 'model' else 400)


@pytest.mark.parametrize(('body', 'message'), [
    (b'{', 'the body is not valid JSON'), (b'\xff', 'the body is not valid JSON'),
    (b'{"a": NaN}', 'NaN is not a number of JSON'), (b'[' * 100_000, 'nested too deep'),
    (b'9' * 10_000, 'the body is not valid JSON'), (b'[]', 'the body is a list'),
    (b'null', 'the body is nothing'),
])
def test_a_body_that_is_no_object_is_refused(body, message):
    with pytest.raises(ApiError, match=message):
        requests.parse_body(body)


END = End('stop', prompt=7, reused=3, answered=2)
USAGE = {'prompt_tokens': 7, 'completion_tokens': 2, 'total_tokens': 9,
         'prompt_tokens_details': {'cached_tokens': 3}}
TOKENS = [Token('a', -0.5, {'a': -0.5, 'c': -1.5}), Token('\N{REPLACEMENT CHARACTER}', -1.0, {})]


def test_a_whole_answer():
    chat = Answer(parse(CHAT), 'm').whole([Text('a'), Text('b'), END])
    assert chat['object'] == 'chat.completion' and chat['model'] == 'm' and chat['usage'] == USAGE
    assert chat['choices'] == [{'index': 0, 'logprobs': None, 'finish_reason': 'stop',
                                'message': {'role': 'assistant', 'content': 'ab', 'refusal': None}}]
    completion = Answer(parse(COMPLETION), 'm').whole([Text('ab'), END])
    assert completion['object'] == 'text_completion'
    assert completion['choices'] == [{'index': 0, 'logprobs': None, 'finish_reason': 'stop', 'text': 'ab'}]


def test_log_probabilities():
    choice = Answer(parse(CHAT, logprobs=True), 'm').whole([Text('ab', TOKENS), END])['choices'][0]
    assert choice['logprobs']['content'] == [
        {'token': 'a', 'logprob': -0.5, 'bytes': [97], 'top_logprobs': [
            {'token': 'a', 'logprob': -0.5, 'bytes': [97]}, {'token': 'c', 'logprob': -1.5, 'bytes': [99]}]},
        {'token': '\N{REPLACEMENT CHARACTER}', 'logprob': -1.0, 'bytes': None, 'top_logprobs': []}]
    answer = Answer(parse(COMPLETION, logprobs=2, stream=True), 'm')
    parts = [next(answer.chunks(Text('', TOKENS)))['choices'][0]['logprobs'] for _ in range(2)]
    assert parts[0] == {'tokens': ['a', '\N{REPLACEMENT CHARACTER}'], 'token_logprobs': [-0.5, -1.0],
                        'top_logprobs': [{'a': -0.5, 'c': -1.5}, {}], 'text_offset': [0, 1]}
    assert parts[1]['text_offset'] == [2, 3]


def test_the_chunks_of_a_stream():
    answer = Answer(parse(CHAT, stream=True, stream_options={'include_usage': True}), 'm')
    chunks = [*answer.opening(), *answer.chunks(Text('a')), *answer.chunks(END)]
    assert {chunk['object'] for chunk in chunks} == {'chat.completion.chunk'}
    assert len({chunk['id'] for chunk in chunks}) == 1
    choices = [chunk['choices'][0] for chunk in chunks[:-1]]
    assert [choice['delta'] for choice in choices] == [
        {'role': 'assistant', 'content': ''}, {'content': 'a'}, {}]
    assert [choice['finish_reason'] for choice in choices] == [None, None, 'stop']
    assert chunks[-1]['choices'] == [] and [chunk['usage'] for chunk in chunks] == [None] * 3 + [USAGE]
    answer = Answer(parse(COMPLETION, stream=True), 'm')
    chunks = [*answer.opening(), *answer.chunks(Text('a')), *answer.chunks(END)]
    assert [chunk['choices'][0]['text'] for chunk in chunks] == ['a', '']
    assert all('usage' not in chunk for chunk in chunks)


def test_a_server_sent_event_is_one_line_of_json():
    event = responses.server_sent({'text': 'a\n\nä\r'})
    assert event.startswith(b'data: {') and event.endswith(b'}\n\n') and event.count(b'\n') == 2
    assert json.loads(event[6:]) == {'text': 'a\n\nä\r'}
