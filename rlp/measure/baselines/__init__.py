"""The field's other measures of memorisation, on the same runs and samples as RLP-heads, by one interface.

Each module cites the equation and the paper, and offers one function ``measure(subject) -> Findings``.
"""

from importlib import import_module

from rlp.errors import UserError
from rlp.measure.baselines.interface import Finding, Findings, Measure, SampleScore, Subject

MEASURES: dict[str, str] = {
    "knn": "DNN or k-NN: whether the network answers as its nearest training samples would (Cohen et al. 2018)",
    "nmf": "non-negative rank of ReLU activations, by the accuracy that low ranks leave (Collins et al. 2018)",
    "permutation": "shared structure: what a shallow classifier learns of shuffled labels (Chaibub Neto 2018)",
    "depth": "prediction depth: first layer from which k-NN probes agree with the network (Baldock et al. 2021)",
    "feldman_zhang": "chance of being right with and without the sample in the training set (Feldman and Zhang 2020)",
    "dynamics": "EL2N, GraNd, forgetting events and AUM over retrained copies of the run",
    "adversarial": "critical sample ratio: share with another class within a small box (Arpit et al. 2017)",
    "lira": "membership inference by likelihood ratio against shadow models (Carlini et al. 2022)",
    "random_labels": "fresh random-label heads: how well they know the random labels of a sample (arXiv 2607.11541)",
    "loss": "the network's own loss on the given label: the plain score to beat",
}
"""Name of each measure, and what it claims, in a line."""

__all__ = ["MEASURES", "Finding", "Findings", "Measure", "SampleScore", "Subject", "load_measure"]


def load_measure(name: str) -> Measure:
    """The function of a measure; its module is imported only now.

    Raises:
        UserError: there is no such measure.
    """
    if name not in MEASURES:
        raise UserError(f"measure '{name}' does not exist; expected one of {', '.join(MEASURES)}")
    return import_module(f"rlp.measure.baselines.{name}").measure
