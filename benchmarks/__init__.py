"""What lorakit costs, beside its peers and the machine's limit.

``python -m benchmarks`` runs every part, ``python -m benchmarks training --rows e2e`` some rows of one.

=================  ===================================================================================
workloads.py       what is trained: the rows of the training tables
examples.py        the one file of tokenised examples, in order, that every system of a row reads
systems/           the systems: each trains on that file as its users would
run.py             one run of one system in a process of its own; measure.py is its clock and scales
limit.py           the products a batch needs, and how fast this machine multiplies
training.py        runs the systems of each row in turn, and makes the tables
=================  ===================================================================================
"""
