"""The papers' findings, each by one command: train, read in two ways, judge the sign (``python -m rlp.reproduce``)."""
