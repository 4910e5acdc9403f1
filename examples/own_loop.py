"""Random-label heads in a training loop of your own: scikit-learn's digits, a plain PyTorch network and DataLoader.

python examples/own_loop.py
"""

from sklearn.datasets import load_digits
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import rlp


def main(epochs: int = 30) -> str:
    """Train, and return the table of κ at each tap."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits["data"], dtype=torch.float32) / 16
    labels = torch.tensor(digits["target"])
    index = torch.arange(len(images))  # the number of a sample is all that its random labels need
    loader = DataLoader(TensorDataset(images, labels, index), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    heads = rlp.attach(model, taps=["1", "3"], num_labels=10, draws=8, seed=0, example=images[:1])
    optimizer = torch.optim.Adam([*model.parameters(), *heads.parameters()], lr=1e-3)
    for _ in range(epochs):
        for image, label, number in loader:
            loss = F.cross_entropy(model(image), label) + heads.loss(number, lam=0.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    with torch.no_grad():
        for image, _, number in loader:
            model(image)
            heads.evaluate(number)
    return heads.summary()


if __name__ == "__main__":
    print(main())
