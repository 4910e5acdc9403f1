"""What a network does with activations of low rank in the place of its own (Collins et al., arXiv 1810.03372)."""
