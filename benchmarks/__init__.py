"""Benchmarks of lorakit against its peers and the limit of the machine.

``python -m benchmarks`` runs the parts that fit into an hour. ``python -m benchmarks training --rows e2e`` runs some
rows of one part. Each part is a module. Its ``main`` starts processes one after the other, most of them of the same
module, and writes the tables. A module with its own command shows it in its first lines.

=======================  =========================================================================================
training.py              training speed of lorakit, PEFT, TRL, loralib and full fine-tuning; tables: training_tables.py
compiled.py              training speed with and without torch.compile
dtypes.py                training speed in float32 and bfloat16, and the choice of `auto`
float32.py               steps in float32 with MKL's products and with oneDNN's
inference.py             latency of the base, merged, unmerged, and of PEFT unmerged
mixed_batch.py           latency of 8 rows with 8 adapters, in lorakit and in PEFT
table1.py                the paper's Table 1: latency of GPT-2 medium with adapters
adapter.py               time to attach, save and load an adapter
experts.py               training and decoding with adapters on stacked experts, in lorakit and in PEFT
merge_drift.py           changes in the base weights after merging and unmerging
serving.py               many adapters on one base: throughput and latency of lorakit, PEFT, generate and llama.cpp
serving_steps.py         ratios and times of serving within one process
planner.py               predictions of `lorakit plan` against measurements
accuracy.py              accuracy on MRPC after whole epochs, in lorakit and in PEFT
processes.py             one process with all threads, and several that share them
profile.py               training time by kind of operation
-----------------------  -----------------------------------------------------------------------------------------
soak.py                  every answer of a busy server, checked against the adapter alone; faults.py breaks the server
page_use.py              memory of the playground's page in use
long_run.py              one long run in both orders of the data
memory.py                resident memory over long runs
quantised.py             projections in 4 and 8 bits
analysis.py              run time of the adapter measures
metrics_without_java.py  scores without Java against the official ones
tables.py                the pages of the paper's tables, from the logs of their runs
-----------------------  -----------------------------------------------------------------------------------------
workloads.py             the rows of the training tables; large_model.py is their model on a GPU
examples.py              the tokenised, ordered examples that every system of a row reads
serving_load.py          open and closed load, and the measures of a trial
serving_workload.py      the requests and adapters of the serving benchmark; server_process.py starts lorakit serve
soak_load.py             the clients of the soak test; soak_check.py checks their answers
systems/serving/         one module per serving system
systems/                 one training script per system, written as its users would
run.py                   one run of one system; measure.py measures it, before.py sets the memory baseline
limit.py                 operations and bytes that a batch needs; matmul rate and bandwidth of this machine
latency.py               interleaved forward passes of several models, and their ratios
runs.py                  processes with cached results, so that an interrupted benchmark can resume
report.py                results as JSON, Markdown and console output
=======================  =========================================================================================
"""
