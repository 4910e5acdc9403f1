"""Views on one file: exact sizes, nesting in every direction, label noise that depends on the sample alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
from small_sets import change_card, random_images, write_set, write_shards
import torch

from rlp.data.beton import Beton
from rlp.data.label_noise import CIFAR10_MAP, CIFAR100_SUPERCLASSES, given_labels
from rlp.data.view import View, ViewOptions, make_view
from rlp.errors import UserError
from rlp.labels import member_mask

COUNT, CLASSES = 1200, 5
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    path = tmp_path_factory.mktemp("view") / "a.beton"
    return Beton.open(write_set(path, random_images(COUNT, 1, 1), classes=CLASSES, page_size=1 << 16))


def view(beton: Beton, **options: Any) -> View:
    return make_view(beton, ViewOptions(**options))


def sizes(beton: Beton, seen: View) -> list[int]:
    return np.bincount(beton.label[seen.ids], minlength=CLASSES).tolist()


def within(smaller: View, larger: View) -> bool:
    return set(smaller.ids.tolist()) <= set(larger.ids.tolist())


shares = st.floats(0.001, 1.0)
imbalances = st.floats(1.0, 500.0)


def test_the_default_is_the_whole_set(beton: Beton) -> None:
    whole = view(beton)
    assert np.array_equal(whole.ids, np.arange(COUNT))
    assert np.array_equal(whole.label, beton.label)
    assert whole.describe() == []
    assert whole.summary() == {"samples": COUNT, "steps": [], "labels": "true", "wrong_labels": 0}


@given(shares, shares, st.booleans(), imbalances)
def test_shares_are_exact_and_nested_also_under_a_long_tail(
    beton: Beton, a: float, b: float, per_class: bool, imbalance: float
) -> None:
    small, large = (view(beton, fraction=f, fraction_per_class=per_class) for f in sorted((a, b)))
    assert within(small, large)
    assert (np.diff(small.ids) > 0).all()
    if per_class:
        assert sizes(beton, small) == [max(1, round(min(a, b) * COUNT / CLASSES))] * CLASSES
    else:
        assert len(small.ids) == max(1, round(min(a, b) * COUNT))
    tails = [
        view(beton, fraction=f, fraction_per_class=per_class, imbalance=imbalance).ids.tolist() for f in sorted((a, b))
    ]
    assert set(tails[0]) <= set(tails[1])


@given(imbalances, imbalances)
def test_long_tails_are_exact_and_nested(beton: Beton, a: float, b: float) -> None:
    weak, strong = (view(beton, imbalance=rho) for rho in sorted((a, b)))
    assert within(strong, weak)
    largest = COUNT // CLASSES
    expected = [max(1, round(largest * max(a, b) ** -(c / (CLASSES - 1)))) for c in range(CLASSES)]
    assert sizes(beton, strong) == expected


@given(st.floats(0.02, 1.0), st.floats(0.02, 1.0), st.floats(0.05, 1.0))
def test_members_are_nested_and_non_members_are_the_others(beton: Beton, a: float, b: float, share: float) -> None:
    small, large = (view(beton, member_fraction=f, fraction=share) for f in sorted((a, b)))
    assert within(small, large)
    everything = view(beton, fraction=share).ids
    expected = everything[member_mask(beton.named("member"), max(a, b))[everything]]
    assert np.array_equal(large.ids, expected)
    if len(large.ids) < len(everything):
        others = view(beton, member_fraction=max(a, b), members="non-members", fraction=share)
        assert np.array_equal(np.sort(np.concatenate([large.ids, others.ids])), everything)


def test_members_are_independent_of_shares(beton: Beton) -> None:
    members = member_mask(beton.named("member"), 0.5)
    share = members[view(beton, fraction=0.5).ids].mean()
    assert abs(share - members.mean()) < 5 * 0.5 / np.sqrt(COUNT / 2)


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
@given(a=st.floats(0, 1), b=st.floats(0, 1), share=shares)
def test_noise_is_nested_and_depends_on_the_sample_alone(
    beton: Beton, kind: str, a: float, b: float, share: float
) -> None:
    low, high = (view(beton, label_noise=rate, noise_kind=kind) for rate in sorted((a, b)))
    wrong = low.label != beton.label
    assert (high.label[wrong] == low.label[wrong]).all()
    part = view(beton, label_noise=max(a, b), noise_kind=kind, fraction=share)
    assert np.array_equal(part.label, high.label)
    assert part.wrong == (part.label != beton.label)[part.ids].sum()
    realised = (high.label != beton.label).mean()
    assert abs(realised - max(a, b)) <= 5 * np.sqrt(max(a, b) * (1 - max(a, b)) / COUNT) + 1e-3


def test_pair_noise_takes_the_next_class(beton: Beton) -> None:
    assert np.array_equal(view(beton, label_noise=1.0, noise_kind="pair").label, (beton.label + 1) % CLASSES)


def named(tmp_path: Path, names: tuple[str, ...]) -> Beton:
    path = write_set(tmp_path / "c.beton", random_images(len(names) * 2, 1, 1), classes=len(names))
    change_card(path, classes=list(names))
    return Beton.open(path)


def test_asymmetric_noise_knows_cifar10(tmp_path: Path) -> None:
    label = given_labels(named(tmp_path, CIFAR10), 1.0, "asymmetric")[:10]
    pairs = {CIFAR10[c]: CIFAR10[label[c]] for c in range(10) if label[c] != c}
    assert pairs == CIFAR10_MAP == {
        "truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"
    }  # fmt: skip


def test_asymmetric_noise_knows_cifar100(tmp_path: Path) -> None:
    groups = [group.split() for group in CIFAR100_SUPERCLASSES.split(";")]
    assert [len(group) for group in groups] == [5] * 20
    names = tuple(sorted(name for group in groups for name in group))
    assert len(set(names)) == 100
    label = given_labels(named(tmp_path, names), 1.0, "asymmetric")[:100]
    told = {names[c]: names[label[c]] for c in range(100)}
    assert told["beaver"] == "dolphin"
    assert told["whale"] == "beaver"
    assert told["tractor"] == "lawn_mower"
    assert sorted(told.values()) == list(names)


def test_asymmetric_noise_needs_known_classes(beton: Beton) -> None:
    with pytest.raises(UserError, match=r"data\.noise_kind is asymmetric, .* has 5 classes \(class0, class1, class2"):
        view(beton, label_noise=0.1, noise_kind="asymmetric")


def test_duplicates_are_dropped_first(tmp_path: Path) -> None:
    path = write_set(tmp_path / "a.beton", random_images(40, 1, 1))
    with pytest.raises(UserError, match=r"data\.drop_duplicates is true, .* run python -m rlp\.data duplicates"):
        view(Beton.open(path), drop_duplicates=True)
    card = Beton.open(path).card
    replace(card, duplicates={"method": "by hand", "distance": 1, "dropped": [3, 17]}).write(path)
    found = Beton.open(path)
    assert set(range(40)) - set(view(found, drop_duplicates=True).ids.tolist()) == {3, 17}
    assert len(view(found, drop_duplicates=True, fraction=0.5).ids) == 19


def test_the_log_says_what_each_step_left(beton: Beton) -> None:
    seen = view(beton, fraction=0.5, imbalance=10, member_fraction=0.5, label_noise=0.2)
    lines = seen.describe()
    assert lines[0].startswith("data.fraction 0.5: 600 of 1,200 samples (")
    assert lines[1].startswith("data.imbalance 10: ")
    assert lines[2].startswith("data.member_fraction 0.5 (members): ")
    assert lines[3].startswith(
        f"data.label_noise 0.2 (symmetric): {seen.wrong:,} of {len(seen.ids):,} labels are wrong"
    )
    summary = seen.summary()
    assert summary["samples"] == len(seen.ids) == summary["steps"][-1]["after"]
    assert [step["before"] for step in summary["steps"]] == [1200, *(s["after"] for s in summary["steps"][:-1])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"data\.fraction is 0"),
        ({"member_fraction": 1.5}, r"data\.member_fraction is 1\.5"),
        ({"member_fraction": 1e-9}, r"data\.member_fraction 1e-09 \(members\) leaves no sample"),
        ({"members": "non-members"}, r"data\.member_fraction 1\.0 \(non-members\) leaves no sample"),
        ({"members": "all"}, r"data\.members is 'all'; expected one of members, non-members"),
        ({"imbalance": 0.5}, r"data\.imbalance is 0\.5"),
        ({"imbalance": float("nan")}, r"data\.imbalance is nan"),
        ({"label_noise": -0.1}, r"data\.label_noise is -0\.1"),
        ({"label_noise": float("nan")}, r"data\.label_noise is nan"),
        ({"noise_kind": "odd"}, r"data\.noise_kind is 'odd'"),
        ({"label_noise": 0.1, "label_file": "a.npy"}, r"data\.label_file and data\.label_noise are both set"),
        ({"label_key": "worse_label"}, r"data\.label_key is 'worse_label', but data\.label_file is null"),
    ],
)
def test_what_cannot_be_is_named(beton: Beton, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        view(beton, **options)


# Labels from files.

TRUE = np.arange(COUNT) % CLASSES
GIVEN = np.where(np.arange(COUNT) % 7 == 0, (TRUE + 2) % CLASSES, TRUE)
Write = Callable[[Path], Any]


def written_pt(path: Path, **arrays: Any) -> None:
    torch.save(dict(arrays), path)


FILES: dict[str, tuple[str, str | None, Write]] = {
    "npy": ("a.npy", None, lambda path: np.save(path, GIVEN)),
    "npz": ("a.npz", "y", lambda path: np.savez(path, x=TRUE, y=GIVEN)),
    "npz of one": ("a.npz", None, lambda path: np.savez(path, y=GIVEN.astype(np.uint8))),
    "CIFAR-N": ("a.pt", "worse_label", lambda path: written_pt(path, clean_label=TRUE, worse_label=GIVEN)),
    "tensors": ("a.pt", "worse_label", lambda path: written_pt(path, worse_label=torch.tensor(GIVEN), other=3)),
    "txt": ("a.txt", None, lambda path: path.write_text("\n".join(map(str, GIVEN)))),
    "csv": (
        "a.csv",
        "label",
        lambda path: path.write_text("name,label\n" + "".join(f"i{k},{v}\n" for k, v in enumerate(GIVEN))),
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_given_labels_come_from_every_kind_of_file(beton: Beton, tmp_path: Path, kind: str) -> None:
    name, key, write = FILES[kind]
    write(tmp_path / name)
    seen = view(beton, label_file=str(tmp_path / name), label_key=key, fraction=0.5)
    assert np.array_equal(seen.label, GIVEN)
    assert seen.label.dtype == np.int64
    assert seen.wrong == (GIVEN != TRUE)[seen.ids].sum()
    assert seen.describe()[-1].startswith(f"data.label_file {name}")


def test_a_shard_alone_takes_its_part_of_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "s.beton"
    write_shards(path, random_images(40, 1, 1), 4)
    given = (np.arange(40) + 1) % 4
    np.save(tmp_path / "a.npy", given)
    whole = view(Beton.open(path), label_file=str(tmp_path / "a.npy"))
    parts = [
        view(Beton.open(tmp_path / f"s-{number:05}-of-00004.beton"), label_file=str(tmp_path / "a.npy"))
        for number in range(4)
    ]
    assert np.array_equal(np.concatenate([part.label for part in parts]), whole.label)
    assert np.array_equal(whole.label, given)


class Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code was run",))


OTHER_ORDER = np.roll(TRUE, 1)

BAD: dict[str, tuple[str, str | None, Write, str]] = {
    "missing": ("a.npy", None, lambda path: None, "does not exist"),
    "kind": ("a.bin", None, lambda path: path.write_bytes(b""), "expected a file ending in .npy"),
    "short": ("a.npy", None, lambda path: np.save(path, GIVEN[:-1]), "has 1199 labels; expected one for each"),
    "long": ("a.npy", None, lambda path: np.save(path, np.r_[GIVEN, 0]), "has 1201 labels; expected one for each"),
    "range": ("a.npy", None, lambda path: np.save(path, GIVEN + 1), "is 5 for sample 4; expected a class from 0 to 4"),
    "negative": ("a.npy", None, lambda path: np.save(path, GIVEN - 1), "is -1 for sample 5; expected a class"),
    "float": (
        "a.npy",
        None,
        lambda path: np.save(path, GIVEN / 1),
        "is float64 of shape (1200,); expected one integer",
    ),
    "text": ("a.csv", "n", lambda path: path.write_text("n,m\nx,1\n"), "expected one integer for each sample"),
    "ragged": ("a.csv", None, lambda path: path.write_text("n,m\n1,1\n1\n"), "line 3 does not have 2 values"),
    "one name": ("a.csv", "n", lambda path: path.write_text("n,n\n1,1\n"), "two columns of the header have one name"),
    "wraps": (
        "a.npy",
        None,
        lambda path: np.save(path, np.full(COUNT, 2**64 - 1, np.uint64)),
        "is 18446744073709551615",
    ),
    "empty": ("a.txt", None, lambda path: path.write_text(""), "holds no labels"),
    "damaged": ("a.npz", None, lambda path: path.write_bytes(b"PK\3\4 and so on"), "cannot be read"),
    "no key": ("a.npz", None, lambda path: np.savez(path, x=TRUE, y=GIVEN), "data.label_key is null, but"),
    "odd key": ("a.npz", "z", lambda path: np.savez(path, x=TRUE, y=GIVEN), "data.label_key is 'z', but"),
    "code": ("a.pt", None, lambda path: torch.save({"a": Planted()}, path), "cannot be read"),
    "pickles": ("a.npy", None, lambda path: np.save(path, np.array([Planted()]), allow_pickle=True), "cannot be read"),
    "order": (
        "a.pt",
        "worse_label",
        lambda path: written_pt(path, clean_label=OTHER_ORDER, worse_label=GIVEN),
        "clean_label is 4 for sample 0, whose class in",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_does_not_fit_is_named(
    beton: Beton, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, key, write, message = BAD[kind]
    write(tmp_path / name)
    with pytest.raises(UserError) as caught:
        view(beton, label_file=str(tmp_path / name), label_key=key)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "code was run" not in capsys.readouterr().out
