"""Chat templates: sandboxed Jinja that renders messages in the text format of an instruct model.

The template comes with the model (chat_template.jinja or tokenizer_config.json), so it is untrusted code: it
runs without access to Python and within limits on its work, and any failure in it is a ValueError. It has the
functions that transformers' apply_chat_template provides, so that a folder renders alike in both.
"""

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from lct import json_files
from lct.data import tokenizer_settings
from lct.data.template_environment import Environment, limited, make_strftime
from lct.data.template_limits import MAX_DEPTH, LimitExceeded
from lct.data.tokenizer import Tokenizer
from lct.json_files import short_repr

REASONING = ('reasoning_content', 'thinking', 'reasoning')  # names of one field of a message
PRIVATE_USE = range(0xE000, 0xF900)
MAX_SOURCE = 64_000  # characters; the longest of published models have about 20,000
MAX_ERROR = 300  # characters of a message that the template itself words


class ChatTemplate:
    """render(messages) -> text; encode(tokenizer, messages) -> ids.

    messages: dicts with role, content, and other fields that the template reads (tool_calls, ...), of plain
    JSON values. name: of the template in errors.
    """

    def __init__(self, source: str, tokens: dict[str, str] | None = None, name: str = 'chat template'):
        """tokens: {'bos_token': its spelling, ...}."""
        self.source, self.tokens, self.name = source, tokens or {}, name
        if len(source) > MAX_SOURCE:
            raise ValueError(f'{name} has {len(source):,} characters, more than {MAX_SOURCE:,}; it is not a '
                             "chat template, so take that of the model's publisher")
        try:
            with limited():
                self._template = Environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f'{name}, line {error.lineno}: {_shorten(error.message)}; correct the '
                             'template') from None
        except Exception as error:  # of Python's own compiler, such as for hundreds of nested brackets
            raise ValueError(f'{name} cannot be compiled ({_describe(error)}); correct the '
                             'template') from None

    def render(self, messages: Sequence[dict], *, add_generation_prompt: bool = False, tools: Any = None,
               documents: Any = None, now: datetime.datetime | None = None, **variables: Any) -> str:
        """The text of messages, with special tokens spelled out.

        Args:
          add_generation_prompt: end with the opening of the assistant's answer.
          tools, documents: as the template expects them.
          now: the time for strftime_now, for reproducible prompts; default is the clock.
          variables: others that the template reads, such as date_string.
        Raises:
          ValueError: if the template refuses the messages or fails on them.
        """
        if not messages:
            raise ValueError(f'{self.name}: there are no messages; give at least one')
        values = _plain({'messages': list(map(_normalized, messages)), 'tools': tools, 'documents': documents,
                         **variables}, self.name)
        now = now or datetime.datetime.now()
        try:
            with limited(values, self.tokens):
                return self._template.render(
                    {'strftime_now': make_strftime(now), **self.tokens, **values,
                     'add_generation_prompt': add_generation_prompt})
        except LimitExceeded as error:
            raise ValueError(f'{self.name} {error} for these messages, far more than a chat template needs; '
                             "take the template of the model's publisher, or correct it") from None
        except jinja2.TemplateError as error:
            raise ValueError(f'{self.name} refuses these messages: {_shorten(error)}') from None
        except Exception as error:  # untrusted code may raise anything
            raise ValueError(f'{self.name} fails on these messages: {_describe(error)}; correct one of '
                             'them') from None

    def encode(self, tokenizer: Tokenizer, messages: Sequence[dict], **options: Any) -> list[int]:
        """Token ids of render(messages, **options).

        Only the template can write special tokens, and others that it names: one that is spelled in a message
        is plain text, so no message can end its own turn.
        """
        messages = _plain(list(messages), self.name)
        options = {key: x if key == 'now' else _plain(x, self.name) for key, x in options.items()}
        control = {*tokenizer.special_tokens, *(
            one for one in tokenizer.added_tokens if one in self.source and not one.isspace())}
        spellings = sorted(map(re.escape, control), key=len, reverse=True)
        pattern = re.compile('|'.join(spellings) or '(?!)')
        everything = json.dumps([messages, options], ensure_ascii=False, default=str) + self.source
        separator = next(chr(x) for x in PRIVATE_USE if chr(x) not in everything)

        def escape(value):
            if isinstance(value, str):
                return pattern.sub(lambda match: match[0][0] + separator + match[0][1:], value)
            if isinstance(value, dict):
                return {key: escape(x) for key, x in value.items()}
            return [escape(x) for x in value] if isinstance(value, (list, tuple)) else value

        return tokenizer.encode_special(self.render(escape(messages), **escape(options)), drop=separator)


class MissingTemplate(ValueError):
    """A folder without any chat template: that of a base model."""


def load(folder: str | Path, name: str = 'default') -> ChatTemplate:
    """The ChatTemplate of a Hugging Face folder; name selects one where there are several.

    Raises:
      MissingTemplate: if the folder has none at all.
      ValueError: if none has that name, or if it is invalid.
    """
    folder = Path(folder)
    settings = _read_object(folder / 'tokenizer_config.json')
    named = tokenizer_settings.read(folder).named
    tokens = {name: token['content'] for name, token in named.items() if token}
    path = folder / 'additional_chat_templates' / f'{name}.jinja'
    if name == 'default':
        path = folder / 'chat_template.jinja'
    if path.is_file():
        return ChatTemplate(_read_text(path), tokens, str(path))
    for path, values in ((folder / 'chat_template.json', _read_object(folder / 'chat_template.json')),
                         (folder / 'tokenizer_config.json', settings)):
        templates = _templates(values.get('chat_template'), path)
        if name in templates:
            return ChatTemplate(templates[name], tokens, f'chat_template {name!r} of {path}')
        if templates:
            raise ValueError(f'{path} has the chat templates {short_repr(sorted(templates))}, and none is '
                             f'named {name!r}; correct the file or ask for one of them')
    raise MissingTemplate(f'{folder} has no chat template (chat_template.jinja, or chat_template in '
                     'tokenizer_config.json): it is a base model; take the template of its instruct version')


def _templates(value: Any, path: Path) -> dict[str, str]:
    """{name: template} of a field chat_template: a list of named templates, one without a name, or None."""
    if value is None:
        return {}
    pairs = [('default', value)]
    if isinstance(value, list):
        pairs = [(one.get('name'), one.get('template')) if isinstance(one, dict) else (one, None)
                 for one in value]
    for name, template in pairs:
        if not isinstance(name, str) or not isinstance(template, str):
            raise ValueError(f'{path} has a chat_template {short_repr(name)} that is {short_repr(template)} '
                             'instead of a name and text; correct the file')
    return dict(pairs)


def _shorten(message: Any) -> str:
    text = str(message)
    return text if len(text) <= MAX_ERROR else text[:MAX_ERROR] + '...'


def _describe(error: Exception) -> str:
    return f'{type(error).__name__}: {_shorten(error)}'


def _normalized(message: Any) -> Any:
    """A message as transformers gives it to a template: without fields that are null, and with its reasoning
    under the names that templates read."""
    if not isinstance(message, dict):
        return message
    message = {key: x for key, x in message.items() if x is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is not None:
        message = {'thinking': reasoning, **message, 'reasoning_content': reasoning}
    return message


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """A copy of value, which must be plain JSON values: a template could call methods of an object."""
    if depth > MAX_DEPTH:
        raise ValueError(f'{name}: the messages are nested more than {MAX_DEPTH} deep; pass flatter ones')
    if isinstance(value, dict):
        return {_plain(key, name): _plain(x, name, depth + 1) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x, name, depth + 1) for x in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise ValueError(f'{name}: {value!r} of type {type(value).__name__} is not a plain JSON value; pass '
                     'messages of dicts, lists, strings and numbers')


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if the file is missing."""
    return json_files.read_json(path) if path.is_file() else {}


def _read_text(path: Path) -> str:
    with path.open('rb') as file:
        content = file.read(4 * MAX_SOURCE + 1)  # no more of a large file than shows that it is one
    try:
        return content.decode('utf-8')
    except UnicodeDecodeError:
        raise ValueError(f'{path} is not UTF-8 text of a chat template; copy it again') from None
