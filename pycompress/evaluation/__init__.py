"""How good, how large and how fast a model is, beside the one that it was compressed from."""

from pycompress.evaluation.bootstrap import Interval
from pycompress.evaluation.evaluate import evaluate
from pycompress.evaluation.outputs import Pair
from pycompress.evaluation.records import Evaluation, Figure
from pycompress.evaluation.robustness import Robustness

__all__ = ["Evaluation", "Figure", "Interval", "Pair", "Robustness", "evaluate"]
