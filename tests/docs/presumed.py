"""What each page presumes, and the commands of the pages that are not run."""

from __future__ import annotations

from walk import Presumed

_FRAMEWORKS = "needs a library of its own; tests/integration/test_frameworks.py runs the recipe"

NOT_RUN = {
    "make demo": "installs packages; its `lorakit demo` runs for the excerpts in `SHOWN`",
    "make test": "runs this suite",
    "git clone": "needs a network",
    "pip install": "needs a network",
    "hf download": "needs a network",
    "lorakit serve": "runs until a signal; test_serving_guide.py starts it and sends the requests",
    "curl": "sent by test_serving_guide.py",
    "from openai": "run by test_serving_guide.py",
    "PYTHONPATH=$PWD/examples serve run": "runs until a signal; test_ray_replicas.py starts its application",
    "modules=": "run by test_serving_guide.py",
    "vllm serve": "needs a GPU",
    "from pathlib import Path\nfrom safetensors.torch import load_file\nfrom sentence_transformers": _FRAMEWORKS,
    "lorakit.load(pipe.unet": _FRAMEWORKS,
    'folder = Path("out/style")': _FRAMEWORKS,
    'pipe.load_lora_weights("style': _FRAMEWORKS,
    "torchrun": "starts processes; test_several_processes_guide.py checks it",
    "accelerate launch": "starts processes; tests/integration/test_process_loops.py runs it",
}
"""Commands that are not run, by their start, with the reason."""

SHOWN = {
    ("README.md", "lorakit demo --max_steps 2 --test_texts 3 --test_loss 4"): (
        "before",
        "The adapter is",
    ),
    ("docs/guides/data.md", "lorakit data --base.name smollm2-135m --data.train chat.jsonl"): (
        "task chat:",
    ),
}
"""Commands that print the `text` blocks of a page, with the starts of these blocks."""

NO_OUTPUT = ("h = W x", "[bos]", "data/", "out/e2e/", "Out of memory during")
"""Starts of the `text` blocks that show no output of a command here: formulas, folders, memory that runs out."""

PREVIEW = "--dry-run"
"""A table of the paper has up to 200 runs, which tests/paper run; here their list is made."""

E2E = """
data("data/e2e/train.jsonl")
data("data/e2e/validation.jsonl", seed=1)
"""

FEW_TOKENS = "--decoding.max_new_tokens 4"
RECIPE = {"lorakit train --recipe": "--max_steps 2"}
"""Options that make commands short."""

_SCORED = (
    "--data.test E2E/test.jsonl --limit 24 "
    "--data.columns '{prompt: meaning_representation, completion: human_reference}'"
)
_ANALYSIS = """
for name, rank in (("e2e-r8", 8), ("e2e-r64", 64), ("e2e-r64b", 64)):
    run(name, f"--lora.rank {rank} --seed {len(name) + rank} --optimizer.learning_rate 0.1")
    for old, new in ((1, 80), (2, 100)):
        Path(f"{name}/checkpoints/step-{old:06}").rename(f"{name}/checkpoints/step-{new:06}")
data("E2E/test.jsonl", "e2e_nlg", 48)
write("news.txt", [row["text"] for row in make_rows("texts", 50)])
"""

COMMANDS = {
    "README.md": Presumed(
        setup='data("train.jsonl"); data("test.jsonl", seed=1); run("out/second")',
        more={
            "lorakit paper": f"{PREVIEW} --tasks rte --methods lora",
            "lorakit evaluate": FEW_TOKENS,
            "lorakit chat": FEW_TOKENS,
            **RECIPE,
        },
        typed={"lorakit chat": "The river pub\n/quit\n"},
    ),
    "docs/quickstart.md": Presumed(
        setup='for name in ("train.jsonl", "test.jsonl"): like("docs/quickstart.md", name)',
        more={"lorakit evaluate": FEW_TOKENS, "lorakit generate": FEW_TOKENS},
    ),
    "docs/guides/training.md": Presumed(setup=E2E),
    "docs/guides/generating.md": Presumed(
        setup='run("out/first"); data("test.jsonl", seed=1)',
        more={"lorakit generate": FEW_TOKENS, "lorakit chat": FEW_TOKENS},
        typed={"lorakit chat": "The river pub\n/quit\n"},
    ),
    "docs/guides/merging.md": Presumed(setup='run("out/e2e")'),
    "docs/guides/adapters.md": Presumed(
        setup='adapter("out/e2e"); loralib("roberta_base_lora_mnli.bin", "FacebookAI/roberta-base")'
    ),
    "docs/guides/methods.md": Presumed(
        setup=E2E + 'page_file("docs/guides/training.md", "e2e.yaml")\nexample("own_method.py")'
    ),
    "docs/guides/tasks.md": Presumed(
        setup="""
data("data/spelling/train.jsonl", "spelling")
data("data/spelling/test.jsonl", "spelling", seed=1)
data("data/mnli/train.jsonl", "mnli")
command("lorakit train --base.name minilm-l6 --data.task mnli --data.root data --max_steps 2 --output out/mnli")
write("new.csv", ["sentence1,sentence2", "river pub,river pub", "food,cheap park"])
example("own_task.py")"""
    ),
    "docs/guides/planning.md": Presumed(
        setup=E2E + 'page_file("docs/guides/training.md", "e2e.yaml")'
    ),
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
(row,) = make_rows("wikisql", 1)
row["sql"]["conds"] = [[1, 0, "river"]]  # the layout of WikiSQL's files; the hub has lists by name
write_rows("wikisql/validation.jsonl.gz", [row])
write("queries.txt", ["SELECT Name FROM table WHERE Town = river"])
adapter("out/e2e/adapter")
""",
        more={
            "lorakit evaluate": "--data.train data/e2e/train.jsonl --data.test data/e2e/validation.jsonl "
            + FEW_TOKENS
        },
    ),
    "docs/guides/paper.md": Presumed(
        more={
            "lorakit paper table18": f"{PREVIEW} --methods r1,r2",
            "lorakit paper": f"{PREVIEW} --methods lora",
            **RECIPE,
        }
    ),
    "docs/guides/what-was-learned.md": Presumed(
        setup="""
for folder in ("benchmarks/e2e.yaml", "benchmarks/mrpc.yaml"):
    write(folder, read(folder).splitlines())
data("E2E/train.jsonl.gz", "e2e_nlg", 40)
data("E2E/validation.jsonl", "e2e_nlg", 8, seed=1)
data("MRPC/train.jsonl", "mrpc", 40)
data("MRPC/validation.jsonl", "mrpc", 8, seed=1)
adapter("e2e-r8/adapter")
adapter("e2e-r64b/adapter", rank=64, seed=1)
adapter("mrpc-r64b/adapter", "minilm-l6", rank=64, seed=1, task="sequence-classification", num_labels=2)
""",
        more={"lorakit train --config benchmarks/e2e.yaml": "--max_steps 2"},
    ),
    "docs/guides/analysis.md": Presumed(
        setup=_ANALYSIS,
        more={"lorakit combine e2e-r64/adapter e2e-r64b/adapter": _SCORED},
    ),
}

_MODEL = """
import torch
from torch import nn
from dataclasses import dataclass
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

name = "HuggingFaceTB/SmolLM2-135M"
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
batch = tokenizer(["The river pub", "A plane", "cheap food"], return_tensors="pt", padding=True)
"""
_TWO = """
adapters = lorakit.attach(model, lorakit.LoRA(), name="e2e")
lorakit.attach(model, lorakit.LoRA(), name="sql", seed=1)
"""

PYTHON = {
    "README.md": Presumed(setup='adapter("out/sql", "HuggingFaceTB/SmolLM2-135M")'),
    "docs/quickstart.md": Presumed(
        setup=_MODEL + 'batches = [{**batch, "labels": batch["input_ids"]}] * 3\n'
    ),
    "docs/guides/training.md": Presumed(setup='table("reviews.csv", make_rows("texts", 24))'),
    "docs/guides/several-processes.md": Presumed(
        setup=_MODEL
        + "import accelerate\nadapters = lorakit.attach(model, lorakit.LoRA())\n"
        + "accelerator = accelerate.Accelerator(cpu=True)\n"
    ),
    "docs/guides/merging.md": Presumed(
        setup=_MODEL + _TWO + "model.generation_config.max_new_tokens = 4\n",
    ),
    "docs/guides/adapters.md": Presumed(
        setup=_MODEL
        + 'adapter("out/sql", name)\nloralib("roberta_base_lora_mnli.bin", "FacebookAI/roberta-base")\n'
        + 'packed = {"input_ids": torch.arange(64)[None] + 5}\n',
        before={
            'adapters = lorakit.load(model, "roberta': """
model = AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base", num_labels=3)
""",
            "adapters = lorakit.attach(model, lorakit.LoRA(rank=8, targets": """
from functools import partial
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
DPOConfig = partial(DPOConfig, bf16=False, use_cpu=True, max_steps=1, report_to=[])
preferences = Dataset.from_list([{"prompt": "river", "chosen": " pub", "rejected": " park"}] * 2)
""",
        },
    ),
    "docs/guides/methods.md": Presumed(
        setup=_MODEL + 'text, answer = "The river", " pub"\n',
    ),
    "docs/guides/planning.md": Presumed(
        setup="""
from lorakit import DataConfig, TrainConfig
data("train.jsonl")
config = TrainConfig(base="smollm2-135m", data=DataConfig(train="train.jsonl"), output="out/run")
"""
    ),
    "docs/guides/reports.md": Presumed(setup='run("out/e2e")'),
    "docs/guides/tasks.md": Presumed(
        setup="from lorakit.tasks import DataSet, NamedText, text_field"
    ),
    "docs/guides/analysis.md": Presumed(
        setup="""
adapter("out/e2e")
A, A1, A2 = (torch.randn(4, 16) for _ in range(3))
B, W, W_adapted, scaling = torch.randn(12, 4), torch.randn(12, 16), torch.randn(12, 16), 2.0
"""
    ),
}
