"""Search for a divisor of every RoPE frequency of an untrained model, scored on tokens that need the text.

    python experiments/studies/rope_factors.py --length 8192 --output experiments/results/rope_factors.json

The idea is LongRoPE2's (Shang et al. 2025, arXiv:2502.20082, section 3.2): an evolutionary search whose score
is the loss of answers that stand far back in the text, not of all tokens, most of which need little context.
Here the answers are those of recall prompts whose keys and values are of the training kind. The divisors grow
with the wavelength; the first population is position interpolation, NTK-aware scaling and YaRN. The result is
an arm of recipe_study.py.
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np

from lct import environment
from lct.cli.flags import length
from lct.cli.main import run_script
from lct.cli.model import add_model_flags, load_model, mesh_context
from lct.files import write_atomically

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
STRENGTH = 0.35  # standard deviation of the logarithm of a change


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, required=False)
    parser.add_argument('--length', type=length, default=8192, help='tokens of a prompt and its answer')
    parser.add_argument('--population', type=int, default=12)
    parser.add_argument('--generations', type=int, default=8)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=pathlib.Path)
    args = parser.parse_args()
    args.model = args.model or 'base'
    with mesh_context(args.mesh):
        model, _ = load_model(args)
        windows, answers = prompts(model.tokenizer, args.length, args.seed)
        score = scorer(model, windows, answers)
        best, history = search(model.config, args, score)
    summary = {
        'model': args.model, 'length': args.length, 'prompts': len(windows), 'seed': args.seed,
        'factors': [round(float(factor), 4) for factor in best], 'generations': history,
        'command': environment.command(), 'versions': environment.versions()}
    print('divisors ' + ', '.join(f'{factor:.2f}' for factor in best))
    if args.output:
        write_atomically(args.output, json.dumps(summary, indent=1) + '\n')


def prompts(tokenizer, length, seed):
    """(windows int32 [n, length + 1] of text, a fact at every depth and its question with the answer; bool
    [n, length], which targets are the answer)."""
    from lct.data.corpus import documents
    from lct.data.synthetic import recall

    text = tokenizer.encode(''.join(document.text for document in documents.read('embedded', 16 * length)))
    vocabulary, haystack, windows, answers = recall.RecallVocabulary(tokenizer), np.asarray(text), [], []
    for i, depth in enumerate(DEPTHS):
        rng = np.random.default_rng([seed, i])
        prompt = recall.recall_prompt(rng, vocabulary, haystack, length, depth, training=True)
        ids = np.concatenate([prompt.ids, prompt.answer_ids]).astype(np.int32)
        window = np.full(length + 1, ids[-1], np.int32)  # what follows the answer is not scored
        window[:len(ids)] = ids
        targets = np.zeros(length, bool)
        targets[len(prompt.ids) - 1:len(ids) - 1] = True
        windows.append(window)
        answers.append(targets)
    return np.stack(windows), np.stack(answers)


def scorer(model, windows, answers):
    """A function of a LlamaConfig: the mean loss of the answers, in nats per token."""
    from lct.eval.loss import by_position

    def score(config):
        losses = by_position.loss_by_position(model.params, config, windows, layout=model.layout)
        return float(losses[answers].mean())

    return score


def search(config, args, score):
    """(the best divisors [H/2], [(best, mean) score of each generation])."""
    rng, scale = np.random.default_rng(args.seed), args.length / config.max_position_embeddings

    def with_factors(factors):
        ones = (1.0,) * len(factors)
        rope = dataclasses.replace(
            config.rope, type='longrope', factor=scale, original_max_position=config.max_position_embeddings,
            long_factor=tuple(map(float, factors)), short_factor=ones)
        return dataclasses.replace(config, rope=rope, max_position_embeddings=args.length)

    known = [(score(with_factors(factors)), factors) for factors in first_population(config, scale)]
    history = []
    for generation in range(args.generations):
        while len(known) < args.population:
            parent = known[rng.integers(len(known))][1]
            child = changed(rng, parent, scale)
            known.append((score(with_factors(child)), child))
        known.sort(key=lambda one: one[0])
        history.append((known[0][0], float(np.mean([one[0] for one in known]))))
        print(f'generation {generation + 1} of {args.generations}: best {history[-1][0]:.4f} nats, mean '
              f'{history[-1][1]:.4f}', flush=True)
        known = known[:max(args.population // 3, 1)]
    return known[0][1], history


def first_population(config, scale):
    """The divisors that published scalings amount to: those of YaRN, NTK-aware and position interpolation."""
    from lct.ops import rope
    from lct.ops.theta import ntk_theta

    native, plain = config.max_position_embeddings, rope.frequencies(config.rope, config.head_dim)[0]
    others = [
        dataclasses.replace(config.rope, type='yarn', factor=scale, original_max_position=native),
        dataclasses.replace(config.rope, theta=ntk_theta(config.rope_theta, scale, head_dim=config.head_dim)),
        dataclasses.replace(config.rope, type='linear', factor=scale)]
    return [plain / rope.frequencies(other, config.head_dim)[0] for other in others]


def changed(rng, factors, scale):
    """Divisors with a random stretch of them multiplied, still growing with the wavelength."""
    start = rng.integers(len(factors))
    stop = rng.integers(start, len(factors)) + 1
    child = np.array(factors)
    child[start:stop] *= np.exp(rng.normal(0, STRENGTH))
    return np.clip(np.maximum.accumulate(child), 1.0, 2 * scale)


if __name__ == '__main__':
    run_script(main)
