"""Prompts keep their budget with a tokenizer that joins line ends at the end of a text but not before a word."""

import pytest
import tokenizers
from test_ruler import TEXT, used

from lct.data import tokenizer
from lct.eval.tasks import adversarial_needles, prompt_fitting, ruler

TASKS = {**ruler.TASKS, 'straddling': adversarial_needles.DEFAULTS['straddling']}


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    """A byte-level BPE with GPT-2's split into words, as SmolLM2 has it."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=['<s>'], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    library.train_from_iterator([TEXT[0].text, *['\n\n'] * 2000], trainer)
    path = tmp_path_factory.mktemp('words') / 'tokenizer.json'
    library.save(str(path))
    return tokenizer.load(path)


def test_a_head_is_counted_as_it_stands(words):
    counter = prompt_fitting.Counter(words)
    assert counter.text('above.\n\n') + 1 == counter.before('above.\n\n')
    for piece in ('Word', '42 is so.\n', '"quoted"\n'):
        assert counter.text('above.\n\n' + piece) == counter.before('above.\n\n') + counter.pieces([piece])[0]


@pytest.mark.parametrize('long', [False, True])
def test_no_prompt_is_over_its_budget(words, long, monkeypatch):
    if long:  # where the sums of pieces are believed
        monkeypatch.setattr(prompt_fitting, 'LONG', 1)
    material = ruler.Material(words, TEXT)
    assert material.counter.trusted(2048) == long
    for config in TASKS.values():
        for i in range(6):
            sample = config.generate(material, 2048, i) if long else material.sample(config, 2048, i)
            size = used(material, sample)
            assert size <= 2048 and 0 <= sample.meta['tokens'] - size <= int(long), config.task
