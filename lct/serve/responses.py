"""The JSON objects of answers: one for a whole answer, or one for each event of a stream.

A Text is a piece of an answer with the tokens that it consists of; an End says why and with which counts.
"""

import dataclasses
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lct.serve.requests import Query

DONE = b'data: [DONE]\n\n'


class Token(NamedTuple):
    """A token of an answer. logprob: in nats. top: {text of a token: logprob} of the most likely ones."""

    text: str
    logprob: float
    top: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Text:
    """The next text of an answer, which may be empty; tokens: those since the Text before, if asked for."""

    text: str
    tokens: Sequence[Token] = ()


@dataclasses.dataclass(frozen=True)
class End:
    """reason: 'stop' or 'length'. Numbers of tokens: of the prompt, those of it that were reused, and of the
    answer."""

    reason: str
    prompt: int
    reused: int
    answered: int


class Answer:
    """Formats the events of one answer to a Query."""

    def __init__(self, query: Query, model: str):
        self._query = query
        kind = 'chat.completion' if query.chat else 'text_completion'
        prefix = 'chatcmpl-' if query.chat else 'cmpl-'
        chunk = '.chunk' if query.stream and query.chat else ''
        self._head = {'id': prefix + uuid.uuid4().hex, 'object': kind + chunk, 'created': int(time.time()),
                      'model': model}
        self._offset = 0  # characters of the answer before the next token

    def whole(self, events: Iterable[Text | End]) -> dict[str, Any]:
        """The object of an answer whose events have all arrived."""
        *texts, end = events
        text = ''.join(one.text for one in texts)
        logprobs = self._logprobs([token for one in texts for token in one.tokens])
        choice = {'index': 0, 'logprobs': logprobs, 'finish_reason': end.reason}
        if self._query.chat:
            choice['message'] = {'role': 'assistant', 'content': text, 'refusal': None}
        else:
            choice['text'] = text
        return {**self._head, 'choices': [choice], 'usage': usage(end)}

    def opening(self) -> Iterator[dict[str, Any]]:
        """The object before the first text of a stream: a chat names the role."""
        if self._query.chat:
            yield self._chunk({'role': 'assistant', 'content': ''}, None, None)

    def chunks(self, event: Text | End) -> Iterator[dict[str, Any]]:
        """The objects of one event of a stream."""
        if isinstance(event, Text):
            yield self._chunk(event.text, self._logprobs(event.tokens), None)
            return
        yield self._chunk({} if self._query.chat else '', None, event.reason)
        if self._query.include_usage:
            yield {**self._head, 'choices': [], 'usage': usage(event)}

    def _chunk(self, content, logprobs, reason):
        choice = {'index': 0, 'logprobs': logprobs, 'finish_reason': reason}
        if self._query.chat:
            choice['delta'] = {'content': content} if isinstance(content, str) else content
        else:
            choice['text'] = content
        counted = {'usage': None} if self._query.include_usage else {}
        return {**self._head, 'choices': [choice], **counted}

    def _logprobs(self, tokens):
        if self._query.logprobs is None:
            return None
        if self._query.chat:
            return {'content': [_chat_token(one) for one in tokens], 'refusal': None}
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {'tokens': [one.text for one in tokens], 'token_logprobs': [one.logprob for one in tokens],
                'top_logprobs': [one.top for one in tokens], 'text_offset': offsets}


def _chat_token(token):
    return {**_named_logprob(token.text, token.logprob),
            'top_logprobs': [_named_logprob(*one) for one in token.top.items()]}


def _named_logprob(text, logprob):
    incomplete = '\N{REPLACEMENT CHARACTER}' in text  # a part of a character, whose bytes are not known
    return {'token': text, 'logprob': logprob, 'bytes': None if incomplete else list(text.encode())}


def usage(end: End) -> dict[str, Any]:
    """Counts of tokens, as the API names them."""
    return {'prompt_tokens': end.prompt, 'completion_tokens': end.answered,
            'total_tokens': end.prompt + end.answered,
            'prompt_tokens_details': {'cached_tokens': end.reused}}


def models(model: str, created: int, length: int) -> dict[str, Any]:
    """The object of the route for models. length: tokens of a prompt with its answer."""
    one = {'id': model, 'object': 'model', 'created': created, 'owned_by': 'lct', 'max_model_len': length}
    return {'object': 'list', 'data': [one]}


def server_sent(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b'data: ' + encode(value) + b'\n\n'


def encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':')).encode()
