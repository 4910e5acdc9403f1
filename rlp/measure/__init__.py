"""The calibrated measurement: fresh heads on frozen features, with controls and intervals beside every number."""
