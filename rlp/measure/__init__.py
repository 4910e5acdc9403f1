"""The calibrated measurement: fresh heads on frozen features, with controls and intervals beside every number."""

from rlp.measure.probe import probe  # a function: it takes the place of the module of that name
from rlp.measure.reading import load_readings
from rlp.measure.run import open_run
from rlp.measure.scores import load_scores

__all__ = ["load_readings", "load_scores", "open_run", "probe"]
