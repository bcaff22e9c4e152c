"""The commands that fit a trained adapter, for `lorakit init` and the end of `lorakit train`."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.formatting import shell_command

USES = {
    "text": "lorakit generate {adapter} --prompt TEXT",
    "labels": "lorakit predict {adapter} --data.test NEW.csv --output {predictions}",
    "chat": "lorakit chat {adapter}",
    "serve": "lorakit serve --follow {run} --open",
    "merge": "lorakit merge {adapter} --output {merged}",
}
"""The commands. `{adapter}` stands for the options that name the adapter, `{run}` for the run's folder, `{predictions}`
and `{merged}` for outputs beside it."""

MERGEABLE = {"lora", "full", "bitfit"}
"""Methods that change weights, so that `lorakit merge` accepts their adapters. A user's method may not."""


def commands_for(
    generic_task: str, adapter: str, run: str, methods: Sequence[str] = ("lora",)
) -> list[str]:
    """Return the commands for an adapter of this task.

    Args:
        generic_task: A name in `lorakit.tasks.GENERIC`.
        adapter: The options that name the adapter, such as "--adapter out/chat/adapter".
        run: The run's folder.
        methods: Names of the adapter's methods.
    """
    fitting = ["labels"] if generic_task in ("classification", "regression") else ["text"]
    fitting += ["chat"] if generic_task == "chat" else []
    fitting += ["serve"] if set(methods) == {"lora"} else []
    fitting += ["merge"] if MERGEABLE.issuperset(methods) else []
    paths = {
        "run": run,
        "predictions": f"{run}-predictions.jsonl",
        "merged": f"{run}-merged",
    }
    parts = {name: shell_command([path]) for name, path in paths.items()}
    return [USES[name].format(adapter=adapter, **parts) for name in fitting]
