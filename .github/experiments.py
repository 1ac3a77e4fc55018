"""All runs on tiny pairs behind the README: python .github/experiments.py SEED [SEED ...]

The table has the seeds 0 to 4, the map 0 to 2. Each run is a folder in runs/, and one that has been
made is left as it is, so the command can be repeated.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, ".")
from numpy.random import default_rng

import fire_opd

SETTINGS = json.loads(Path("tiny_config.json").read_text())
TINY = SETTINGS.pop("tiny")
ARMS = {
    "OPD": {"filter_percentile": 0, "alpha": 0, "beta": 0},
    "random-filter": {"filter_by": "random"},
    "filter-only": {"alpha": 0, "beta": 0},
    "reweight-only": {"filter_percentile": 0},
    "FiRe-OPD": {},
    "hard-tokens": {"token_weights": "hard"},
    "as-released": {"filter_percentile": 0, "loss_agg": "seq-mean"},
    "threshold": {},
}
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)
PERCENTILES = (0, 10, 20, 40, 60)

def above_threshold(scores, percentile):
    """The filter of the exercise: a fixed threshold in nats per token, whatever the percentile."""
    return scores >= -2.5

def words(settings):
    """{"batch_size": 64} -> ["--batch_size", "64"]"""
    return [word for name, x in settings.items() for word in ("--" + name, str(x))]

def pair_of(task, seed):
    """The folder of a tiny pair, which is made once."""
    folder = Path(f"runs/pairs/{task}-{seed}")
    if not folder.exists():
        fire_opd.main(words({"task": task, "seed": seed, "steps": 0, "output_dir": folder}))
    return folder / f"tiny-{task}-{seed}"

def run(name, task, seed, share=None, **settings):
    """One run; share: how many of its prompts ask for maxima."""
    folder = Path("runs", name, str(seed))
    if folder.exists():
        return
    pair = pair_of(task, seed)
    prompts = pair / "prompts.jsonl"
    if share is not None:
        prompts = pair / f"prompts-{share}.jsonl"
        mixture = {"+": 1 - share, ",": share}
        rng = default_rng((seed, fire_opd.ORDER))
        fire_opd.save_rows(prompts, fire_opd.tiny_rows(rng, 4096, TINY["digits"], mixture))
    own = {"seed": seed, "teacher": f"sum={pair}/sum", "student": f"{pair}/student",
           "prompts": prompts, "eval_prompts": pair / "eval_prompts.jsonl",
           "eval_every": 10, "save_every": 0, "output_dir": folder}
    quantile = fire_opd.filter_trajectories
    if "threshold" in name:
        fire_opd.filter_trajectories = above_threshold
    fire_opd.main(words(SETTINGS | own | settings))
    fire_opd.filter_trajectories = quantile

seeds = [int(word) for word in sys.argv[1:]]
for seed in seeds:
    for arm, settings in ARMS.items():
        run(f"foreign/{arm}", "foreign", seed, **settings)
        run(f"single/{arm}", "single", seed, steps=100, **settings)
    run("foreign/without-maxima", "foreign", seed, share=0, **ARMS["OPD"])  # none of its prompts
for seed in seeds:
    for share in SHARES if seed < 3 else ():
        for percentile in PERCENTILES:
            run(f"map/{share}-{percentile}", "foreign", seed, share, filter_percentile=percentile)
        run(f"map/{share}-threshold", "foreign", seed, share)
