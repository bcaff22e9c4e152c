"""What lorakit costs, beside its peers and the machine's limit.

``python -m benchmarks`` runs every part that fits into an hour, ``... training --rows e2e`` some rows of one. A part
is a module: its ``main`` starts processes in turn, most of them of the same module, and makes the tables.

==================  ==================================================================================
training.py         updates of lorakit, PEFT, loralib and full fine-tuning; training_tables.py shows them
compiled.py         the same updates with and without torch.compile
inference.py        latency of the base, merged, unmerged, and of PEFT unmerged
table1.py           the paper's Table 1: latency of GPT-2 medium with adapters
adapter.py          attach, save, load
merge_drift.py      what merging leaves behind in the base
planner.py          what `lorakit plan` predicts beside what is measured
long_run.py         one long run in both orders of the data; not part of the command above
------------------  ----------------------------------------------------------------------------------
workloads.py        what is trained: the rows of the training tables
examples.py         the one file of tokenised examples, in order, that every system of a row reads
systems/            the systems: each trains on that file as its users would
run.py              one run of one system; measure.py is its clock and scales, before.py its zero
limit.py            the products that a batch needs, and how fast this machine multiplies
latency.py          forward passes of several models in turn, and their ratios
runs.py             processes whose figures are kept, so that an interrupted benchmark goes on
report.py           JSON, Markdown, console
==================  ==================================================================================
"""
