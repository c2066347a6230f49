"""One interface to the tokenizers of Llama checkpoints.

No method adds a special token, and only encode_special recognises one that is spelled in the text.
"""

import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lct import bucket_cache
from lct.data import tokenizer_backend, tokenizer_files
from lct.data.tokenizer_backend import EOS_NAMES, LLAMA3_BOS
from lct.data.tokenizer_files import library_errors

if TYPE_CHECKING:
    import tokenizers

# Llama-3's pre-tokenization. `train` changes only the number of digits that stay together.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Llama-3.1's names of the 256 ids after the ranks; in Llama-3, ids 4, 8 and 10 of them are reserved.
LLAMA3_SPECIALS = (
    '<|begin_of_text|>', '<|end_of_text|>', '<|reserved_special_token_0|>', '<|reserved_special_token_1|>',
    '<|finetune_right_pad_id|>', '<|reserved_special_token_2|>', '<|start_header_id|>', '<|end_header_id|>',
    '<|eom_id|>', '<|eot_id|>', '<|python_tag|>', *(f'<|reserved_special_token_{i}|>' for i in range(3, 248)))
# Texts on which patterns with catastrophic backtracking take long, and others some milliseconds.
PROBES = ('a', '7', ' ', '.', '\n', 'Ab', 'a ', "a'")
PROBE_SIZES = tuple(2**i for i in range(10))
SLOW_S = 1.0


class Tokenizer:
    """encode(text) -> ids without special tokens; decode(ids) -> text without special tokens.

    vocab_size: every id is below it. bos_id, eos_id: None where there is none.
    special_tokens: {spelling: id}. added_tokens: the same of all tokens that are matched as they are spelled,
      the special ones included.
    fingerprint: sha256 of the definition, equal for two tokenizers that give the same ids.
    """

    def __init__(self, vocab_size: int, bos_id: int | None, eos_id: int | None, definition: bytes,
                 special_tokens: dict[str, int] | None = None, added_tokens: dict[str, int] | None = None):
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.special_tokens = special_tokens or {}
        self.added_tokens = added_tokens or self.special_tokens
        digest = hashlib.sha256(definition)
        digest.update(f' vocab_size={vocab_size} bos_id={bos_id} eos_id={eos_id}'.encode())
        self.fingerprint = digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def split_stream(self, stream: Iterable[str], size: int = 2**14,
                     max_size: int = 2**23) -> Iterator[tuple[str, bool]]:
        """Cut the text that a stream of str amounts to into segments of about `size` characters.

        Most cuts are at line ends.

        Yields:
          (segment, exact) in order. exact: the ids of this segment and of the next, concatenated, are those
          of the uncut text, as tested with the characters around the cut. Where a tokenizer has no such
          place, a segment grows to max_size characters and is then cut anywhere.
        """
        text, start, target = '', 0, size
        for chunk in stream:
            text, start = text[start:] + chunk, 0
            while len(text) - start > target:
                end = self._exact_cut(text, start, start + target)
                if end is None and target < max_size:
                    target = min(2 * target, max_size)
                    continue
                exact, end = end is not None, end or start + target
                yield text[start:end], exact
                start, target = end, size
        yield text[start:], True

    def _exact_cut(self, text: str, start: int, stop: int, tries: int = 8, context: int = 64) -> int | None:
        """The last place in text[start:stop] where a cut leaves the ids as they are.

        `tries` places of each kind are tried.
        """
        cut_points = _cut_points(text, start, stop)
        for place in itertools.chain(*(itertools.islice(kind, tries) for kind in cut_points)):
            before, after = text[max(place - context, 0):place], text[place:place + context]
            if self.encode(before) + self.encode(after) == self.encode(before + after):
                return place
        return None

    def encode_special(self, text: str, drop: str = '') -> list[int]:
        """Like encode, but a special token that is spelled in the text becomes its id.

        It is for rendered chats, not for documents.

        drop: a character that is removed after special tokens were recognised: within a spelling it makes it
          plain text.
        """
        spellings = sorted(map(re.escape, self.special_tokens), key=len, reverse=True)
        plain_and_special = re.split(f'({"|".join(spellings)})', text) if spellings else [text]
        ids = []
        for plain, special in zip(plain_and_special[::2], [*plain_and_special[1::2], None]):
            ids += self.encode(plain.replace(drop, '') if drop else plain)
            ids += [] if special is None else [self.special_tokens[special]]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        raise NotImplementedError


class BytesTokenizer(Tokenizer):
    """Ids 0..255 are the bytes of UTF-8, 256 is bos, 257 is eos."""

    def __init__(self):
        super().__init__(258, 256, 257, b'bytes')

    def encode(self, text: str) -> list[int]:
        return list(text.encode('utf-8'))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode('utf-8', errors='replace')


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the Hugging Face tokenizers library, and what the files beside it add.

    Ids are those of transformers (tokenizer_backend): of encode with split_special_tokens=True, because
    '<|end_of_text|>' inside a document is text about tokenizers, not the end of the document; of
    encode_special as apply_chat_template makes them. bos_id is None where transformers puts no BOS.
    """

    def __init__(self, path: Path):
        definition = tokenizer_files.read_json(path)
        self._path = path
        self._backend = tokenizer_backend.load(path, definition)
        self._tokenizer = self._backend.library
        self._tokenizer.encode_special_tokens = True
        with library_errors(path, 'is not a tokenizer.json of the tokenizers library'):
            added = self._tokenizer.get_added_tokens_decoder()
            vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not vocab_size:
            raise ValueError(f"{path} has no tokens; give the tokenizer.json of the model, or 'bytes'")
        content = json.dumps(definition, sort_keys=True) + self._backend.changes
        super().__init__(vocab_size, self._backend.bos_id, self._backend.eos_id, content.encode(),
                         {token.content: i for i, token in added.items() if token.special and token.content},
                         {token.content: i for i, token in added.items() if token.content})
        self._check_speed()

    def _check_speed(self) -> None:
        """Refuse a tokenizer whose patterns take seconds for a short text: they would for any corpus."""
        start = time.thread_time()
        for size in PROBE_SIZES:
            for one in PROBES:
                self.encode(one * size + '!\n' + one * size)
                if (seconds := time.thread_time() - start) > SLOW_S:
                    raise ValueError(
                        f'{self._path} takes {seconds:.1f} s for a text of {2 * size} times {one!r}; its '
                        "regex is broken or hostile, so give the tokenizer of the model's publisher")

    def encode(self, text: str) -> list[int]:
        with library_errors(self._path, f'cannot encode a text of {len(text):,} characters'):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        # 'fast': without offsets, which are not needed
        texts = list(texts)
        with library_errors(self._path, f'cannot encode {len(texts)} texts'):
            return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_special(self, text: str, drop: str = '') -> list[int]:
        if self._backend.splits_special:
            return self.encode(text.replace(drop, '') if drop else text)
        if drop and drop in text:
            return tokenizer_backend.encode_without(self._path, self._with_special, text, drop)
        with library_errors(self._path, f'cannot encode a text of {len(text):,} characters'):
            return self._with_special.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _with_special(self) -> 'tokenizers.Tokenizer':
        """A copy that recognises special tokens; a switch would not be safe among threads."""
        twin = copy.deepcopy(self._tokenizer)
        twin.encode_special_tokens = False
        return twin

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids]
        with library_errors(self._path, f'cannot decode {len(ids)} ids'):
            return self._tokenizer.decode(ids, skip_special_tokens=True)


class TiktokenTokenizer(Tokenizer):
    """Meta's tokenizer.model: lines of 'base64-of-the-token rank', followed by 256 special tokens."""

    def __init__(self, path: Path):
        import tiktoken
        content = tokenizer_files.read_bytes(path)
        ranks = tokenizer_files.read_mergeable_ranks(path, content)
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f'{path} has no token for {len(missing)} of the 256 bytes, such as '
                             f'{missing[0]}; fetch it again')
        self._num_plain = len(ranks)
        special_tokens = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIALS)}
        with library_errors(path, 'is not a tokenizer.model of the library tiktoken'):
            self._encoding = tiktoken.Encoding(path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks,
                                               special_tokens=special_tokens)
        super().__init__(len(ranks) + len(special_tokens), len(ranks), len(ranks) + 1, content,
                         special_tokens)

    def encode(self, text: str) -> list[int]:
        return [i for segment in _tiktoken_segments(text) for i in self._encoding.encode_ordinary(segment)]

    def decode(self, ids: Iterable[int]) -> str:
        plain = [int(i) for i in ids if i < self._num_plain]
        return self._encoding.decode_bytes(plain).decode('utf-8', errors='replace')


def load(path_or_name: str | os.PathLike) -> Tokenizer:
    """The Tokenizer of a file, a folder or a name.

    These are a tokenizer.json, Meta's tokenizer.model, or a folder with one of them; 'bytes'; or 'llama3',
    Meta's own from the installed package llama-models.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a tokenizer.
    """
    if str(path_or_name) == 'bytes':
        return BytesTokenizer()
    is_llama3 = str(path_or_name) == 'llama3'
    path = installed_llama3_path() if is_llama3 else Path(bucket_cache.local(path_or_name))
    if path.is_dir():
        names = ('tokenizer.json', 'tokenizer.model', 'original/tokenizer.model')
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f'{path} holds neither tokenizer.json nor tokenizer.model; '
                                    "give the file itself, or 'bytes'")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist; give a tokenizer.json, Meta's "
                                "tokenizer.model, a folder that holds one, or 'bytes'")
    return JsonTokenizer(path) if path.suffix == '.json' else TiktokenTokenizer(path)


def installed_llama3_path() -> Path:
    """Meta's tokenizer.model in the installed package llama-models. Raises FileNotFoundError without it."""
    package = importlib.util.find_spec('llama_models')  # found, not imported
    if package is None or package.origin is None:
        raise FileNotFoundError("the tokenizer 'llama3' comes with the package llama-models, under the Llama "
                                "3 Community License; pip install '.[llama3-tokenizer]'")
    return Path(package.origin).parent / 'llama3' / 'tokenizer.model'


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a model whose embedding has fewer rows than the tokenizer has ids."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f'the tokenizer has {tokenizer.vocab_size} ids but the model has vocab_size '
                         f"{vocab_size}; use the checkpoint's own tokenizer, or add rows for its tokens: "
                         'convert_weights.py --resize-embeddings')


def train(texts: Iterable[str], vocab_size: int, path: str | os.PathLike,
          single_token_words: Sequence[str] = ()) -> JsonTokenizer:
    """Train a byte-level BPE with Llama-3's pattern, write it to path (a tokenizer.json) and load it.

    Every ' word' of single_token_words and every pair of digits, with and without a space before it, becomes
    one token, so that the facts of recall data are short in a vocabulary of a thousand. Hence the pattern has
    ' ?\\p{N}{1,2}' in place of Llama-3's '\\p{N}{1,3}'.

    Raises:
      ValueError: if vocab_size is too small for these tokens.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library
    texts = list(texts)
    pattern = LLAMA3_PATTERN.replace(r'\p{N}{1,3}', r' ?\p{N}{1,2}')
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    # BPE merges what is frequent: repeat the required tokens until they are among the most frequent strings.
    repeats = 3000 + sum(map(len, texts)) // 4000
    pairs = [f'{space}{i:02d}' for i in range(100) for space in ('', ' ')]
    required = pairs + [f' {word}' for word in single_token_words]
    required_text = '\n'.join(required)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[LLAMA3_BOS, EOS_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    library.train_from_iterator([*texts, *[required_text] * repeats], trainer)
    split = [text for text in required if len(library.encode(text).ids) > 1]
    if split:
        raise ValueError(f'vocab_size {vocab_size} has no room for {len(split)} of the '
                         f'{len(single_token_words)} words and {len(pairs)} pairs of digits that must be one '
                         f'token (first: {split[0]!r}); use a larger one')
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    library.save(str(path))
    return JsonTokenizer(path)


def _cut_points(text: str, start: int, stop: int) -> tuple[Iterator[int], Iterator[int]]:
    """The places where text[start:stop] may be cut, the last one first.

    They are at line ends and before the spaces between words, if no other white space is next to them.

    The patterns of Llama-3 and GPT-2 never match across such a place.
    """
    def after(mark: str, width: int) -> Iterator[int]:
        at = text.rfind(mark, start + 1, stop)
        while at > 0:
            if not (text[at - 1].isspace() or text[at + 1:at + 2].isspace()):
                yield at + width
            at = text.rfind(mark, start + 1, at)
    return after('\n', 1), after(' ', 0)


def _tiktoken_segments(text: str, max_segment: int = 400_000, max_run: int = 25_000) -> Iterator[str]:
    """Cut text where tiktoken would overflow its stack.

    These are long texts, cut between words if there are any within max_segment characters, and long runs of
    white space or of other characters.
    """
    start = 0
    while start < len(text):
        stop = start + max_segment
        if stop < len(text):
            stop = next(itertools.chain(*_cut_points(text, start, stop)), stop)
        block, last = text[start:stop], 0
        for run in re.finditer(r'\s+|\S+', block):
            for cut in range(run.start() + max_run, run.end(), max_run):
                yield block[last:cut]
                last = cut
        yield block[last:]
        start = stop
