"""Instance retrieval."""

import numpy as np
import pytest
import torch

from rlp.errors import UserError
from rlp.measure import retrieval
from rlp.measure.retrieval import own_view_is_nearest


def random_views(samples: int, dim: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    anchors = torch.randn(samples, dim, generator=random)
    return anchors, anchors + noise * torch.randn(samples, dim, generator=random)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_as_a_plain_search_finds(monkeypatch: pytest.MonkeyPatch, chunk: int, offset: float) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    anchors, queries = (part + offset for part in random_views(61, 3, 0.3))
    found = own_view_is_nearest(anchors, queries)
    distance = np.linalg.norm(queries.double().numpy()[:, None] - anchors.double().numpy()[None], axis=2)
    assert found.dtype == bool
    assert np.array_equal(found, distance.argmin(1) == np.arange(61))
    assert 0 < found.sum() < 61


def test_ties_are_wrong() -> None:
    anchors, queries = random_views(40, 5, 0.0)
    anchors[3] = anchors[30]
    found = own_view_is_nearest(anchors, queries)
    assert sorted(np.flatnonzero(~found)) == [3, 30]  # the view of 3 has its anchor elsewhere, that of 30 has two


def test_a_tie_of_equal_anchors_is_wrong_for_both() -> None:
    anchors, _ = random_views(40, 5, 0.0)
    anchors[3] = anchors[30]
    assert np.flatnonzero(~own_view_is_nearest(anchors, anchors.clone())).tolist() == [3, 30]
    assert not own_view_is_nearest(torch.ones(9, 4) / 3, torch.ones(9, 4) / 3).any()


def test_one_sample_is_its_own_nearest() -> None:
    assert own_view_is_nearest(torch.zeros(1, 2), torch.ones(1, 2)).tolist() == [True]


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(UserError, match="expected one row of each"):
        own_view_is_nearest(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(UserError, match="sample 0 hold NaN"):
        own_view_is_nearest(torch.zeros(1, 2), torch.full((1, 2), torch.nan))
