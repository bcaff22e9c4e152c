"""Table 1: the latency of adapters at inference."""

from lorakit.paper.published.table import PublishedTable, rows_of

TABLE1 = PublishedTable(
    name="table1",
    title="Milliseconds of one forward pass of GPT-2 medium",
    rows=rows_of(
        """
method   | setting        | batch 32, length 512 | batch 16, length 256 | batch 1, length 128
FT, LoRA | merged         | 1449.4 ± 0.8         | 338.0 ± 0.6          | 19.8 ± 2.7
AdapterL | 0.5M, 11M, 11M | 1482.0 ± 1.0         | 354.8 ± 0.5          | 23.9 ± 2.1
AdapterH | 0.5M, 11M, 11M | 1492.2 ± 1.0         | 366.3 ± 0.5          | 25.8 ± 2.2
""",
        model="gpt2-medium",
    ),
    statistic="mean",
    lower_is_better=("batch 32, length 512", "batch 16, length 256", "batch 1, length 128"),
    notes=(
        "Mean of 100 passes on an NVIDIA Quadro RTX8000.",
        "The settings give the parameters of the adapters in each column. The bottleneck sizes are not printed: AdapterL "
        "with r=8 or AdapterH with r=5 has about 0.5M, AdapterL with r=224 or AdapterH with r=112 about 11M.",
        "As printed, the adapters are 2.2 to 20.7 % (AdapterL) and 3.0 to 30.3 % (AdapterH) slower.",
    ),
)
