"""Names of the files in the folder of a run.

=================  ===================================================================================
config.yaml        every setting, also defaults; ``--config`` with this file repeats the run
environment.json   software, processor and threads, one entry per session (a resumed run has several)
metrics.jsonl      one line per step and per evaluation
samples.jsonl      text generated at each evaluation
events.json        what went wrong and did not end the run: memory that ran out, a loss that diverged
checkpoints/       step-000100/ and so on, for ``--resume``
best/              the adapter with the best validation score
adapter/           the adapter after the last step
result.json        written last: a run with this file is finished
prediction.json    the planner's prediction, if the run was planned
report.html        the report, written by ``lorakit train`` and ``lorakit report``
=================  ===================================================================================
"""

CONFIG, RESULT, ENVIRONMENT = "config.yaml", "result.json", "environment.json"
METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "events.json"
REPORT, PREDICTION = "report.html", "prediction.json"
CHECKPOINTS, BEST, ADAPTER, TENSORBOARD = "checkpoints", "best", "adapter", "tensorboard"
RUN_FILES = (CONFIG, RESULT, ENVIRONMENT, METRICS, SAMPLES, EVENTS, REPORT, PREDICTION)
RUN_FOLDERS = (CHECKPOINTS, BEST, ADAPTER, TENSORBOARD)

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
"""Files of a checkpoint."""
