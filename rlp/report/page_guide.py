"""How to read a page: what may be concluded and what not (the long form is docs/results/README.md)."""

from rlp.report.page_html import Html, element, facts, join

WORDS = (
    (
        "κ",
        "accuracy on random labels less chance, (n · accuracy − 1)/(n − 1): 0 is guessing, 1 is every label right",
    ),
    ("n, N, D", "random labels, images that heads were fitted to, features that a head sees: κ depends on all three"),
    ("draw", "one labelling of all images at random, with heads of its own"),
    ("tap", "a place in the network where features are taken"),
    ("member, non-member", "an image that the network was trained on, or not"),
    ("Δ", "κ(members) − κ(non-members), each with its own heads at equal N, D, n and budget: the calibrated number"),
    ("untrained", "the same network with fresh weights: what the architecture gives without learning"),
    ("noise", "Gaussian features of equal mean and covariance: what D, N, n and the spectrum give by themselves"),
    ("class-only floor", "what knowing nothing but the class gives; κ up to here needs no knowledge of single images"),
    (
        "leak check",
        "heads on images and labels that they never saw: must be 0, about 1 in 20 intervals misses it by luck",
    ),
    ("[low, high]", "95% interval; of one network it is over draws and images, and other seeds usually move κ more"),
    ("λ", "weight of the penalty that works against the training's own heads (in joint mode, for them)"),
)
MAY = (
    "Δ above 0 with its interval: at this tap and with this reading, members are told apart better than non-members.",
    "κ above the class-only floor: these heads, with this budget, told these images apart from the features.",
    "Two networks or two depths differ: only at equal D, n, N, heads and budget, and by more than seeds differ.",
)
MAY_NOT = (
    "κ alone proves no memorisation: non-members, and features of an untrained network, often reach as much.",
    "An interval of Δ that holds 0 is no proof that nothing was memorised: another reading may find it.",
    "A low κ of the training's heads under a penalty is no proof that the information is gone; fresh heads decide.",
    "κ at different D or N does not compare: with many features for few images even noise can be labelled at will.",
    "The reading at n = 2 bounds the complexity of the heads' class on these features, not that of the network.",
    "One interval among many that misses 0 is what luck does: about 1 in 20.",
)


def guide() -> Html:
    """The section."""
    return join([
        element("h2", "How to read this page", id="guide"),
        element("h3", "What may be concluded"),
        element("ul", *(element("li", line) for line in MAY)),
        element("h3", "What may not"),
        element("ul", *(element("li", line) for line in MAY_NOT)),
        element("h3", "Words"),
        facts(WORDS, "words"),
    ])  # fmt: skip
