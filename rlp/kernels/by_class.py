"""Path `by_class`: heads of its own for each class, in PyTorch; the rows of one class after the other."""
