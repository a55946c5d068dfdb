"""An ablation: variants of one config, trained over seeds with equal steps and with equal time.

| variant | attribute weights | mined negatives |
| --- | --- | --- |
| `infonce` | no | none; what the others are compared with, always there |
| `attributes` | yes | none |
| `trns` | no | TRNS |
| `full` | yes | TRNS |
| `qure`, `hardest`, `random` | as the config says | by that rule |
| `in_batch-oracle` | as the config says | none, and nothing relevant is a negative of InfoNCE |
| `trns-oracle`, `hardest-oracle` | as the config says | by that rule, of what is not relevant |
| `attributes-sum`, `attributes-gate` | yes, in that form | none |
| `text-only`, `image-only` | no composer: the query is the text, or the reference | none |
| `sum-of-both`, `product-of-both` | no composer: the sum or product of the two | none |

All else is as the config says. The last three lines are trained where they are named. Oracles know
which images are truly relevant (`negatives.oracle`): they show what a rule that told them apart
without fail would gain. They are left out where the truth is not known.

**Equal steps**: `config.total_steps` for all. **Equal time**: a variant gets the steps that its run
with equal steps and the first seed had taken when it had trained for as long as that of `infonce`;
one that is faster goes on at its mean speed. Mining, refreshes of the bank and compilation count,
evaluation and saving do not (`train_seconds` in `timing.jsonl`), so that other work on the machine
during the runs of the first seed falsifies the steps.

| in the workdir | |
| --- | --- |
| `<variant>-<steps or time>-<seed>/` | the runs; one of `config.total_steps` is under `steps` |
| `times.json` | seconds, ratio to `infonce` and steps of equal time; fixed once they are measured |
| `ablation.json`, `.md`, `.png` | all results; the tables; validation metrics against steps |

With each variant tuned (`tuned.py`), runs are `<variant>-<steps>-<learning rate>-<seed>/`, and the
results are `curves.json`, `.md` and `.png`. A sweep (`sweep.py`) has runs `<variant>-<digest of the
config>-<seed>/` and writes `sweep-<field>.json`, `.md` and `.png`.

Of a complete run `checkpoints/` may be removed; `--config.keep_checkpoints=1` keeps one a run.
"""
