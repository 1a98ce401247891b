"""Promises of data/sources.py: other people's folders, tars and tables, read whole, and what is not read is said."""

import io
import json
import os
import tarfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import sources
from data.shards import UserError
from data.sources import Fields, Reject

IMAGES = [b"image %d" % i for i in range(9)]  # sources.py never looks into them


def write(files: dict) -> None:
    for name, data in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def tar(name, members, mode: str = "w") -> bytes:
    """A tar of (name, bytes) pairs."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(name, mode) as archive:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return Path(name).read_bytes()


def jsonl(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def read(source, **named) -> dict:
    """{name: (image, long caption, short caption) or the reason} of all samples; names that come again get a '."""
    fields, samples = Fields(**named), {}
    files, _ = sources.list_files(str(source), Path("downloads"))
    for part in sources.cut(files, fields):
        for name, data, texts in part.read(fields):
            while name in samples:
                name += "'"
            samples[name] = str(data) if isinstance(data, Reject) else (data, texts["long"], texts["short"])
    return samples


def captions(samples: dict) -> dict:
    """{caption: image} of the good ones."""
    return {sample[1]: sample[0] for sample in samples.values() if isinstance(sample, tuple) and sample[1]}


def reasons(samples: dict) -> dict:
    return {name: sample for name, sample in samples.items() if isinstance(sample, str)}


# ---- tars ------------------------------------------------------------------------------------------------------------

PAIRS = [(f"{i}.jpg", IMAGES[i]) for i in range(4)] + [(f"{i}.txt", b"caption %d" % i) for i in range(4)]
FOUR = {f"caption {i}": IMAGES[i] for i in range(4)}
SORTED = sorted(PAIRS)
ORDERS = {
    "side by side": SORTED,
    "images first": PAIRS,
    "captions first": PAIRS[4:] + PAIRS[:4],
    "backwards": PAIRS[::-1],
    "interleaved": [PAIRS[i] for i in (0, 1, 4, 2, 5, 3, 6, 7)],
    "masks between": [x for i in range(4) for x in (PAIRS[i], (f"{i}.mask.png", b"mask"), PAIRS[4 + i])],
    "other files between": [("README.txt.bak", b"x"), *SORTED[:3], ("dataset.cls", b"7"), *SORTED[3:]]}


@pytest.mark.parametrize("order", ORDERS)
def test_members_of_a_sample_may_stand_anywhere_in_a_tar(in_tmp, order):
    tar("a.tar", ORDERS[order])
    assert captions(read("a.tar")) == FOUR
    assert set(reasons(read("a.tar")).values()) <= {"no image under this key"}


@pytest.mark.parametrize("keys", [
    ["cat.0", "cat.1", "cat.2", "cat.3"], ["2024.01.05", "2024.01.06", "2024.02.05", "2025.01.05"],
    ["v1.0/a", "v1.0/b", "v1.1/a", "./v1.1/b"], ["a b.c", "a b", "a b.c.d", "A B"], ["x", "x.1", "x.2", "y.1"]])
def test_keys_may_have_dots(in_tmp, keys):
    tar("a.tar", [(f"{key}.{extension}", data) for i, key in enumerate(keys)
                  for extension, data in (("jpg", IMAGES[i]), ("txt", b"caption %d" % i))])
    assert captions(read("a.tar")) == FOUR and not reasons(read("a.tar"))


def test_dotted_extensions_are_read_by_their_names_and_named_where_they_are_not(in_tmp):
    tar("a.tar", [x for i in range(4) for x in ((f"s{i}.input.jpg", IMAGES[i]), (f"s{i}.out.txt", b"caption %d" % i))])
    assert captions(read("a.tar", image="input.jpg", long="out.txt")) == FOUR
    fields = Fields()
    list(sources.cut(sources.list_files("a.tar", Path("."))[0], fields)[0].read(fields))
    assert {"input.jpg", "out.txt"} <= fields.seen.keys()


def test_every_sample_of_a_repeated_key_is_read_or_counted(in_tmp):
    tar("a.tar", [("1.jpg", IMAGES[0]), ("1.txt", b"first"), ("1.jpg", IMAGES[1]), ("1.txt", b"second"),
                  ("1.txt", b"third"), ("2.jpg", IMAGES[2]), ("2.png", IMAGES[3]), ("2.txt", b"both")])
    samples = read("a.tar")
    assert captions(samples) == {"first": IMAGES[0], "second": IMAGES[1], "both": IMAGES[2]}
    assert sorted(reasons(samples).values()) == ["another image under this key", "no image under this key"]


TRIPLES = [[(f"{k}{i}.jpg", b"%d %d" % (k, i)), (f"{k}{i}.txt", b"caption %d %d" % (k, i))]
           for k in range(3) for i in range(3)]
NINE = {f"caption {k} {i}": b"%d %d" % (k, i) for k in range(3) for i in range(3)}


@pytest.mark.parametrize("between", [b"", bytes(512), bytes(20_480), "no end", "same keys"])
def test_tars_that_were_joined_are_all_read(in_tmp, between):
    archives = [tar(f"{k}.tar", sum(TRIPLES[3 * k:3 * k + 3], [])) for k in range(3)]
    if between == "no end":
        archives = [archive[:archive.rindex(b"caption") + 512] for archive in archives]  # cut where their zeros begin
        archives = [archive[:len(archive) // 512 * 512] for archive in archives]
    if between == "same keys":
        archives = [tar(f"{k}.tar", [(name[1:], data) for pair in TRIPLES[3 * k:3 * k + 3] for name, data in pair])
                    for k in range(3)]
    Path("all.tar").write_bytes((between if isinstance(between, bytes) else b"").join(archives))
    assert captions(read("all.tar")) == NINE and not reasons(read("all.tar"))


def test_what_follows_damage_in_a_tar_is_read_too(in_tmp):
    archives = [tar(f"{k}.tar", sum(TRIPLES[3 * k:3 * k + 3], [])) for k in range(3)]
    damaged = bytearray(archives[1])
    damaged[2048:2560] = b"?" * 512  # the header of the second sample's image
    Path("all.tar").write_bytes(archives[0] + damaged + archives[2])
    samples = read("all.tar")
    assert captions(samples) == {caption: image for caption, image in NINE.items() if caption != "caption 1 1"}
    assert sorted(reasons(samples).values()) == ["broken tar (what the damage hit is lost)", "no image under this key"]
    for after in (b"something else" * 100, bytes(100) + archives[1], archives[1][:700]):  # no header; shifted; cut
        Path("end.tar").write_bytes(archives[0] + after)
        assert len(captions(read("end.tar"))) == 3
        assert "broken tar (what the damage hit is lost)" in reasons(read("end.tar")).values()


GOOD_TEXT = {"list": b"[[0, 0, 1, 1]]", "string": b'"x"', "null": b"null", "nothing": b"", "half": b"{",
             "no text": b"\xff\xfe{", "deep": b"[" * 100_000, "no caption": b'{"width": 3}',
             "a number": b'{"caption": 3}'}


@pytest.mark.parametrize("kind", GOOD_TEXT)
def test_a_json_that_is_no_caption_file_spoils_no_text(in_tmp, kind):
    tar("a.tar", [("1.jpg", IMAGES[1]), ("1.json", GOOD_TEXT[kind]), ("1.txt", b"good")])
    assert captions(read("a.tar")) == {"good": IMAGES[1]}


@pytest.mark.parametrize("text", [b"caf\xe9", b"", b" \n", b"\xff\xfea\0"])
def test_a_text_that_cannot_be_read_spoils_no_json(in_tmp, text):
    tar("a.tar", [("1.jpg", IMAGES[1]), ("1.txt", text), ("1.json", b'{"caption": "good", "text_short": "g"}')])
    assert read("a.tar") == {"a.tar:1": (IMAGES[1], "good", "g")}


def test_a_caption_that_cannot_be_read_is_the_reason_where_there_is_no_other(in_tmp):
    tar("a.tar", [("1.jpg", IMAGES[1]), ("1.txt", b"caf\xe9"), ("2.jpg", IMAGES[2]), ("2.json", b"[]"), ("3.txt", b"x"),
                  ("4.tif", IMAGES[4]), ("4.txt", b"a TIFF")])
    assert read("a.tar") == {"a.tar:1": "caption not in UTF-8", "a.tar:2": "bad metadata",
                             "a.tar:3": "no image under this key", "a.tar:4": (IMAGES[4], "a TIFF", "")}


@pytest.mark.parametrize("mode, name", [("w:gz", "a.tar"), ("w:bz2", "a.tar"), ("w:xz", "A.TAR")])
def test_a_compressed_tar_is_called_so(in_tmp, mode, name):
    tar(name, PAIRS, mode)
    assert read(name) == {name: "compressed tar (decompress it first)"}
    os.rename(name, "a.tar.gz")
    with pytest.raises(UserError, match=r"endings: gz\).*WebDataset tars \(not compressed\)"):
        read("a.tar.gz")


def test_what_systems_leave_in_a_tar_is_no_sample(in_tmp):
    litter = ["._1.jpg", "__MACOSX/1.jpg", "@eaDir/1.jpg", ".hidden/1.jpg", "a/Thumbs.db", "a/.DS_Store"]
    tar("a.tar", [*PAIRS, *((name, b"x") for name in litter)])
    assert captions(read("a.tar")) == FOUR and not reasons(read("a.tar"))


def test_names_in_other_unicode_forms_and_with_the_other_slash_are_one_key(in_tmp):
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    tar("a.tar", [(f"a/{nfc}.jpg", IMAGES[0]), (f"a/{nfd}.txt", b"caption 0"),
                  ("b\\1.jpg", IMAGES[1]), ("b/1.txt", b"caption 1"),
                  ("./c/1.jpg", IMAGES[2]), ("c/1.txt", b"caption 2"),
                  ("d/1.JPG", IMAGES[3]), ("d/1.TXT", b"caption 3")])
    assert captions(read("a.tar")) == FOUR


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_each_folder_with_its_own_metadata_is_read(in_tmp):
    for split in ("train", "test", "val/day", "val/night"):
        write({f"a/{split}/1.png": split, f"a/{split}/metadata.jsonl": jsonl({"file_name": "1.png", "text": split})})
    assert captions(read("a")) == {split: split.encode() for split in ("train", "test", "val/day", "val/night")}
    assert list(read("a"))[:2] == ["test/1.png", "train/1.png"]


TABLES = {
    "jsonl": jsonl({"file_name": "1.png", "text": "one, two"},
                   {"file_name": "b/2.png", "text": "three\nfour", "text_short": "t"}),
    "csv": 'file_name,text,text_short\n1.png,"one, two",\nb/2.png,"three\nfour",t\n',
    "csv of a spreadsheet": '\ufefffile_name;text;text_short\r\n1.png;one, two;\r\nb/2.png;"three\nfour";t\r\n',
    "csv with a doubled column": "file_name,text,text,text_short\n1.png,\"one, two\",,\nb/2.png,,\"three\nfour\",t\n",
    "csv with tabs": "text_short\tfile_name\ttext\n\t1.png\tone, two\nt\tb/2.png\t\"three\nfour\"\n\n"}


@pytest.mark.parametrize("kind", [*TABLES, "parquet", "parquet of other types"])
def test_metadata_may_be_jsonl_csv_or_parquet(in_tmp, kind):
    write({"a/1.png": IMAGES[1], "a/b/2.png": IMAGES[2]})
    if kind == "parquet":
        rows = {"file_name": ["1.png", "b/2.png"], "text": ["one, two", "three\nfour"], "text_short": [None, "t"]}
        pq.write_table(pa.table(rows), "a/metadata.parquet")
    elif kind == "parquet of other types":
        columns = [pa.array(["1.png", "b/2.png"], pa.string_view()), pa.array([b"one, two", None]),
                   pa.array([None, "three\nfour"]).dictionary_encode(), pa.array([b"", b"t"], pa.binary_view())]
        table = pa.Table.from_arrays(columns, names=["file_name", "text", "text", "text_short"])
        pq.write_table(table, "a/metadata.parquet")
    else:
        write({f"a/metadata.{kind.split()[0]}": TABLES[kind]})
    assert read("a") == {"1.png": (IMAGES[1], "one, two", ""), "b/2.png": (IMAGES[2], "three\nfour", "t")}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_row_that_cannot_be_read_is_counted_and_the_others_are_kept(in_tmp, kind):
    write({f"a/{i}.png": IMAGES[i] for i in range(3)})
    if kind == "csv":
        rows = b"0.png,good\n1.png,caf\xe9\n,no name\n2.png," + b"x" * 200_000 + b"\n2.png,fine\n"
        write({"a/metadata.csv": b"file_name,text\n" + rows})
        expected = ["caption not in UTF-8", "missing file", "bad metadata"]
    elif kind == "jsonl":
        write({"a/metadata.jsonl": jsonl({"file_name": "0.png", "text": "good"}, "{", {"image": "1.png"}, "",
                                         {"file_name": "2.png", "text": "fine"})})
        expected = ["bad metadata", "no file name in this row"]
    else:
        rows = {"file_name": ["0.png", None, "2.png"], "text": ["good", "x", "fine"]}
        pq.write_table(pa.table(rows), "a/metadata.parquet")
        expected = ["no file name in this row"]
    samples = read("a")
    assert captions(samples) == {"good": IMAGES[0], "fine": IMAGES[2]}
    assert sorted(reasons(samples).values()) == sorted(expected)


def test_metadata_that_is_no_table_is_counted(in_tmp):
    write({"a/1.png": b"x", "a/metadata.parquet": b"PAR1 no more"})
    assert read("a") == {"metadata.parquet:1": "broken Parquet file (what follows the damage is lost)"}


def test_captions_may_stand_beside_the_images(in_tmp):
    write({"a/1.png": IMAGES[1], "a/1.txt": "one", "a/4.png": IMAGES[4], "a/5.txt": "no image", "a/notes.md": "#",
           "a/sub/2.JPG": IMAGES[2], "a/sub/2.json": '{"caption": "two", "text_short": "t"}',
           "a/sub.x/3.v2.webp": IMAGES[3], "a/sub.x/3.v2.txt": "\ufeffthree"})
    assert read("a") == {"1.png": (IMAGES[1], "one", ""), "4.png": (IMAGES[4], "", ""),
                         "5.txt": "no image under this key", "sub/2.JPG": (IMAGES[2], "two", "t"),
                         "sub.x/3.v2.txt": (IMAGES[3], "three", "")}
    assert sources.list_files("a", Path("."))[1] == ["notes.md"]


def test_what_img2dataset_leaves_is_read_without_its_tables(in_tmp):
    for shard in ("00000", "00001"):
        tar(f"a/{shard}.tar", [(f"{shard}0.jpg", IMAGES[0]), (f"{shard}0.txt", shard.encode()),
                               (f"{shard}0.json", b'{"width": 3}')])
        pq.write_table(pa.table({"url": ["x"], "caption": [shard]}), f"a/{shard}.parquet")
        write({f"a/{shard}_stats.json": "{}", f"b/{shard}/0.jpg": shard, f"b/{shard}/0.txt": shard,
               f"b/{shard}.parquet": b"x"})
    assert captions(read("a")) == {"00000": IMAGES[0], "00001": IMAGES[0]} and not reasons(read("a"))
    assert captions(read("a/*")) == captions(read("a"))
    assert captions(read("b")) == {"00000": b"00000", "00001": b"00001"} and not reasons(read("b"))
    assert sources.list_files("a", Path("."))[1] == ["00000.parquet", "00000_stats.json", "00001.parquet",
                                                     "00001_stats.json"]


def test_what_hf_download_leaves_is_read(in_tmp):
    """A folder of its own, and a cache, where the files are links into blobs/."""
    table = pa.table({"image": [{"bytes": IMAGES[0], "path": "0.png"}], "text": ["caption 0"]})
    pq.write_table(table, "table.parquet")
    data = Path("table.parquet").read_bytes()
    write({"dl/README.md": "#", "dl/.gitattributes": "x", "dl/data/train-00000-of-00001.parquet": data,
           "dl/.cache/huggingface/download/data/train-00000-of-00001.parquet.metadata": "x"})
    write({"cache/blobs/a1": data, "cache/blobs/a2": IMAGES[1], "cache/refs/main": "c0",
           "cache/blobs/a3": jsonl({"file_name": "1.png", "text": "caption 1"})})
    Path("cache/snapshots/c0/data").mkdir(parents=True)
    Path("cache/snapshots/c0/more").mkdir()
    for link, blob in (("data/x.parquet", "a1"), ("more/1.png", "a2"), ("more/metadata.jsonl", "a3")):
        os.symlink(f"../../../blobs/{blob}", f"cache/snapshots/c0/{link}")
    assert captions(read("dl")) == {"caption 0": IMAGES[0]}
    for source in ("cache", "cache/snapshots/c0"):
        assert captions(read(source)) == {"caption 0": IMAGES[0], "caption 1": IMAGES[1]}


def test_links_to_another_disk_are_followed_and_circles_are_not(in_tmp):
    write({"disk/1.png": IMAGES[1], "disk/deep/2.png": IMAGES[2], "disk/deep/2.txt": "two", "secret.png": b"s"})
    write({"a/metadata.jsonl": jsonl(*({"file_name": name, "text": name} for name in (
        "1.png", "deep/2.png", "deep/../1.png", "../secret.png", "deep/../../secret.png", str(in_tmp / "secret.png"),
        str(in_tmp / "a/1.png"), "gone.png", "loop.png")))})
    for link, target in (("1.png", in_tmp / "disk/1.png"), ("deep", in_tmp / "disk/deep"), ("gone.png", "nowhere"),
                         ("loop.png", "loop.png"), ("up", ".."), ("self", ".")):
        os.symlink(target, f"a/{link}")
    samples = read("a")
    assert {sample[1] for sample in samples.values() if isinstance(sample, tuple)} == {
        "1.png", "deep/2.png", "deep/../1.png", str(in_tmp / "a/1.png")}
    assert sorted(reasons(samples).values()) == ["missing file"] * 2 + ["outside the folder"] * 3
    os.symlink(in_tmp / "disk", "b")
    assert captions(read("b")) == {"two": IMAGES[2]}  # a folder that is a link


def test_an_image_that_is_a_link_to_nowhere_is_counted(in_tmp):
    write({"a/1.txt": "one", "a/2.png": IMAGES[2], "a/2.txt": "two"})
    os.symlink("/nowhere/1.png", "a/1.png")
    assert read("a")["1.png"] == "missing file" and captions(read("a")) == {"two": IMAGES[2]}


def test_file_names_may_have_the_other_slash_and_the_other_unicode_form(in_tmp):
    nfc, nfd = (unicodedata.normalize(form, "a/übergröße.png") for form in ("NFC", "NFD"))
    write({f"x/{nfc}": IMAGES[0], f"y/{nfd}": IMAGES[1], "x/b/1.png": IMAGES[2], "x/b\\2.png": IMAGES[3]})
    for folder, names in (("x", [nfd, nfc, "b\\1.png", "b\\2.png", ".\\b\\1.png"]),
                          ("y", [nfc, nfd, nfc.replace("/", "\\")])):
        write({f"{folder}/metadata.jsonl": jsonl(*({"file_name": name, "text": "x"} for name in names))})
        assert len(read(folder)) == len(names) and not reasons(read(folder))
    write({"z/metadata.jsonl": jsonl({"file_name": "..\\x\\b\\1.png", "text": "x"}), "z/1.png": b""})
    assert read("z") == {"..\\x\\b\\1.png": "outside the folder"}


def test_hidden_files_and_litter_are_not_read(in_tmp):
    litter = [".hidden.png", "._1.png", ".cache/1.png", "__MACOSX/1.png", "@eaDir/1.png", ".ipynb_checkpoints/1.png"]
    write({**{f"a/{name}": b"x" for name in litter}, "a/Thumbs.db": b"x", "a/1.png": IMAGES[1], "a/1.txt": "one"})
    assert read("a") == {"1.png": (IMAGES[1], "one", "")} and sources.list_files("a", Path("."))[1] == []


def test_the_same_folder_however_it_is_written(in_tmp):
    write({"my data: a,b/1.png": IMAGES[1], "my data: a,b/1.txt": "one"})
    expected = read("my data: a,b")
    for name in ("my data: a,b/", "./my data: a,b", str(in_tmp / "my data: a,b"), "my data: a,b/../my data: a,b"):
        assert read(name) == expected
        files, parts = (sources.cut(sources.list_files(x, Path("."))[0], Fields()) for x in (name, "my data: a,b"))
        assert [part.about() for part in files] == [part.about() for part in parts]


def test_nothing_to_read_says_what_there_is(in_tmp):
    write({"a/1.zip": b"x", "a/notes.pdf": b"x"})
    for source in ("a", "a/1.zip", "a/*"):
        with pytest.raises(UserError, match=r"has nothing to read among its \d file\(s\) \(endings: .*zip\)"):
            read(source)


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "images"])
def test_parts_of_a_list_are_the_whole(in_tmp, monkeypatch, kind):
    """Each part is read by itself, also by another process after a kill."""
    write({f"a/{i:02d}.png": b"image %d" % i for i in range(10)})
    text = lambda i: f"line one,\nline two of {i}"
    if kind == "images":
        write({f"a/{i:02d}.txt": text(i) for i in range(10)})
    elif kind == "parquet":
        pq.write_table(pa.table({"file_name": [f"{i:02d}.png" for i in range(10)], "text": list(map(text, range(10)))}),
                       "a/metadata.parquet")
    elif kind == "csv":
        write({"a/metadata.csv": "\ufefffile_name,text\n" + "".join(f'{i:02d}.png,"{text(i)}"\n' for i in range(10))})
    else:
        write({"a/metadata.jsonl": jsonl(*({"file_name": f"{i:02d}.png", "text": text(i)} for i in range(10)))})
    monkeypatch.setattr(sources, "PART_LINES", 3)
    parts = sources.cut(sources.list_files("a", Path("."))[0], Fields())
    assert [(part.line, part.lines) for part in parts] == [(1, 3), (4, 3), (7, 3), (10, 1)]
    got = [[(data, texts["long"]) for _, data, texts in part.read(Fields())] for part in parts[::-1]][::-1]
    assert sum(got, []) == [(b"image %d" % i, text(i)) for i in range(10)]
    before = [part.about() for part in parts]
    changed = Path("a/05.txt" if kind == "images" else f"a/metadata.{kind}")
    if kind == "parquet":
        pq.write_table(pq.read_table(changed).slice(0, 9), changed)
    else:
        changed.write_text(changed.read_text().replace("two of 5", "three of 5"))
    after = [part.about() for part in sources.cut(sources.list_files("a", Path("."))[0], Fields())]
    assert [a == b for a, b in zip(before, after)] != [True] * 4  # another file is another part


# ---- Parquet ---------------------------------------------------------------------------------------------------------

THREE = {caption: image for caption, image in zip("abc", IMAGES)}
TABLES_OF_IMAGES = {
    "an empty usual column": dict(text=pa.array([None] * 3, pa.string()), caption=list("abc")),
    "a column of nulls": dict(text=pa.nulls(3), caption=list("abc")),
    "a column of blanks": dict(text=["", " ", "\n"], prompt=list("abc")),
    "a column of lists": dict(text=[["x"], [], None], caption=list("abc")),
    "a gap in each column": dict(text=["a", None, ""], caption=["", "b", None], description=["x", "y", "c"]),
    "views": dict(text=pa.array(list("abc"), pa.string_view()), image=pa.array(IMAGES[:3], pa.binary_view())),
    "large types": dict(text=pa.array(list("abc"), pa.large_string()), image=pa.array(IMAGES[:3], pa.large_binary())),
    "dictionaries": dict(text=pa.array(list("abc")).dictionary_encode(),
                         image=pa.array(IMAGES[:3]).dictionary_encode()),
    "binary captions": dict(text=[b"a", b"b", b"c"]),
    "a large binary view of captions": dict(text=pa.array([b"a", b"b", b"c"], pa.binary_view())),
    "structs of views": dict(text=list("abc"), image=pa.StructArray.from_arrays(
        [pa.array(IMAGES[:3], pa.binary_view()), pa.array(["x"] * 3)], ["bytes", "path"])),
    "a gap in the images": dict(text=list("abc"), image=pa.array([IMAGES[0], None, None]), jpg=[None, *IMAGES[1:3]]),
    "a bytes column of another name": dict(text=list("abc"), image=None, picture=IMAGES[:3])}


@pytest.mark.parametrize("kind", TABLES_OF_IMAGES)
def test_the_first_column_with_content_is_taken_whatever_its_type(in_tmp, kind):
    columns = {"image": IMAGES[:3]} | TABLES_OF_IMAGES[kind]
    pq.write_table(pa.table({name: column for name, column in columns.items() if column is not None}), "a.parquet")
    assert captions(read("a.parquet")) == THREE


def test_columns_of_the_same_name_are_read_one_after_the_other(in_tmp):
    columns = [pa.array(IMAGES[:3]), pa.array(["", None, "c"]), pa.array(["a", "b", "x"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["image", "text", "text"]), "a.parquet")
    assert captions(read("a.parquet")) == THREE


def test_a_parquet_file_without_the_columns_loses_no_other(in_tmp):
    Path("a").mkdir()
    pq.write_table(pa.table({"image": IMAGES[:3], "text": list("abc")}), "a/1.parquet")
    pq.write_table(pa.table({"url": ["x"], "text": ["y"]}), "a/0.parquet")
    pq.write_table(pa.table({"image": IMAGES[:1], "words": ["y"]}), "a/2.parquet")
    samples = read("a")
    assert captions(samples) == THREE
    assert reasons(samples) == dict.fromkeys(["0.parquet", "2.parquet"], "no fitting column in this file")
