"""lighteval's details."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from rlzoo.buffers.importer import Importer, LoggedSample, number_in, register_importer
from rlzoo.buffers.importers.lm_eval import UNSCORED
from rlzoo.buffers.values import Row, find
from rlzoo.errors import UserError, kind_of, unknown
from rlzoo.policy.chat import messages
from rlzoo.policy.encoding import Prompt


@register_importer
class LightevalDetails(Importer):
    """``details_TASK_DATE.parquet``, which lighteval writes with ``--save-details``; tasks that generate text only.

    The reward is a metric of the row. A problem that was sampled several times has one metric for all of its responses,
    so they have no rewards. Checked against lighteval 0.13.0 and its main branch at commit
    3fd1526 of 5 May 2026.
    """

    name: ClassVar[str] = "lighteval"
    files: ClassVar[tuple[str, ...]] = ("**/details_*.parquet",)

    metric: str | None = None
    """The metric that is the reward; None: the first."""

    def samples(self, row: Row) -> Iterable[LoggedSample]:
        doc, response, metrics = (_struct(row, name) for name in ("doc", "model_response", "metric"))
        texts = response.get("text")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(
                "column 'model_response' holds no generated text: only tasks that generate text can be imported"
            )
        scores = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        name = next(iter(scores), None) if self.metric is None else self.metric
        if name is not None and name not in metrics:
            raise unknown("metric", name, metrics)
        reward = None if name is None or len(texts) > 1 else number_in(metrics, name)
        prompt, choices, gold = _prompt(response, doc), doc.get("choices") or [], doc.get("gold_index")
        places = gold if isinstance(gold, list) else [gold]
        golds = [choices[one] for one in places if isinstance(one, int) and 0 <= one < len(choices)]
        for text in texts:
            yield LoggedSample(
                prompt=prompt,
                completion=text if isinstance(prompt, str) else {"role": "assistant", "content": text},
                reward=reward,
                components={key: float(value) for key, value in scores.items()} if len(texts) == 1 else {},
                columns={
                    "query": doc.get("query"), "task": doc.get("task_name"), "answer": golds[0] if golds else None,
                    "golds": golds, "id": doc.get("id"),
                },
                notes={UNSCORED: f"{len(texts)} responses"} if len(texts) > 1 else {},
            )  # fmt: skip


def _struct(row: Row, name: str) -> Mapping[str, Any]:
    value = find(row, name)
    if not isinstance(value, Mapping):
        raise UserError(f"column {name!r} holds {kind_of(value)}: give the details that lighteval wrote")
    return value


def _prompt(response: Mapping[str, Any], doc: Mapping[str, Any]) -> Prompt:
    """What the model was given, or else the query."""
    given = response.get("input") or doc.get("query")
    return given if isinstance(given, str) else messages(given, "field 'input' of column 'model_response'")
