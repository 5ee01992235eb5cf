"""`pass_at_k`, where it was before."""

from rlzoo.evaluation.metrics import pass_at_k as pass_at_k
