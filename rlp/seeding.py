"""Seeds, determinism, and the random state that an exact resume must bring back."""

import os
import random
from typing import Any

import numpy as np
import torch

from rlp.philox import random_bits


def named_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one named use, so that e.g. drawing heads never shifts the backbone's initial weights."""
    high, low = random_bits(seed, f"seed.{name}", np.zeros((), dtype=np.int64), 2).tolist()
    return (high << 31) ^ low


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, NumPy and torch (all devices); ranks differ, so that dropout masks differ between them."""
    value = named_seed(seed, f"rank{rank}")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def make_deterministic() -> None:
    """Ask torch for deterministic algorithms (an operation without one raises) and no autotuned convolutions.

    Call it before the first product on a GPU: cuBLAS reads its setting, which torch demands here, only then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def capture_random_state(device: torch.device) -> dict[str, Any]:
    """State of every global generator, as tensors and plain numbers (loadable with ``weights_only=True``)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.array(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`capture_random_state` returned; its tensors may lie on any device (``map_location``)."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
