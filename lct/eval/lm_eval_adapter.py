"""EleutherAI's lm-evaluation-harness: its tasks on our mesh, and our own tasks for the harness.

    pip install '.[lm-eval]'
"""

import collections
import json
import logging
from typing import Any

import datasets
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs

from lct.eval import loglikelihood, scoring
from lct.eval.runner import Item, Model
from lct.models.sampling import at_temperature

LOG = logging.getLogger('lct')
MAX_NEW_TOKENS = 256  # for tasks that do not set it, as in the harness's own models


class ShardedLM(TemplateLM):
    """A runner.Model with the interface of the harness.

    Args:
      max_length: tokens of context and continuation; default the model's positions. Longer texts lose their
        beginning, with a warning, as in all models of the harness.
      bos: whether texts begin with the tokenizer's BOS. In the harness's Hugging Face model the
        tokenizer.json decides, and its flag add_bos_token is this one.
    """

    def __init__(self, model: Model, max_length: int | None = None, bos: bool = False, seed: int = 0):
        super().__init__()
        positions = model.config.max_position_embeddings
        if not 1 < (max_length or positions) <= positions:
            raise ValueError(f'max_length {max_length} is not within the {positions} positions of the model')
        if bos and model.tokenizer.bos_id is None:
            raise ValueError('the tokenizer has no BOS to begin texts with; leave bos out')
        self.model, self.max_length, self.bos, self.seed = model, max_length or positions, bos, seed

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one."""
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text that may contain special tokens as text, as chat templates write them."""
        ids = self.model.tokenizer.encode_special(string)
        bos = self.model.tokenizer.bos_id
        add_bos = self.bos if add_special_tokens is None else add_special_tokens and self.bos
        return [bos, *ids] if add_bos and ids[:1] != [bos] else ids

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.model.template.source if self.model.template and chat_template else ''

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """The text of a chat; without a generation prompt the text ends within the last message."""
        if self.model.template is None:
            raise ValueError('the model has no chat template; leave apply_chat_template out')
        if add_generation_prompt:
            return self.model.template.render(chat_history, add_generation_prompt=True)
        *before, last = chat_history
        return self.model.template.render(before, add_generation_prompt=True) + last['content']

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in utils.get_rolling_token_windows(
                    ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += nats
        return totals

    def _loglikelihood_tokens(self, requests, **kwargs):
        pairs = []
        for _, context, continuation in requests:
            excess = len(context) + len(continuation) - self.max_length - 1
            if excess > 0:
                LOG.warning('a context of %d tokens loses its first %d to fit into %d', len(context), excess,
                            self.max_length)
            if len(continuation) > self.max_length:
                raise ValueError(f'a continuation of {len(continuation)} tokens does not fit into the '
                                 f'{self.max_length} of the model; use a task with shorter ones or '
                                 'loglikelihood_rolling')
            pairs.append((context[max(excess, 0):], continuation))
        return loglikelihood.score(self.model, pairs)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        groups = collections.defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        out = [None] * len(requests)
        for group in groups.values():
            settings = normalize_gen_kwargs(requests[group[0]].args[1], MAX_NEW_TOKENS)
            loglikelihood.check_settings(settings)
            limit, stops = settings['max_gen_toks'], [stop for stop in settings.get('until') or [] if stop]
            sampling = None
            if settings['do_sample']:
                sampling = at_temperature(settings['temperature'], settings.get('top_p', 1.0))
            prompts = self._fit([self.tok_encode(requests[i].args[0]) for i in group], limit)
            texts = loglikelihood.generate(self.model, prompts, limit, stops, sampling, self.seed)
            for i, text in zip(group, texts, strict=True):
                out[i] = text
        return out

    def _fit(self, prompts, limit):
        """The last tokens of each prompt, as many as leave room for limit new ones."""
        room = self.max_length - limit
        if room < 1:
            raise ValueError(f'max_gen_toks {limit} leaves no room for a prompt within {self.max_length} '
                             'tokens; use a larger max_length')
        if longer := [len(ids) for ids in prompts if len(ids) > room]:
            LOG.warning('%d prompts of up to %d tokens lose their beginning to fit into %d', len(longer),
                        max(longer), room)
        return [ids[-room:] for ids in prompts]


def tasks(items: list[Item]) -> list[ConfigurableTask]:
    """Tasks named lct_TASK_LENGTH of runner items of the suites ruler and needle.

    Scores are RULER's, 0..1. The plain prompt has one space before the answer prefix, unlike the sample.
    """
    cells = collections.defaultdict(list)
    for item in items:
        cells[item.task, item.length].append(item)
    return [_task(f'lct_{task}_{length}', task, cell) for (task, length), cell in cells.items()]


def _task(name, kind, items):
    samples = [item.make() for item in items]
    rows = [{'prompt': sample.prompt, 'prefix': sample.answer_prefix.strip(), 'outputs': list(sample.outputs)}
            for sample in samples]
    limit = max(sample.max_new_tokens for sample in samples)
    return ConfigurableTask(config={
        'task': name, 'custom_dataset': lambda **_: {'test': datasets.Dataset.from_list(rows)},
        'test_split': 'test', 'output_type': 'generate_until', 'doc_to_text': '{{prompt}}',
        'doc_to_target': '{{outputs[0]}}', 'gen_prefix': '{{prefix}}',
        'generation_kwargs': {'until': [], 'do_sample': False, 'max_gen_toks': limit},
        'process_results': lambda doc, results: {'score': scoring.score(kind, results[0], doc['outputs'])},
        'metric_list': [{'metric': 'score', 'aggregation': 'mean', 'higher_is_better': True}],
        'metadata': {'version': 1},
    })
