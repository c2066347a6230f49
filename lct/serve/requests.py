"""Request bodies of the completion routes: parsed and checked, or refused with the field that is wrong.

Fields of the API that would change an answer and that are not supported are refused unless they have the
value that changes nothing; so are unknown fields, in which a misspelled name would be lost.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from lct.json_files import short_repr
from lct.models.sampling import Sampling, at_temperature
from lct.serve.errors import ApiError, invalid

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 2.0
COMPLETION_TOKENS = 16  # of a completion that does not set max_tokens, as in the API
IGNORED = {'user', 'metadata', 'store', 'service_tier', 'safety_identifier', 'prompt_cache_key',
           'prompt_cache_retention', 'parallel_tool_calls'}  # about accounts and storage, or about tools
# Fields that would change the answer, and the values that do not.
NEUTRAL = {
    'n': (1, None), 'best_of': (1, None), 'presence_penalty': (0, None), 'frequency_penalty': (0, None),
    'logit_bias': ({}, None), 'tools': ([], None), 'tool_choice': ('none', 'auto', None),
    'functions': ([], None), 'function_call': ('none', 'auto', None),
    'response_format': ({'type': 'text'}, None),
    'echo': (False, None), 'suffix': ('', None), 'modalities': (['text'], None), 'audio': (None,),
    'reasoning_effort': ('none', None), 'top_k': (0, -1, None), 'min_p': (0, None),
    'repetition_penalty': (1, None), 'web_search_options': (None,), 'prediction': (None,),
    'verbosity': ('medium', None),
}
COMMON = {'model', 'stream', 'stream_options', 'stop', 'seed', 'max_tokens', 'temperature', 'top_p',
          'logprobs'}
CHAT = COMMON | {'messages', 'max_completion_tokens', 'top_logprobs'}
COMPLETION = COMMON | {'prompt'}


@dataclasses.dataclass(frozen=True)
class Query:
    """A request for one answer.

    messages: of a chat, else None. prompt: a text or token ids to continue, else None.
    max_new_tokens: None for as many as fit. sampling: None for greedy decoding. seed: None for a new one.
    logprobs: number of alternatives to report beside every token, None for no log-probabilities.
    stream: events instead of one object; include_usage: the last event counts the tokens.
    """

    messages: list[dict] | None
    prompt: str | list[int] | None
    max_new_tokens: int | None
    stops: tuple[str, ...]
    sampling: Sampling | None
    seed: int | None
    logprobs: int | None
    stream: bool
    include_usage: bool

    @property
    def chat(self) -> bool:
        return self.messages is not None


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object in a request body. Raises ApiError."""
    def refuse(name):
        raise ValueError(f'{name} is not a number of JSON')

    try:
        value = json.loads(body.decode('utf-8'), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        reason = 'it is nested too deep' if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f'the body is not valid JSON ({reason}); send one JSON object') from None
    if not isinstance(value, dict):
        raise ApiError(400, f'the body is {_kind(value)}; send one JSON object')
    return value


def parse(fields: Mapping[str, Any], chat: bool, model: str) -> Query:
    """The Query of a request body.

    chat: of the route for chats; else of the route for completions. model: the name of the model.

    Raises:
      ApiError: naming the first field that is wrong or not supported.
    """
    _check_names(fields, CHAT if chat else COMPLETION)
    if (name := fields.get('model')) is not None and name != model:
        raise ApiError(404, f'the model {short_repr(name)} does not exist; use {model!r}', 'model',
                       'model_not_found')
    stream = _boolean(fields, 'stream')
    options = fields.get('stream_options')
    if options is not None and (not isinstance(options, dict) or not stream):
        raise invalid('stream_options', 'must be an object, and only where stream is true')
    return Query(
        messages=_messages(fields) if chat else None,
        prompt=None if chat else _prompt(fields),
        max_new_tokens=_max_new_tokens(fields, chat),
        stops=_stops(fields),
        sampling=_sampling(fields),
        seed=_integer(fields, 'seed', -2**63, 2**64 - 1),
        logprobs=_chat_logprobs(fields) if chat else _integer(fields, 'logprobs', 0, MAX_LOGPROBS),
        stream=stream,
        include_usage=_boolean(options or {}, 'include_usage'),
    )


def _check_names(fields, known):
    for name, value in fields.items():
        if name in NEUTRAL:
            if not any(value == neutral and type(value) is not bool or value is neutral
                       for neutral in NEUTRAL[name]):
                raise invalid(name, f'{short_repr(value)} is not supported; leave it out',
                              'unsupported_parameter')
        elif name not in known and name not in IGNORED:
            raise ApiError(400, f'unknown field {short_repr(name)}; leave it out', short_repr(name),
                           'unknown_parameter')


def _messages(fields):
    """Messages with text for content, as chat templates read them."""
    messages = fields.get('messages')
    if not isinstance(messages, list) or not messages:
        raise invalid('messages', f'must be a list of at least one message, got {_kind(messages)}')
    return [_message(one, f'messages[{i}]') for i, one in enumerate(messages)]


def _message(one, place):
    if not isinstance(one, dict) or one.get('role') not in ROLES:
        raise invalid(place, f'must be an object whose role is one of {", ".join(ROLES)}')
    if one.get('tool_calls') or one.get('function_call'):
        raise invalid(f'{place}.tool_calls', 'are not supported; send their results as text')
    content = one.get('content')
    if isinstance(content, list):
        content = ''.join(_text_part(part, f'{place}.content[{i}]') for i, part in enumerate(content))
    role = 'system' if one['role'] == 'developer' else one['role']  # the same, in the names of templates
    return {'role': role, 'content': _text(content, f'{place}.content')}


def _text_part(part, place):
    if not isinstance(part, dict) or part.get('type') != 'text':
        raise invalid(place, "must be of the type 'text'; the model reads nothing else")
    return _text(part.get('text'), f'{place}.text')


def _prompt(fields):
    prompt = fields.get('prompt')
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list):
        if not prompt or not all(type(x) is int for x in prompt):
            raise invalid('prompt', 'must be one text or one list of token ids; send one request for each')
        return prompt
    return _text(prompt, 'prompt')


def _text(value, place):
    if not isinstance(value, str):
        raise invalid(place, f'must be a text, got {_kind(value)}')
    if lone := re.search('[\ud800-\udfff]', value):
        raise invalid(place, f'has half of a character, {lone[0]!a}; send whole characters')
    return value


def _max_new_tokens(fields, chat):
    limits = [_integer(fields, name, 1, 2**31) for name in ('max_completion_tokens', 'max_tokens')
              if name in fields]
    given = [limit for limit in limits if limit is not None]
    if len(set(given)) > 1:
        raise invalid('max_tokens', f'{given[1]} is not the {given[0]} of max_completion_tokens; send one')
    return given[0] if given else None if chat else COMPLETION_TOKENS


def _stops(fields):
    stops = fields.get('stop')
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise invalid('stop', f'must be a text or up to {MAX_STOPS} of them')
    stops = tuple(_text(stop, 'stop') for stop in stops)
    if not all(stops):
        raise invalid('stop', 'has an empty text, which would stop every answer at once; leave it out')
    return stops


def _sampling(fields):
    """None for temperature 0; the API's default is 1."""
    temperature = _number(fields, 'temperature', 1.0)
    top_p = _number(fields, 'top_p', 1.0)
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise invalid('temperature', f'{temperature:g} is not in 0..{MAX_TEMPERATURE:g}; 0 is greedy')
    if not 0 <= top_p <= 1:
        raise invalid('top_p', f'{top_p:g} is not in 0..1')
    return at_temperature(temperature, top_p) if top_p else None


def _chat_logprobs(fields):
    wanted, count = _boolean(fields, 'logprobs'), _integer(fields, 'top_logprobs', 0, MAX_LOGPROBS)
    if count and not wanted:
        raise invalid('top_logprobs', 'needs logprobs to be true')
    return (count or 0) if wanted else None


def _boolean(fields, name):
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(name, f'must be true or false, got {_kind(value)}')
    return bool(value)


def _integer(fields, name, low, high):
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise invalid(name, f'{short_repr(value)} must be a whole number in {low}..{high}')
    return value


def _number(fields, name, default):
    value = fields.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(_float(value)):
        raise invalid(name, f'{short_repr(value)} must be a number')
    return _float(value)


def _float(value):
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def _kind(value):
    """What a JSON value is, for an error."""
    names = {dict: 'an object', list: 'a list', str: 'a text', bool: 'true or false', type(None): 'nothing'}
    return names.get(type(value), 'a number')
