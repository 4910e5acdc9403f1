"""The heads themselves: initial weights, logits, readings, and mistakes named."""

import copy
import gc
import math

import pytest
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from rlp.errors import UserError
from rlp.labels import random_labels, random_words
from rlp.models import RandomLabelHeads, attach
from rlp.models import banks as banks_module
from rlp.models.banks import HeadBank

DIM, BATCH, DRAWS, LABELS = 6, 8, 3, 5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(DIM, 7), nn.ReLU(), nn.Linear(7, 4))


def small_heads(model: nn.Module, **changes) -> RandomLabelHeads:
    settings = {"taps": ["0", "1"], "num_labels": LABELS, "draws": DRAWS, "seed": 1, "example": torch.zeros(2, DIM)}
    return attach(model, **(settings | changes))


def images(seed: int = 0, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, DIM, generator=torch.Generator().manual_seed(seed))


# -- weights and logits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [0, 64])
def test_a_head_starts_like_a_linear_layer(hidden):
    bank = HeadBank(100, 4, 50, hidden, seed=0, tap="layer1")
    fan_ins = {"weight": hidden or 100, "bias": hidden or 100, "hidden_weight": 100, "hidden_bias": 100}
    for name, parameter in bank.named_parameters():
        bound = 1 / math.sqrt(fan_ins[name])
        for draw in range(4):
            values = parameter[draw].detach()
            assert values.abs().max() <= bound
            assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert {name.split("_")[-1] for name, _ in bank.named_parameters()} == {"weight", "bias"}


def test_weights_depend_on_seed_tap_and_draw_alone():
    def weights(**changes) -> dict[str, list[Tensor]]:
        heads = small_heads(network(), layers=2, hidden=9, **changes)
        return dict(zip(heads.tap_names, ([*bank.parameters()] for bank in heads.banks), strict=True))

    torch.manual_seed(3)
    base = weights()
    torch.manual_seed(4)
    more = weights(draws=DRAWS + 2, taps=["0", "1", "2"])
    for tap, parameters in base.items():
        for a, b in zip(parameters, more[tap], strict=True):
            assert torch.equal(a, b[:DRAWS])
    assert not torch.equal(base["0"][2], base["1"][2])
    assert not torch.equal(base["0"][2][0], base["0"][2][1])
    assert not torch.equal(base["0"][2], weights(seed=2)["0"][2])


def test_attaching_consumes_no_random_numbers():
    model = network()
    before = torch.get_rng_state()
    small_heads(model, layers=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("hidden", [0, 9])
def test_logits_are_those_of_separate_heads(hidden):
    bank = HeadBank(DIM, DRAWS, LABELS, hidden, seed=0, tap="a")
    x = images()
    logits = bank(x)
    assert logits.shape == (BATCH, DRAWS, LABELS)
    for draw in range(DRAWS):
        y = F.relu(F.linear(x, bank.hidden_weight[draw], bank.hidden_bias[draw])) if hidden else x
        torch.testing.assert_close(logits[:, draw], F.linear(y, bank.weight[draw], bank.bias[draw]))


def test_weights_alone_are_decayed():
    from rlp.optim import parameter_groups

    heads = small_heads(network(), layers=2, hidden=9)
    decayed, others = parameter_groups(heads, 0.1)
    assert {p.dim() for p in decayed["params"]} == {3}
    assert {p.dim() for p in others["params"]} == {2}
    assert len(decayed["params"]) == len(others["params"]) == 4


def test_the_network_is_no_part_of_the_heads():
    model = network()
    heads = small_heads(model)
    mine = {id(parameter) for parameter in model.parameters()}
    assert not mine & {id(parameter) for parameter in heads.parameters()}
    assert set(heads.state_dict()) == {"steps", *(f"banks.{k}.{p}" for k in (0, 1) for p in ("weight", "bias"))}
    assert set(model.state_dict()) == set(network().state_dict())
    other = small_heads(network(), seed=9)
    other.load_state_dict(heads.state_dict())
    assert torch.equal(other.banks[0].weight, heads.banks[0].weight)  # type: ignore[arg-type]


def test_separate_heads_learn_as_if_each_were_alone():
    """The sum over draws and taps: no head's gradient depends on how many others there are."""
    model, index = network(), torch.arange(BATCH)
    gradients = []
    for draws, taps in ((1, ["1"]), (DRAWS, ["0", "1"])):
        heads = small_heads(model, draws=draws, taps=taps)
        model(images())
        heads.loss(index).backward()
        gradients.append(heads.banks[-1].weight.grad[0])  # type: ignore[index]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("layers", [1, 2])
def test_heads_can_fit_few_samples(layers):
    model, index = network(), torch.arange(BATCH)
    heads = small_heads(model, layers=layers, hidden=32)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.05)
    for _ in range(300):
        model(images())
        heads.loss(index).backward()
        optimizer.step()
        optimizer.zero_grad()
    model(images())
    heads.evaluate(index)
    assert all(row.accuracy == 1.0 and row.kappa == 1.0 for row in heads.metrics("eval"))


# -- readings ----------------------------------------------------------------------------------------------------


def expected_loss_and_accuracy(model: nn.Sequential, heads: RandomLabelHeads, seeds: list[int]) -> dict:
    """By hand, per (tap, draw), with torch's cross-entropy."""
    found = {}
    for place, tap in enumerate(heads.tap_names):
        for draw in range(DRAWS):
            losses, right = [], []
            for seed in seeds:
                x = model[: int(tap) + 1](images(seed))
                logits = heads.banks[place](x)[:, draw]
                target = random_labels(random_words(1, torch.arange(BATCH) + seed, DRAWS), LABELS)[:, draw]
                losses.append(F.cross_entropy(logits, target).item())
                right.append((logits.argmax(1) == target).float().mean().item())
            found[tap, draw] = (sum(losses) / len(seeds), sum(right) / len(seeds))
    return found


@pytest.mark.parametrize("mode", ["online", "eval"])
def test_metrics_are_means_over_everything_seen(mode):
    model = network()
    heads = small_heads(model)
    for seed in (10, 20):
        model(images(seed))
        index = torch.arange(BATCH) + seed
        heads.loss(index) if mode == "online" else heads.evaluate(index)
    assert heads.metrics("eval" if mode == "online" else "online") == []
    expected = expected_loss_and_accuracy(model, heads, [10, 20])
    rows = heads.metrics(mode)
    assert [(row.tap, row.depth, row.draw) for row in rows] == [(t, d, k) for d, t in enumerate("01") for k in range(3)]
    for row in rows:
        loss, accuracy = expected[row.tap, row.draw]
        assert row.loss == pytest.approx(loss, rel=1e-6)
        assert row.accuracy == pytest.approx(accuracy)
        assert row.kappa == pytest.approx((LABELS * accuracy - 1) / (LABELS - 1))
        assert (row.count, row.num_labels, row.chance, row.dim) == (2 * BATCH, LABELS, 1 / LABELS, 7)
    assert heads.metrics(mode) == [], "reading resets"


def test_the_latest_losses_stay_on_the_device():
    model = network()
    heads = small_heads(model)
    model(images(10))
    loss = heads.loss(torch.arange(BATCH) + 10)
    expected = expected_loss_and_accuracy(model, heads, [10])
    per_tap = [sum(expected[tap, k][0] for k in range(DRAWS)) / DRAWS for tap in "01"]
    torch.testing.assert_close(heads.last_fit, torch.tensor(per_tap))
    assert loss.item() == pytest.approx(DRAWS * sum(per_tap), rel=1e-6)
    unweighted = heads.last_penalty
    model(images(10))
    penalised = heads.loss(torch.arange(BATCH) + 10, lam=2.0)
    assert torch.equal(unweighted, heads.last_penalty), "the penalty is read at λ = 0 as well"
    # a mean in last_penalty, for reading; in the loss a sum over the 2 taps and their draws
    assert penalised.item() == pytest.approx(loss.item() + 2 * 2 * DRAWS * unweighted.item(), rel=1e-6)
    assert not heads.last_fit.requires_grad
    assert not heads.last_penalty.requires_grad
    assert heads.steps.item() == 2


@pytest.mark.parametrize("layers", [1, 2])
def test_implementation_and_budget_reach_every_call(layers, monkeypatch):
    seen = []
    loss = banks_module.random_label_loss
    monkeypatch.setattr(banks_module, "random_label_loss", lambda *a, **how: seen.append(how) or loss(*a, **how))
    model = network()
    heads = small_heads(model, impl="eager", memory_budget=1000, layers=layers, hidden=3)
    for lam in (0.0, 0.5):
        model(images())
        heads.loss(torch.arange(BATCH), lam=lam)
    model(images())
    heads.evaluate(torch.arange(BATCH))
    assert seen
    assert all(how["impl"] == "eager" and how["memory_budget"] == 1000 for how in seen)


def test_an_empty_batch_leaves_no_trace_in_the_readings():
    model = network()
    heads = small_heads(model)
    for batch in (0, 4):
        model(images(batch=batch))
        heads.loss(torch.arange(batch), lam=0.5).backward()
    assert all(row.count == 4 and math.isfinite(row.loss) for row in heads.metrics())
    assert all(part.grad is None or part.grad.isfinite().all() for part in [*model.parameters(), *heads.parameters()])


def test_running_sums_go_on_from_a_checkpoint():
    model = network()
    whole, first, second = small_heads(model), small_heads(model), small_heads(model)
    for seed, part in ((10, first), (20, second)):
        if part is second:
            second.load_running_state(copy.deepcopy(first.running_state()))
        model(images(seed))
        for heads in (whole, part):
            heads.loss(torch.arange(BATCH) + seed)
        for heads in (first, second):
            heads._store.features.clear()
    assert whole.metrics() == second.metrics()


def test_the_summary_says_n_draws_samples_chance_and_interval():
    model = network()
    heads = small_heads(model)
    assert "no samples yet" in heads.summary()
    model(images())
    heads.loss(torch.arange(BATCH))
    model(images())
    heads.evaluate(torch.arange(BATCH))
    text = heads.summary()
    for part in ("5 random labels, 3 draws", "trained for 1 batches", "N = 8 samples", "chance", "0.2000", "95%"):
        assert part in text
    assert text.count("\n0 ") == text.count("\n1 ") == 2  # a line for each tap, online and eval
    assert " .. " in text
    assert heads.summary(reset=True) == text
    assert "no samples yet" in heads.summary()


def test_one_draw_has_no_interval():
    model = network()
    heads = small_heads(model, draws=1)
    model(images())
    heads.loss(torch.arange(BATCH))
    assert "one draw only" in heads.summary()


# -- hooks -------------------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_go_with_the_heads():
    model = network()
    with small_heads(model) as heads:
        assert hooks(model) == 2
    assert hooks(model) == 0
    heads.detach_hooks()  # again, without harm
    heads = small_heads(model, taps=["0:in", "1"])
    assert hooks(model) == 2
    del heads
    gc.collect()
    assert hooks(model) == 0


def test_two_sets_of_heads_read_one_pass():
    model = network()
    first, second = small_heads(model, split="train"), small_heads(model, split="val")
    model(images())
    assert not torch.equal(first.loss(torch.arange(BATCH)), second.loss(torch.arange(BATCH)))


# -- mistakes ----------------------------------------------------------------------------------------------------


def test_heads_want_one_pass_of_the_network_each():
    model = network()
    heads = small_heads(model)
    message = "no features at tap '0'; call the network first, and the heads once after each call"
    for call in (heads.loss, heads.evaluate):
        with pytest.raises(UserError, match=message):
            call(torch.arange(BATCH))
        model(images())
        call(torch.arange(BATCH))
        with pytest.raises(UserError, match=message):
            call(torch.arange(BATCH))


INDEX = torch.arange(BATCH)
WORDS = random_words(0, INDEX, DRAWS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either the sample ids .* not both or neither"),
        ({"index": INDEX, "words": WORDS}, "not both or neither"),
        ({"index": INDEX[:5]}, r"index has the shape \[5\]; expected \[8\], for the network saw 8 images"),
        ({"index": INDEX.unsqueeze(1)}, r"index has the shape \[8, 1\]"),
        ({"index": INDEX.float()}, "index is torch.float32; expected a tensor of whole numbers"),
        ({"index": [1, 2]}, "index is list; expected a tensor"),
        ({"words": WORDS[:, :2]}, r"words has the shape \[8, 2\]; expected \[8, 3\]"),
        ({"words": WORDS[:3]}, r"words has the shape \[3, 3\]"),
        ({"index": INDEX, "lam": -1.0}, "lam is -1.0; expected a finite number of at least 0"),
        ({"index": INDEX, "lam": math.nan}, "lam is nan"),
        ({"index": INDEX, "lam": math.inf}, "lam is inf"),
        ({"index": INDEX, "lam": torch.tensor(1.0)}, "lam is tensor"),
        ({"index": INDEX, "penalty": "max"}, "penalty is 'max'; expected one of forget, uniform"),
    ],
)
def test_wrong_arguments_of_the_loss_are_named(arguments, message):
    model = network()
    heads = small_heads(model)
    model(images())
    with pytest.raises(UserError, match=message):
        heads.loss(**arguments)


def test_a_penalty_that_cannot_reach_the_network_is_an_error():
    model = network()
    heads = small_heads(model)
    with torch.no_grad():
        model(images())
    with pytest.raises(UserError, match=r"lam is 1.0, but no tap's features carry a gradient"):
        heads.loss(INDEX, lam=1.0)
    model.requires_grad_(False)
    model(images())
    heads.loss(INDEX).backward()  # measuring a frozen network is fine


def test_features_of_another_size_are_named():
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    heads = attach(model, ["0@flatten"], example=torch.zeros(1, 3, 4, 4))
    model(torch.zeros(2, 3, 5, 5))
    with pytest.raises(UserError, match="tap '0@flatten' gives 50 features; its heads were made for 32"):
        heads.loss(torch.arange(2))


def test_an_unknown_mode_is_named():
    with pytest.raises(UserError, match="mode is 'train'; expected online or eval"):
        small_heads(network()).metrics("train")
