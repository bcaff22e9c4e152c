"""POST /v1/classify: classes and scores."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorakit.data import DataTask
from lorakit.serving.classifying import ClassifyingEngine
from lorakit.serving.engine import Lease
from lorakit.serving.http.answers import ClassifyAnswer, ClassifyRow, PromptTokens, Usage
from lorakit.serving.http.body import StrictRoute
from lorakit.serving.http.errors import ApiError, invalid_value, require_at_most
from lorakit.serving.http.generation import receipt_headers
from lorakit.serving.http.prompts import TOKENISING, require_short
from lorakit.serving.http.schemas import ClassifyRequest
from lorakit.serving.http.state import guarded, record_of, require_capacity, serving_of
from lorakit.tasks import TASKS, BadRow, Classification, Labelled, LabelledExample, Regression

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/classify", response_model=ClassifyAnswer)
async def classify(request: Request, body: ClassifyRequest) -> Response:
    """Predict the class or the score of texts, or of pairs of texts, with an adapter."""
    serving, record = serving_of(request), record_of(request)
    engine = serving.engine
    if not isinstance(engine, ClassifyingEngine):
        raise invalid_value("This server generates text; none of its models classifies.", "model")
    rows = body.rows
    require_at_most("input", len(rows), serving.config.max_inputs, "max_inputs", "texts")
    require_capacity(serving)

    def prepare(lease: Lease) -> list[LabelledExample]:
        task, context = _task(body.model, lease), engine.limits.context
        examples = _encode(task, lease.tokenizer, rows, context)
        record.key.reserve_tokens(sum(map(len, examples)))
        return examples

    async def work() -> tuple[Lease, int, Tensor]:
        lease, examples = await serving.acquire_and_prepare(record, prepare, body.model)
        tokens = sum(map(len, examples))
        try:
            future = serving.submit_leased(lease, lambda: engine.classify(examples, lease))
        except BaseException:
            record.key.give_back_tokens(tokens)
            raise
        return lease, tokens, await asyncio.wrap_future(future)

    lease, tokens, logits = await guarded(request, work())
    serving.metrics.tokens(record.model, prompt=tokens)
    answer = ClassifyAnswer(
        id=f"classify-{record.id}",
        created=int(time.time()),
        model=body.model,
        system_fingerprint=lease.receipt.fingerprint,
        data=_predictions(logits, lease.labels),
        usage=Usage(
            prompt_tokens=tokens,
            completion_tokens=0,
            total_tokens=tokens,
            prompt_tokens_details=PromptTokens(),
        ),
    )
    return JSONResponse(answer.model_dump(), headers=receipt_headers(lease))


def _task(name: str, lease: Lease) -> DataTask:
    """Return the task that an adapter was trained for; without a record the one that fits its head.

    Raises:
        ApiError: It does not classify.
    """
    kind = TASKS.get(str(lease.task))
    is_text = kind is not None and not issubclass(kind, Labelled)
    if is_text or lease.outputs is None:
        raise invalid_value(
            f"{name!r} has neither classes nor a score. Name an adapter that has.",
            "model",
        )
    if kind is None:
        kind = Classification if lease.labels else Regression
    return DataTask(name=kind.name, labels=lease.labels)


def _encode(
    task: DataTask,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[str, ...]],
    context: int,
) -> list[LabelledExample]:
    """Return the inputs as in training."""
    assert issubclass(task.type, Labelled)
    encoder = task.type(tokenizer, max_length=sys.maxsize, labels=task.labels)
    examples = []
    for number, row in enumerate(rows):
        pair = len(row) == 2
        names = encoder.texts or (("sentence1", "sentence2") if pair else ("text",))
        if len(names) != len(row):
            raise invalid_value(
                f"'input' has {'a pair of texts' if pair else 'one text'} at position {number}; the task {task.name} "
                f"takes {'pairs of texts' if len(names) == 2 else 'single texts'}.",
                f"input.{number}",
            )
        for text in row:
            require_short(tokenizer, text, context, f"input.{number}")
        try:
            with TOKENISING:
                example = encoder.encode_unlabelled(dict(zip(names, row, strict=True)))
        except BadRow as error:
            raise invalid_value(
                f"'input' at position {number}: {error}.", f"input.{number}"
            ) from None
        if len(example) > context:
            raise ApiError(
                400,
                f"'input' has {len(example):,} tokens at position {number}; the context is {context:,}. Shorten it.",
                param=f"input.{number}",
                code="context_length_exceeded",
            )
        examples.append(example)
    return examples


def _predictions(logits: Tensor, labels: Sequence[str]) -> list[ClassifyRow]:
    """Return the class or the score of each row of logits (rows, outputs)."""
    if not logits.isfinite().all():
        raise ApiError(
            500,
            "The model's output is not finite. Try base.dtype float32.",
            code="not_finite",
            final=True,
        )
    if not labels:
        scores = logits.reshape(-1).tolist()
        return [ClassifyRow(index=i, label=None, score=s, scores={}) for i, s in enumerate(scores)]
    rows = []
    for index, row in enumerate(logits.double().softmax(-1).tolist()):
        scores = dict(zip(labels, row, strict=True))
        label = max(scores, key=scores.__getitem__)
        rows.append(ClassifyRow(index=index, label=label, score=scores[label], scores=scores))
    return rows
