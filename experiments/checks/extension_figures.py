"""How the page of results states what extended models do: (content of a file) -> text."""

import statistics

from result_figures import count, mean_of, percent, read

from lct.text import short_length

REAL_MODELS = 'unscaled', 'scaled', 'trained'  # of studies/real_model.py: two controls, then the model


def recall(d: dict) -> str:
    found = [d['summary'][which] for which in ('base', 'extended')]
    return ' → '.join(f'{count(one["inside"])} up to 512 tokens and {count(one["beyond"])} beyond 1,024'
                      for one in found)


def recall_by_length(d: dict) -> str:
    grid = d['needle']['extended']
    means = [statistics.mean(column) for column in zip(*grid['scores'], strict=True)]
    return ', '.join(f'{short_length(length)}: {mean:.0%}'
                     for length, mean in zip(grid['lengths'], means, strict=True))


def tasks_after(d: dict) -> str:
    needle, ruler = d['needle_suite']['extended'], d['ruler_suite']['extended']
    means = ', '.join(f'{short_length(length)}: {mean:.0f}'
                      for length, mean in zip(ruler['lengths'], ruler['means'], strict=True))
    return (f'needle {round(needle["mean"] * needle["count"])} of {needle["count"]}; RULER {means}; '
            f'{sum(stage["tokens"] for stage in d["stages"]):,} tokens of training in '
            f'{d["summary"]["seconds"] / 60:.0f} minutes, beside other work')


def long_loss(d: dict) -> str:
    loss = d['loss_by_position']
    first, last = loss['base']['edges'].index(512), -1
    base, extended = ([loss[which]['mean'][i] for i in (first, last)] for which in ('base', 'extended'))
    return (f'512-1K: {base[0]:.2f} → {extended[0]:.2f} nats a token; 4K-8K: {base[1]:.2f} → '
            f'{extended[1]:.2f}')


def main_job(d: dict) -> str:
    one = d['summary']
    return (f'{one["parameters"]:,} parameters, {one["tokens_of_this_call"]:,} tokens of training, '
            f'{one["seconds"]:.0f} s of training in {d["seconds_of_this_call"]:.0f} s')


def adapters(d: dict) -> str:
    one = d['summary']
    return f'{recall(d)}, with {percent(one["trained"] / one["parameters"])} of the parameters'


def suite_needle(d: dict) -> str:
    found = [d['needle_suite'][which] for which in ('base', 'extended')]
    return ' → '.join(f'{round(one["mean"] * one["count"])} of {one["count"]}' for one in found)


def suite_ruler(d: dict) -> str:
    base, extended = (d['ruler_suite'][which] for which in ('base', 'extended'))
    return '; '.join(f'{short_length(length)}: {a:.0f} → {b:.0f}'
                     for length, a, b in zip(base['lengths'], base['means'], extended['means'], strict=True))


def earlier_losses(_: None) -> str:
    found = [read(f'laptop_{name}.json')['loss_by_position'] for name in ('lora', 'gated', 'one_shot')]
    after = ', '.join(f'{one["extended"]["mean"][-1]:.3f}' for one in found)
    return f'{found[0]["base"]["mean"][-1]:.3f} → {after}'


def base_ruler(d: dict) -> str:
    tasks = d['ruler']['tasks']
    each = ', '.join(f'{name} {task["mean"]:.0f}' for name, task in tasks.items())
    return f'mean of {len(tasks)} tasks {d["ruler"]["mean"]:.0f}: {each}'


def theta_table(d: dict) -> str:
    return '; '.join(
        f'{row["theta"]:,.0f}{" (control)" * row["control"]}: loss {row["long_loss"]:.3f}, '
        f'recall {percent(row["long_needle"], 0)}' for row in d['rows'])


def scaled_loss(d: dict) -> str:
    means = {name: [statistics.mean(loss) for loss in zip(*one['loss'].values(), strict=True)]
             for name, one in d['scalings'].items()}
    half = len(d['edges']) // 2
    names = {'default': 'unscaled', 'ntk': 'NTK', 'yarn': 'YaRN', 'dynamic': 'dynamic NTK'}
    short = [statistics.mean(means[name][:half]) - statistics.mean(means['default'][:half])
             for name in names if name != 'default']
    long = '; '.join(f'{label} {statistics.mean(means[name][half:]):.2f}' for name, label in names.items())
    return f'{long}; inside 8K they cost {min(short):.2f} to {max(short):.2f} nats'


def smollm2_ruler(d: dict) -> str:
    ruler = d['results']['ruler']
    return '; '.join(f'{short_length(length)}: {mean:.1f} ± {error:.1f}' for length, mean, error in
                     zip(ruler['lengths'], ruler['means'], ruler['stderr'], strict=True))


def both_suites(d: dict) -> str:
    found = {name: d['results'][name]['tasks'] for name in ('ruler', 'comprehension')}
    means = {name: ', '.join(f'{short_length(int(length))} {mean_of(tasks, length):.1f}'
                             for length in sorted(next(iter(tasks.values())), key=int))
             for name, tasks in found.items()}
    return '; '.join(f'{name}, mean of {len(found[name])} tasks: {text}' for name, text in means.items())


def recipe_study(d: dict) -> str:
    """Recall probe, needle and RULER beyond the native length, and the loss there: means over the seeds."""
    seeds = sorted({len(row['seeds']) for row in d['rows']})
    arms = [f'{row["arm"].replace("_", " ")} ' + ', '.join(
        f'{row["means"][name][0]:.0f}' for name in ('recall', 'needle', 'ruler'))
        + f' and {row["means"]["loss beyond"][0]:.2f} nats' for row in d['rows']]
    return f'{"; ".join(arms)}; {" or ".join(map(str, seeds))} seeds'


def real_model_scores(d: dict, suite: str) -> str:
    """Means of the two controls and the trained model with 95% intervals, by length."""
    lengths = sorted(d['suites']['trained'][suite], key=int)
    return '; '.join(f'{short_length(int(length))}: ' + ', '.join(
        f'{name} {one["mean"]:.0f} ({one["low"]:.0f} to {one["high"]:.0f})'
        for name in REAL_MODELS
        if (one := d['suites'][name].get(suite, {}).get(length))) for length in lengths)


def real_model_differences(d: dict, suite: str) -> str:
    """The trained model less each control on the same prompts, with 95% intervals, by length."""
    return '; '.join(f'{short_length(int(length))}, against {control}: {one["mean"]:+.0f} '
                     f'({one["low"]:+.0f} to {one["high"]:+.0f}), {one["count"]} prompts'
                     for control in REAL_MODELS[:2]
                     for length, one in d['differences'][control].get(suite, {}).items())


def real_model_loss(d: dict) -> str:
    """Mean loss within the native length and beyond it: unscaled, scaled, trained, over all texts."""
    def mean(name, beyond):
        of = [statistics.mean(loss for loss, low in zip(one['mean'], one['edges'], strict=False)
                              if (low >= d['native']) == beyond) for one in d['losses'][name].values()]
        return f'{statistics.mean(of):.3f}'

    return '; '.join(f'{place} {", ".join(f"{name} {mean(name, beyond)}" for name in REAL_MODELS)} nats'
                     for place, beyond in (('within 8,192:', False), ('beyond:', True)))
