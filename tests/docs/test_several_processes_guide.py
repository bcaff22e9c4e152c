"""The guide to several processes: its commands and its jobs for clusters are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pages
import yaml
from torch.distributed.run import get_args_parser
from walk import words

from lorakit.cli.parsing import parse
from lorakit.training.config import TrainConfig

PAGE = "docs/guides/several-processes.md"
EXAMPLES = "examples/"
"""Commands with a script of this folder run in tests/integration/test_process_loops.py."""


def commands() -> list[str]:
    found = [step.text for step in pages.steps(PAGE, pages.read(PAGE)) if step.kind == "command"]
    return [text for text in found if EXAMPLES not in text]


def cluster_jobs() -> list[list[str]]:
    """Return the arguments of `torchrun` in the job for Slurm and in that for Kubernetes."""
    blocks = pages.blocks(PAGE, pages.read(PAGE))
    (slurm,) = (block.text for block in blocks if block.text.startswith("#!/bin/bash"))
    (kubernetes,) = (block.text for block in blocks if block.text.startswith("apiVersion"))
    (command,) = re.findall(r"torchrun (.*?) \\\n    \|\|", slurm, re.S)
    service, job = yaml.safe_load_all(kubernetes)
    template = job["spec"]["template"]["spec"]
    (container,) = template["containers"]
    assert container["command"] == ["torchrun"]
    # The first pod of an indexed job has this name, if the service selects the pods of the job.
    name = f"{job['metadata']['name']}-0.{template['subdomain']}"
    assert f"--rdzv-endpoint={name}:29500" in container["args"]
    assert template["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert {v["name"] for v in container["volumeMounts"]} == {
        v["name"] for v in template["volumes"]
    }
    return [words(command.replace("\\\n", " ")), container["args"]]


def test_the_jobs_for_clusters_are_valid(tmp_path: Path) -> None:
    for arguments in cluster_jobs():
        launched = get_args_parser().parse_args(arguments)
        assert (launched.nnodes, launched.nproc_per_node, launched.max_restarts) == ("2", "8", 0)
        assert require_valid(arguments, tmp_path).resume


def require_valid(arguments: list[str], folder: Path) -> TrainConfig:
    """Require that `torchrun` with these arguments starts `lorakit train`; return the settings of the run."""
    launched = get_args_parser().parse_args(arguments)
    assert (launched.module, launched.training_script) == (True, "lorakit")
    command, *options = launched.training_script_args
    assert command == "train"
    config = folder / "e2e.yaml"
    config.write_text("{base: {name: a}, data: {train: b}, output: c}")
    options = [re.sub(r"(/shared/)?e2e\.yaml$", str(config), text) for text in options]
    return parse(TrainConfig, "train", "", options)


def test_the_commands_are_valid(tmp_path: Path) -> None:
    """test_process_failures.py starts one that shards the base and resumes."""
    configs = [require_valid(words(command)[1:], tmp_path) for command in commands()]
    assert [(config.shard, config.resume) for config in configs] == [
        (False, False),
        (True, False),
        (False, True),
    ]
