"""Prompts keep their budget with a tokenizer that joins line ends at the end of a text, but not elsewhere."""

import pytest
import tokenizers
from test_ruler import TEXT, used

from lct.data import tokenizer as lct_tokenizer
from lct.eval.tasks import adversarial_needles, prompt_fitting, ruler
from lct.eval.tasks.material import Material

TASKS = {**ruler.TASKS, 'straddling': adversarial_needles.DEFAULTS['straddling']}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    """A byte-level BPE with GPT-2's split into words, as SmolLM2 has it."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=['<s>'], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    library.train_from_iterator([TEXT[0].text, *['\n\n'] * 2000], trainer)
    path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
    library.save(str(path))
    return lct_tokenizer.load(path)


def test_a_head_is_counted_as_it_stands(tokenizer):
    counter = prompt_fitting.TokenCounter(tokenizer)
    assert counter.count('above.\n\n') + 1 == counter.count_head('above.\n\n')
    for fragment in ('Word', '42 is so.\n', '"quoted"\n'):
        assert (
            counter.count('above.\n\n' + fragment)
            == counter.count_head('above.\n\n') + counter.count_each([fragment])[0]
        )


@pytest.mark.parametrize('long', [False, True])
def test_no_prompt_is_over_its_budget(tokenizer, long, monkeypatch):
    if long:  # prompts that rely on sums of fragments
        monkeypatch.setattr(prompt_fitting, 'LONG', 1)
    material = Material(tokenizer, TEXT)
    assert material.counter.trusts_sums(2048) == long
    for config in TASKS.values():
        for i in range(6):
            sample = config.generate(material, 2048, i) if long else material.sample(config, 2048, i)
            size = used(material, sample)
            assert size <= 2048 and 0 <= sample.meta['tokens'] - size <= int(long), config.task
