"""RoPE for a longer context: every published choice side by side, with what the papers' laws promise for it.

    python experiments/theta.py --model DIR --context 1M            a Hugging Face Llama folder, or 'smollm2'
    python experiments/theta.py --model llama3-8b --context 1M --theta 2804339835

The last line warns if the target lies beyond what --theta or, without it, the model's own theta supports.
"""

import argparse
import math
import pathlib

from lct.cli.flags import length
from lct.cli.main import run_script
from lct.cli.model import find_model
from lct.models.family_sizes import ALL as SIZES
from lct.ops import rope, theta
from lct.ops.rope import RopeConfig
from lct.text import parse_length, table

COLUMNS = ('choice', 'theta', 'attention', 'longest period', 'full turns', 'law', 'similar', 'supports')
LEGEND = '''attention: factor on cos and sin. longest period: tokens of one turn of the slowest dim.
full turns: dims that turn at least once within the target.
law: period of the first dim that made no full turn in training; beyond it that dim has untrained angles
  (scaling laws of RoPE-based extrapolation, arXiv 2310.05209). supports: whether the law reaches the target.
similar: tokens up to which similar keys stand out (Base of RoPE bounds context length, arXiv 2405.14591).
  Models are trained well beyond it: compare it with the value of the present theta.'''


def run():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, help=f"a folder, 'smollm2', or one of {', '.join(SIZES)}")
    parser.add_argument('--context', required=True, help='tokens: 1048576, 1M, 64K')
    parser.add_argument('--theta', type=float, help='a choice to compare with the others')
    parser.add_argument('--trained', type=length,
                        help='tokens that it was trained on; default: what its config says')
    args = parser.parse_args()
    config = config_of(args.model)
    trained = args.trained or config.rope.original_max_position or config.max_position_embeddings
    target = parse_length(args.context)
    print('\n'.join(report(pathlib.Path(args.model).name, config, trained, target, args.theta)))


def config_of(name):
    from lct.weights import llama_hf

    if name in SIZES:
        return SIZES[name]
    return llama_hf.read_config(find_model(name))


def report(name, config, trained, target, chosen=None):
    """Lines: the model, the table, the legend, and a warning if there is reason for one."""
    if target <= trained:
        raise ValueError(f'target {target} is within the {trained} tokens that the model was trained on and '
                         f'needs no other theta; use a target above {trained}')
    head_dim, base = config.head_dim, config.rope_theta
    turned = theta.critical_dimension(base, trained, head_dim)
    given = RopeConfig(chosen) if chosen else config.rope
    ways = [('given' if chosen else 'present', given, 'the choice of --theta' if chosen else 'of the model')]
    ways += choices(base, trained, target, head_dim)
    rows = [row_of(name, rope_config, turned, target, head_dim) for name, rope_config, _ in ways]
    factor = target / trained
    rows.append(('LongRoPE', f'{base:,.0f}', f'{longrope_factor(trained, factor):.3f}', *('searched',) * 5))
    ways.append(('LongRoPE', None, 'a divisor for every dim, searched for the model; about 1,000 steps'))
    own = theta.similar_len(rope.frequencies(RopeConfig(base), head_dim)[0], target)
    return [
        f'{name}: theta {base:,.0f}, trained to {trained:,} tokens, head_dim {head_dim}; target {target:,}, '
        f'{factor:g} times longer',
        f'critical dimension {turned} of {head_dim}: so many made a full turn in training; similar keys '
        f'stand out up to {own:,} tokens', '', *table(COLUMNS, rows).splitlines(), '',
        *(f'{name:22}{promise}' for name, _, promise in ways), '', LEGEND,
        *warning(given, base, trained, target, head_dim),
    ]


def choices(base, trained, target, head_dim):
    """[(name, RopeConfig, promise)] of the published ways to a target."""
    factor = target / trained
    scaled = {'factor': factor, 'original_max_position': trained}
    ntk, critical = rope.ntk_theta(base, factor, head_dim=head_dim), rope.critical_base(base, trained, target)
    dynamic = rope.dynamic_ntk_theta(base, trained, target, alpha=4, head_dim=head_dim)
    inverse = theta.theta_for_bound(target, base, trained, head_dim)
    return [
        ('NTK-aware', RopeConfig(ntk), 'slowest dim as in PI, fastest as before; usable untrained'),
        ('dynamic NTK, alpha 4', RopeConfig(dynamic), "Gradient's rule, there from stage to stage"),
        ('critical base', RopeConfig(critical), 'extrapolates once tuned at the target'),
        ("law's inverse", RopeConfig(inverse), "smallest theta whose bound is the target"),
        ('lower bound', RopeConfig(theta.lower_bound(target, head_dim)),
         'similar keys stand out up to the target'),
        ('PI', RopeConfig(base, 'linear', factor), 'every period longer by the factor; about 1,000 steps'),
        ('YaRN', RopeConfig(base, 'yarn', **scaled),
         'long periods as in PI, short ones kept; about 400 steps'),
        ('llama3', RopeConfig(base, 'llama3', **scaled), 'as YaRN, other blend, no attention factor'),
    ]


def longrope_factor(trained, factor):
    return math.sqrt(1 + math.log(factor) / math.log(trained))


def row_of(name, config, turned, target, head_dim):
    inv_freq, attention = rope.frequencies(config, head_dim, target)
    periods, bound = 2 * math.pi / inv_freq, law(inv_freq, turned)
    similar = theta.similar_len(inv_freq, 4 * target)
    return (name, f'{config.theta:,.0f}', f'{attention:.3f}', f'{periods[-1]:,.0f}',
            f'{2 * int((periods < target).sum())} of {head_dim}', f'{bound:,.0f}',
            ('>= ' if similar == 4 * target else '') + f'{similar:,}',
            'yes' if reaches(bound, target) else f'{bound / target:.1%}')


def law(inv_freq, turned):
    """Tokens (float) by the scaling law: the period of the first dim that made no full turn in training."""
    return 2 * math.pi / inv_freq[turned // 2] if turned < 2 * len(inv_freq) else math.inf


def warning(config, base, trained, target, head_dim):
    """One line if the scaling law's bound of a RopeConfig is below the target, else none."""
    bound = law(rope.frequencies(config, head_dim, target)[0],
                theta.critical_dimension(base, trained, head_dim))
    if reaches(bound, target):
        return []
    return ['', f'WARNING: target {target:,} is beyond the {bound:,.0f} tokens that theta '
                f'{config.theta:,.0f} ({config.type}) supports by the scaling law: it takes a theta of '
                f'{theta.theta_for_bound(target, base, trained, head_dim):,.0f}, and to extrapolate further '
                f'the critical base {rope.critical_base(base, trained, target):,.0f}']


def reaches(bound, target):
    return bound > target - 0.5  # the law's inverse is rounded


if __name__ == '__main__':
    run_script(run, urls=('--model',))
