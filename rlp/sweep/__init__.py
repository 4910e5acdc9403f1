"""Regularisers compared at one tuning budget: equal numbers of trials each, chosen on validation samples, retrained
with fresh seeds, and read with the same heads (``python -m rlp.sweep``)."""
