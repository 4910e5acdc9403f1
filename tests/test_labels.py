"""Words and labels: published vectors, golden values, NumPy against torch, and statistics of the draws."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from rlp.labels import (
    NAMED_WORDS,
    baked_words,
    class_floor,
    member_mask,
    named_word,
    noisy_labels,
    random_labels,
    random_words,
)
from rlp.philox import philox4x32, random_bits, stream_id

INDEX = np.arange(20000)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_published_vectors_of_philox(counter, key, expected, kind):
    """Random123's kat_vectors for philox4x32-10."""
    array = np.array if kind == "numpy" else torch.tensor
    words = philox4x32(tuple(array([value]) for value in counter), tuple(key))  # type: ignore[arg-type]
    assert " ".join(f"{int(word[0]):08x}" for word in words) == expected


def test_golden_words():
    """What is baked into files: these values never change."""
    assert stream_id("train.draw") == 3719008904
    assert random_words(0, np.array([0, 1, 2**32 - 1]), 3).tolist() == GOLDEN_WORDS
    assert baked_words(7, np.array([5]), 2, "val").tolist() == GOLDEN_BAKED
    assert random_labels(np.array(GOLDEN_WORDS), 10).tolist() == GOLDEN_LABELS


GOLDEN_WORDS = [
    [2749120583, 227534658, 2386578498],
    [2934415252, 730685068, 2618270909],
    [3066978547, 3188407452, 391563645],
]
GOLDEN_BAKED = [[1577301523, 3472967109, 26559030, 3901400834, 2458074434]]
GOLDEN_LABELS = [[6, 0, 5], [6, 1, 6], [7, 7, 0]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    index=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9),
    count=st.integers(1, 9),
    epoch=st.integers(0, 2**32 - 1),
    n=st.integers(1, 2**31),
)
def test_numpy_and_torch_agree_to_the_bit(seed, index, count, epoch, n):
    """Contract 3."""
    ours = random_bits(seed, "train.draw", np.array(index), count, epoch)
    theirs = random_bits(seed, "train.draw", torch.tensor(index), count, epoch)
    assert ours.dtype == np.int64
    assert theirs.dtype == torch.int64
    assert (ours == theirs.numpy()).all()
    assert ours.min() >= 0
    assert ours.max() < 2**32
    assert random_labels(ours, n).tolist() == random_labels(theirs, n).tolist()
    assert random_labels(ours, n).tolist() == [[word * n // 2**32 for word in row] for row in ours.tolist()]
    assert (random_bits(seed, "train.draw", np.array(index), count + 3, epoch)[:, :count] == ours).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_agrees_to_the_bit():
    """Contract 3 on the device."""
    index = torch.arange(100_000)
    here, there = random_words(3, index, 5), random_words(3, index.cuda(), 5)
    assert torch.equal(here, there.cpu())
    assert torch.equal(random_labels(here, 100_000), random_labels(there, 100_000).cpu())


def test_the_baked_column_is_the_function():
    """Contract 3: draws first, then the named words; splits are independent."""
    baked = baked_words(11, INDEX[:50], 4, "train")
    assert baked.shape == (50, 4 + len(NAMED_WORDS))
    assert (baked[:, :4] == random_words(11, INDEX[:50], 4)).all()
    for column, name in enumerate(NAMED_WORDS, start=4):
        assert (baked[:, column] == named_word(11, INDEX[:50], name)).all()
    assert not (baked == baked_words(11, INDEX[:50], 4, "val")).any()
    assert not (baked == baked_words(12, INDEX[:50], 4, "train")).any()


def test_labels_nest_as_n_grows():
    """The label among 20 decides that among 10, 5, 4 and 2: the same word serves all."""
    words = random_words(0, INDEX, 2)
    fine = random_labels(words, 20)
    for n in (10, 5, 4, 2):
        assert (random_labels(words, n) == fine // (20 // n)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.floats(0, 1), st.floats(0, 1), st.integers(2, 50))
def test_noise_and_members_nest(seed, a, b, classes):
    """What is noisy at the lower rate is so, with the same wrong class, at the higher one; a wrong class is wrong."""
    low, high = sorted((a, b))
    index = INDEX[:300]
    label = random_labels(random_bits(seed, "class", index, 1)[:, 0], classes)
    noise, noise_class, member = (named_word(seed, index, name) for name in NAMED_WORDS)
    few, many = (noisy_labels(label, noise, noise_class, rate, classes) for rate in (low, high))
    changed = few != label
    assert (many[changed] == few[changed]).all()
    assert ((many >= 0) & (many < classes)).all()
    assert not (member_mask(member, low) & ~member_mask(member, high)).any()
    everywhere = noisy_labels(label, noise, noise_class, 1.0, classes)
    assert (everywhere != label).all()
    assert (noisy_labels(label, noise, noise_class, 0.0, classes) == label).all()
    assert member_mask(member, 1.0).all()
    assert not member_mask(member, 0.0).any()
    tensors = [torch.from_numpy(part) for part in (label, noise, noise_class)]
    assert (noisy_labels(tensors[0], tensors[1], tensors[2], high, classes).numpy() == many).all()


def test_rates_are_met_and_wrong_classes_are_equally_likely():
    label = INDEX % 7
    noise, noise_class, member = (named_word(1, INDEX, name) for name in NAMED_WORDS)
    given = noisy_labels(label, noise, noise_class, 0.4, 7)
    assert (given != label).mean() == pytest.approx(0.4, abs=4 * (0.24 / len(INDEX)) ** 0.5)
    shift = ((given - label) % 7)[given != label]
    assert chi_square(np.bincount(shift, minlength=7)[1:]) < CHI_SQUARE_999[5]
    assert member_mask(member, 0.5).mean() == pytest.approx(0.5, abs=4 * (0.25 / len(INDEX)) ** 0.5)


CHI_SQUARE_999 = {1: 10.83, 4: 18.47, 5: 20.52, 9: 27.88, 16: 39.25, 99: 148.23}
"""99.9% points by degrees of freedom; the seeds are fixed, so a test passes always or never."""


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n", [2, 10, 100])
def test_labels_are_uniform(n):
    labels = random_labels(random_words(2, INDEX, 4), n)
    for draw in range(4):
        assert chi_square(np.bincount(labels[:, draw], minlength=n)) < CHI_SQUARE_999[n - 1]


def columns() -> dict[str, np.ndarray]:
    """Words that must have nothing to do with each other."""
    draws = random_words(3, INDEX, 6)
    named = {name: named_word(3, INDEX, name) for name in NAMED_WORDS}
    named |= {f"draw{k}": draws[:, k] for k in range(6)}
    named["val.draw0"] = random_words(3, INDEX, 1, "val")[:, 0]
    named["seed4.draw0"] = random_words(4, INDEX, 1)[:, 0]
    named["next sample"] = random_words(3, INDEX + 1, 1)[:, 0]
    named["next epoch"] = random_bits(3, "train.draw", INDEX, 1, epoch=1)[:, 0]
    return named


def test_draws_are_pairwise_independent():
    """Chi-square on the 5 x 5 table of labels of every pair of columns, at a level for the number of pairs."""
    table = {name: random_labels(words, 5) for name, words in columns().items()}
    names = sorted(table)
    pairs = [(a, b) for place, a in enumerate(names) for b in names[:place]]
    values = [chi_square(np.bincount(table[a] * 5 + table[b], minlength=25)) for a, b in pairs]
    # 24 degrees of freedom: 62.0 is the point that the largest of 78 passes with probability 0.002
    assert max(values) < 62.0
    assert np.mean(values) == pytest.approx(24, abs=4 * (48 / len(values)) ** 0.5)


def test_the_low_bits_are_as_good_as_the_high_ones():
    words = random_words(5, INDEX, 2)
    for shift in (0, 7, 15, 24, 31):
        assert chi_square(np.bincount((words.ravel() >> shift) & 1, minlength=2)) < CHI_SQUARE_999[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 6), st.integers(1, 8), st.integers(1, 3))
def test_class_floor_against_a_slow_oracle(seed, samples, classes, n, draws):
    rng = np.random.default_rng(seed)
    label, labels = rng.integers(classes, size=samples), rng.integers(n, size=(samples, draws))
    for draw, floor in enumerate(class_floor(label, labels, classes, n)):
        best = 0
        for c in range(classes):
            inside = [int(r) for r, k in zip(labels[:, draw], label, strict=True) if k == c]
            best += max((inside.count(j) for j in range(n)), default=0)
        assert floor == pytest.approx(best / samples)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: random_labels(np.zeros(1, dtype=np.int64), 0), "num_labels is 0; expected 1 to"),
        (lambda: random_words(-1, INDEX, 1), r"seed is -1; expected an integer in \[0, 2\^64\)"),
        (lambda: named_word(0, INDEX, "noize"), "unknown word 'noize'; expected one of noise, noise_class, member"),
        (lambda: member_mask(INDEX, 1.5), "member_fraction is 1.5; expected a number from 0 to 1"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
