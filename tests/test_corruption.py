"""Five hundred random corruptions of sets and their cards: each refused at opening or found by verifying.

They run in a process of their own, so that a crash of the interpreter or a hang is a failure of the test and not its
end. ``RLP_CORRUPTIONS=5000`` asks for more, ``RLP_CORRUPTION_SEED=1`` for others.
"""

from collections import Counter
from collections.abc import Callable
import contextlib
import faulthandler
import json
import os
from pathlib import Path
import random
import subprocess
import sys

ROOT = Path(__file__).resolve().parent.parent
CORRUPTIONS = int(os.environ.get("RLP_CORRUPTIONS", "500"))
SEED = os.environ.get("RLP_CORRUPTION_SEED", "0")
SECONDS = 20 + CORRUPTIONS // 10
SETS = ("raw", "jpg", "raw in shards", "jpg in shards")


def flipped(content: bytes, choose: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(choose.choice((1, 1, 1, 2, 8))):
        changed[choose.randrange(len(changed))] ^= choose.choice((1 << choose.randrange(8), choose.randrange(1, 256)))
    return bytes(changed)


def cut(content: bytes, choose: random.Random) -> bytes:
    """The end missing, or some of the middle; sometimes a single byte, sometimes everything."""
    first = choose.choice((0, len(content) - 1, choose.randrange(len(content))))
    last = choose.choice((len(content), choose.randint(first, len(content))))
    return content[:first] + content[last:]


def zeroed(content: bytes, choose: random.Random) -> bytes:
    first = choose.randrange(len(content))
    size = choose.choice((1, 8, 512, len(content)))
    return content[:first] + bytes(len(content[first : first + size])) + content[first + size :]


def appended(content: bytes, choose: random.Random) -> bytes:
    return content + choose.choice((b"\0", b"\n", b" ", choose.randbytes(24), choose.randbytes(4096)))


WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (flipped, cut, zeroed, appended)


def main(folder: Path) -> None:
    """In the process of its own: prints how each corruption was found."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # where a hang was, if there is one
    from small_sets import random_images, write_set, write_shards

    from rlp.data.beton import Beton
    from rlp.data.verify import verify

    found: Counter[str] = Counter()
    for number, name in enumerate(SETS):
        inside = folder / name
        inside.mkdir()
        write = write_set if number < 2 else lambda path, images, **kind: write_shards(path, images, 3, **kind)
        beton = write(inside / "a.beton", random_images(30, 8, 9), jpeg=number % 2 == 1, page_size=4096)
        assert verify(beton).ok
        Beton.open(beton, full_hash=True)
        files = {path: path.read_bytes() for path in sorted(inside.iterdir())}
        choose = random.Random(f"{SEED} {name}")
        for _ in range(CORRUPTIONS // len(SETS)):
            path, way = choose.choice(list(files)), choose.choice(WAYS)
            whole = files[path]
            while (damaged := way(whole, choose)) == whole:
                pass  # zeros that were zeroed
            path.write_bytes(damaged)
            how = outcome(beton)
            found[f"{how}, {path.suffix}, {way.__name__}"] += 1
            if how not in ("refused", "verified"):
                raise SystemExit(f"{how}: {name}, {path.name}, {way.__name__} of {len(whole)} bytes")
            path.write_bytes(whole)
        assert verify(beton).ok
    print(json.dumps(found))


def outcome(beton: Path) -> str:
    """``refused`` at opening, or ``verified``: found by verifying and by opening with ``full_hash``."""
    from rlp.data.beton import Beton
    from rlp.data.verify import verify
    from rlp.errors import UserError

    try:
        opened = Beton.open(beton)
    except UserError:
        return "passed by verify" if verify(beton).ok else "refused"
    for row in range(opened.num_samples):
        with contextlib.suppress(UserError):
            opened.image(row)
    for read in (opened.images, lambda: opened.words):
        with contextlib.suppress(UserError):
            read()
    report = verify(beton)
    if report.ok or not report.text:
        return "passed by verify"
    try:
        Beton.open(beton, full_hash=True)
    except UserError:
        return "verified"
    return "passed by full_hash"


def test_no_corruption_passes_or_crashes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 60, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    assert sum(found.values()) == CORRUPTIONS // len(SETS) * len(SETS)
    # Every way in every kind of file occurred, and some damage is seen by nothing but verifying.
    assert {name.split(", ", 1)[1] for name in found} == {
        f"{s}, {w.__name__}" for s in (".beton", ".json") for w in WAYS
    }
    assert {name.split(",")[0] for name in found} == {"refused", "verified"}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
