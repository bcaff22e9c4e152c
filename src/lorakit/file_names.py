"""Names of the files in the folders that lorakit writes.

A run:

=================  ===================================================================================
config.yaml        every setting, also defaults; ``--config`` with this file repeats the run
environment.json   software, machine, model sizes and score directions, one entry per session
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

An adapter:

==========================  ==========================================================================
lorakit.json                the method, each layer, the base, the provenance and checksums
lorakit_model.safetensors   the tensors that PEFT cannot represent, or in another form only
adapter_config.json         PEFT's configuration
adapter_model.safetensors   the tensors in PEFT's form
adapter_model.bin           the same, written by old versions of PEFT; only read
README.md                   the model card
==========================  ==========================================================================
"""

CONFIG, RESULT, ENVIRONMENT = "config.yaml", "result.json", "environment.json"
METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "events.json"
REPORT, PREDICTION = "report.html", "prediction.json"
CHECKPOINTS, BEST, ADAPTER, TENSORBOARD = "checkpoints", "best", "adapter", "tensorboard"
RUN_FILES = (CONFIG, RESULT, ENVIRONMENT, METRICS, SAMPLES, EVENTS, REPORT, PREDICTION)
RUN_FOLDERS = (CHECKPOINTS, BEST, ADAPTER, TENSORBOARD)

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
"""Files of a checkpoint."""

LORAKIT_JSON, LORAKIT_TENSORS = "lorakit.json", "lorakit_model.safetensors"
PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"
MODEL_CARD = "README.md"
ADAPTER_CONFIGS = (LORAKIT_JSON, PEFT_CONFIG)
"""A folder with one of these files is an adapter."""
ADAPTER_TENSORS = (PEFT_TENSORS, PEFT_PICKLE, LORAKIT_TENSORS)

TOKENIZER_CONFIG = "tokenizer_config.json"
"""transformers writes it for every tokenizer."""
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("additional_chat_templates", "additional_chat_templates/*.jinja"),
    *("vocab.*", "merges.txt", "*.model"),
)
"""Patterns of the files of a tokenizer saved by transformers."""
