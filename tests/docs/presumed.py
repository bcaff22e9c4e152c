"""What each page presumes, and the commands of the pages that are not run."""

from __future__ import annotations

from walk import Presumed

NOT_RUN = {
    "make demo": "downloads packages; tests/cli/test_demo.py and the demo's own parts cover it",
    "make test": "runs this suite",
    "git clone": "needs a network",
    "pip install": "needs a network",
}
"""Commands that are not run, by their start, with the reason."""

PREVIEW = "--dry-run"
"""A table of the paper has up to 200 runs, which tests/paper run; here their list is made."""

E2E = """
data("data/e2e/train.jsonl")
data("data/e2e/validation.jsonl", seed=1)
"""

_ANALYSIS = """
for name, rank in (("e2e-r8", 8), ("e2e-r64", 64), ("e2e-r64b", 64)):
    run(name, f"--lora.rank {rank} --seed {len(name) + rank}")
    for old, new in ((1, 80), (2, 100)):
        Path(f"{name}/checkpoints/step-{old:06}").rename(f"{name}/checkpoints/step-{new:06}")
data("E2E/test.jsonl", "e2e_nlg", 48)
write("news.txt", [row["text"] for row in make_rows("texts", 50)])
"""

PRESUMED = {
    "README.md": Presumed(
        setup='data("train.jsonl"); data("test.jsonl", seed=1); run("out/second")',
        more={"lorakit paper": PREVIEW},
        typed={"lorakit chat": "The river pub\n/quit\n"},
    ),
    "docs/quickstart.md": Presumed(setup='like("docs/quickstart.md", "train.jsonl")'),
    "docs/guides/training.md": Presumed(setup=E2E),
    "docs/guides/generating.md": Presumed(
        setup='run("out/first"); data("test.jsonl", seed=1)',
        typed={"lorakit chat": "The river pub\n/quit\n"},
    ),
    "docs/guides/merging.md": Presumed(setup='run("out/e2e")'),
    "docs/guides/adapters.md": Presumed(setup='adapter("out/e2e"); loralib("roberta_base_lora_mnli.bin", "FacebookAI/roberta-base")'),
    "docs/guides/methods.md": Presumed(setup=E2E + 'page_file("docs/guides/training.md", "e2e.yaml")\nexample("own_method.py")'),
    "docs/guides/tasks.md": Presumed(
        setup="""
data("data/spelling/train.jsonl", "spelling")
data("data/spelling/test.jsonl", "spelling", seed=1)
data("data/mnli/train.jsonl", "mnli")
command("lorakit train --base.name minilm-l6 --data.task mnli --data.root data --max_steps 2 --output out/mnli")
write("new.csv", ["sentence1,sentence2", "river pub,river pub", "food,cheap park"])
example("own_task.py")"""
    ),
    "docs/guides/planning.md": Presumed(setup=E2E + 'page_file("docs/guides/training.md", "e2e.yaml")'),
    "docs/guides/reports.md": Presumed(
        setup=E2E
        + 'page_file("docs/guides/training.md", "e2e.yaml")\n'
        + 'for name in ("e2e", "rank4", "rank8"): run(f"out/{name}")'
    ),
    "docs/guides/metrics.md": Presumed(
        setup=E2E
        + """
write("outputs.txt", ["The river pub serves food.", "A cheap park."])
write("references.txt", ["The river pub serves food.", "", "A cheap park.", ""])
data("wikisql/validation.jsonl.gz", "wikisql", 2)
write("queries.txt", ["SELECT Name FROM table WHERE Town = river"] * 2)
adapter("out/e2e/adapter")
""",
        more={"lorakit evaluate": "--data.train data/e2e/train.jsonl --data.test data/e2e/validation.jsonl --measure both"},
    ),
    "docs/guides/paper.md": Presumed(more={"lorakit paper": PREVIEW}),
    "docs/guides/analysis.md": Presumed(
        setup=_ANALYSIS,
        more={"lorakit combine e2e-r64/adapter e2e-r64b/adapter": "--data.test E2E/test.jsonl --limit 24"},
    ),
}
