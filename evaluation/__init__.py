"""Evaluation of GSVA: questions → answers → metric rows → records → pages.

>>> config = EvaluationConfig(rows=[], dataset="grefcoco", split="val", protocol="generate")
>>> config.prompts
'all expressions in one'
"""

from .config import EvaluationConfig
from .loop import EvaluationResult, evaluate_rows
from .predict import predict_files, predict_rows
from .run import run_evaluation

__all__ = [
    "EvaluationConfig",
    "EvaluationResult",
    "evaluate_rows",
    "predict_files",
    "predict_rows",
    "run_evaluation",
]
