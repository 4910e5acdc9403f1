"""The critical sample ratio: what the search finds is there, and what linear networks have can be worked out."""

from typing import Any

import numpy as np
from probed_run import tiny_finished_run
import pytest
import torch
from torch import Tensor, nn

from rlp.errors import UserError
from rlp.measure.baselines import adversarial
from rlp.measure.baselines.adversarial import first_change
from rlp.measure.baselines.interface import Subject
from rlp.measure.baselines.pool import Pool
from rlp.measure.run import Run, open_run
import train_rlp


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """40 members and 40 non-members of a tiny run, a fifth with a wrong label."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rlp, "write_figures", lambda *_: [])
        run = tiny_finished_run(tmp_path_factory.mktemp("tiny"))
    return Subject.of(open_run(run, device="cpu"), taps=["block3"], samples=40, seed=5)


class Linear(nn.Module):
    """Two classes; the margin of class 0 is w·x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        margin = x.flatten(1) @ self.weight
        return torch.stack([margin, torch.zeros_like(margin)], dim=1)


def search(model: nn.Module, images: Tensor, radius: float, **changes: Any) -> Tensor:
    options: dict[str, Any] = {"step": torch.tensor(radius / 10), "noise": 0.0, "steps": 12, **changes}
    bounds = images - radius, images + radius
    return first_change(model, images, bounds, generator=torch.Generator().manual_seed(0), **options)


def test_a_linear_network_changes_where_arithmetic_says() -> None:
    """Without noise the step is the first t with t·α·|w|_1 above the margin, and none if r·|w|_1 is below it."""
    torch.manual_seed(0)
    weight, images, radius = torch.randn(27), 0.3 * torch.randn(200, 3, 3, 3), 0.05
    margin = (images.flatten(1) @ weight).abs()
    reach = weight.abs().sum() * radius
    expected = torch.where(margin < reach, (margin / (reach / 10)).floor().long() + 1, 0)
    assert 0.2 < float((expected > 0).float().mean()) < 0.8
    found = search(Linear(weight), images, radius)
    clear = ((margin / (reach / 10)) % 1 - 0.5).abs() < 0.49  # rounding decides at whole numbers
    assert torch.equal(found[clear], expected[clear])


def test_what_is_found_lies_in_the_box_and_has_another_class() -> None:
    torch.manual_seed(1)
    seen: list[Tensor] = []

    class Watched(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(input.detach().clone())
            return super().forward(input)

    model = Watched(nn.Flatten(), nn.Linear(27, 16), nn.ReLU(), nn.Linear(16, 4)).requires_grad_(False)
    images, radius = torch.randn(60, 3, 3, 3), 0.2
    found = search(model, images, radius, noise=0.8)
    assert 0 < int((found > 0).sum()) < 60
    points, answer = seen.copy(), model(images).argmax(dim=1)
    active = torch.arange(60)
    for number, batch in enumerate(points):
        assert float((batch - images[active]).abs().max()) <= radius * 1.0001
        changed = model(batch).argmax(dim=1) != answer[active]
        assert set(active[changed].tolist()) == set(torch.nonzero(found == number)[:, 0].tolist()) or number == 0
        active = active[~changed]
    assert torch.equal(search(model, images, radius, noise=0.8), found)  # the noise is seeded


def test_a_larger_box_holds_more_critical_samples(subject: Subject) -> None:
    ratios = []
    for radius in (1e-6, 0.1, 0.5):
        findings = adversarial.measure(subject, radius=radius)
        row = findings.rows[0]
        ratios.append(row.value.mean)
        assert row.quantity == "critical sample ratio"
        assert row.non_members is not None
        assert 0 <= row.controls["untrained"] <= 1  # type: ignore[operator]
        assert f"radius {radius:.4f}" in row.settings
        for score in findings.scores:
            samples = subject.members if score.group == "members" else subject.non_members
            assert np.array_equal(score.ids, samples.ids)
            assert score.values.dtype == np.float64
        critical = findings.scores[0].values > 0
        assert row.value.mean == pytest.approx(critical.mean())
        assert {score.group for score in findings.scores} == {"members", "non-members"}
    assert ratios == sorted(ratios)
    assert ratios[0] == 0
    assert ratios[-1] > 0.5


def test_a_share_ends_at_none_and_all(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """One critical sample of 40: the normal interval would begin below 0."""
    monkeypatch.setattr(adversarial, "_scores", lambda *_: np.eye(40)[0])
    (row, *_) = adversarial.measure(subject).rows
    assert (row.value.mean, row.value.low) == (1 / 40, 0)


def test_scores_are_those_of_each_image(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample's own image, r in pixels' units, within valid pixels."""
    boxes: list[tuple[Tensor, Tensor, Tensor]] = []

    def watched(model: nn.Module, images: Tensor, bounds: tuple[Tensor, Tensor], **options: Any) -> Tensor:
        boxes.append((images, *bounds))
        return torch.arange(len(images)) % 3

    monkeypatch.setattr(adversarial, "first_change", watched)
    run, group = subject.run, subject.run.groups["members"]
    findings = adversarial.measure(subject, radius=0.1, steps=10)
    pool = Pool.of(run, [group.of(group.view.ids[np.isin(group.ids, subject.members.ids)])])
    mean, std = (torch.tensor(values)[:, None, None] for values in (run.card.mean, run.card.std))
    count = sum(len(box[0]) for box in boxes) // 3
    assert count == 40
    pixels, low, high = (torch.cat(parts)[:count] * std + mean for parts in zip(*boxes, strict=True))
    shown = pool.images.permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(pixels, shown, rtol=0, atol=1e-5)
    torch.testing.assert_close(low, (shown - 0.1).clamp(min=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(high, (shown + 0.1).clamp(max=1), rtol=0, atol=1e-5)
    sizes = [len(box[0]) for box in boxes[: len(boxes) // 3]]
    numbers = np.concatenate([np.arange(size) % 3 for size in sizes])
    assert findings.scores[0].values.tolist() == [[0.0, 1.0, 0.9][number] for number in numbers]


def test_the_search_leaves_network_and_random_state(subject: Subject) -> None:
    before, weights = torch.get_rng_state(), [p.clone() for p in subject.run.model.parameters()]
    first, second = (adversarial.measure(subject, steps=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights, subject.run.model.parameters(), strict=True))
    assert all(np.array_equal(a.values, b.values) for a, b in zip(first.scores, second.scores, strict=True))


@pytest.mark.parametrize("mistake", [{"radius": 0.0}, {"radius": 1.5}, {"steps": 0}, {"step": -1.0}, {"noise": -1.0}])
def test_mistakes_are_named(mistake: dict[str, Any], subject: Subject) -> None:
    with pytest.raises(UserError, match="expected a radius above 0"):
        adversarial.measure(subject, **mistake)


def test_control_is_the_untrained_network(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that answers the same everywhere has no critical samples; only the control uses it here."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4] * 0 + torch.arange(4.0)

    monkeypatch.setattr(Run, "untrained", lambda self, seed=0: Constant())
    row = adversarial.measure(subject, radius=0.5).rows[0]
    assert row.controls["untrained"] == 0
    assert row.value.mean > 0.5
    assert row.non_members is not None
    assert row.non_members.mean > 0.5
