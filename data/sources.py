"""Where data/prepare.py gets its samples: folders of images, WebDataset tars and Parquet files, on disk or in a dataset
repository on the Hugging Face hub.

`list_files` finds the files of a source, `cut` makes parts of them: the unit that is prepared, resumed and given to a
rank. Reading a part yields (name, image bytes, {"long": str, "short": str}), an absent caption being "", or for what
cannot be read (name, Reject, None). Everything is streamed: nothing is unpacked, no file is held as a whole. Names come
from strangers: in a tar they are labels, never paths, in metadata they may not leave the folder. Links on disk are
followed, since whoever made the folder made them.
"""

import collections
import concurrent.futures
import contextlib
import csv
import fnmatch
import functools
import glob
import itertools
import json
import os
import re
import shutil
import tarfile
import unicodedata
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from data.shards import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "jpe", "jfif",
                    "tif", "tiff", "avif", "heic", "heif", "jxl", "jp2")  # images too, but not read: counted as such
USUAL = {"image": ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes"),  # names of fields
         "long": ("text_long", "long_text", "long_caption", "caption_long", "text", "caption", "txt", "prompt",
                  "description"),
         "short": ("text_short", "short_text", "short_caption", "caption_short")}
METADATA = {"metadata.jsonl": "jsonl", "metadata.csv": "csv", "metadata.parquet": "rows"}  # of a folder, the first
LITTER = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "lost+found", "$RECYCLE.BIN", "System Volume Information")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")  # how gz, bz2, xz, zst, zip begin
MAX_BYTES = 100 * 10**6      # of an encoded image, a caption file or a line of metadata.jsonl
PART_BYTES = 2 * 10**9       # of tars or Parquet files in a part; also what is downloaded at a time
PART_LINES = 20_000          # rows of metadata, or pictures of a folder, in a part
PARQUET_ROWS = 32            # read at a time
DOWNLOADS = 8                # files of an image folder that are fetched at the same time

KINDS = ("a folder of images with metadata.jsonl, .csv or .parquet or with .txt files beside them, WebDataset tars "
         "(not compressed), Parquet files, a folder of them, a glob or hf://owner/name")

BROKEN_TAR = "broken tar (what the damage hit is lost)"
BROKEN_PARQUET = "broken Parquet file (what follows the damage is lost)"


class Reject(Exception):
    """This sample cannot be used; the message is the reason it is counted under."""


@dataclass
class Fields:
    """Which columns, JSON keys or file extensions hold what: a name that the user gave, or else the first usual one
    that has content. seen: the first names met, for messages."""

    image: str | None = None
    long: str | None = None
    short: str | None = None
    seen: dict = field(default_factory=dict)

    def captions(self, info: dict) -> dict:
        """{"long": str, "short": str} of a metadata object."""
        self.see(info)
        return {what: first_text(info.get(name) for name in self.names(what)) for what in ("long", "short")}

    def see(self, names) -> None:
        self.seen |= dict.fromkeys(list(names)[:20 - len(self.seen)])

    def names(self, what: str) -> tuple:
        return (getattr(self, what),) if getattr(self, what) else USUAL[what]


def first_text(values) -> str:
    return next((v for v in values if isinstance(v, str) and v.strip()), "")


def attempt(name: str, read, *args) -> tuple:
    """(name, *read(*args)), which are the image bytes and the captions, or (name, Reject, None)."""
    try:
        return name, *read(*args)
    except Reject as reason:
        return name, reason, None


# ---- the Hugging Face hub --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repository:
    """A dataset repository at one commit. `folder` takes what is downloaded of it; whole files survive a kill."""

    id: str
    revision: str
    folder: Path
    files: dict = field(hash=False, compare=False)  # name in the repository -> bytes

    def download(self, name: str, folder: Path) -> Path:
        import huggingface_hub
        huggingface_hub.utils.disable_progress_bars()
        try:
            return Path(huggingface_hub.hf_hub_download(self.id, name, repo_type="dataset", revision=self.revision,
                                                        local_dir=folder))
        except Exception as error:  # the hub's own, the HTTP client's and the disk's share no class but this
            raise OSError(f"hf://{self.id}: {name} cannot be downloaded ({first_line(error)}); start the same command "
                          "again, it goes on where it stopped") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def open_repository(source: str, downloads: Path) -> tuple[Repository, dict[str, int]]:
    """hf://owner/name[@revision][/folder-or-glob] -> the repository, and {name: bytes} of what was asked for."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", source)
    if not match:
        raise UserError(f"{source} is no dataset repository: write hf://owner/name[@revision][/folder-or-glob]")
    name, revision, within = match[1], match[2], (match[3] or "").strip("/")
    import huggingface_hub
    try:
        api = huggingface_hub.HfApi()
        commit = api.dataset_info(name, revision=revision).sha
        tree = api.list_repo_tree(name, recursive=True, revision=commit, repo_type="dataset")
        found = {f.path: f.size for f in tree if isinstance(f, huggingface_hub.RepoFile)}
    except Exception as error:  # as above
        raise UserError(f"hf://{name} cannot be read ({first_line(error)}); check its name and revision, and if it is "
                        "gated, accept its terms on its page and log in with `hf auth login`") from None
    found = {p: size for p, size in found.items() if ".." not in p.split("/") and p[0] != "/" and not is_litter(p)}
    chosen = {p: size for p, size in found.items()
              if not within or p.startswith(within + "/") or fnmatch.fnmatchcase(p, within)}
    return Repository(name, commit, downloads, found), chosen


# ---- files and parts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A tar, a Parquet file, or the list of a folder's images: a metadata file (jsonl, csv, rows of Parquet) or, where
    there is none, the folder itself (images), with captions in .txt or .json files beside them.

    `name`: in the source; no path of this machine. images: how many there are in the folder of a metadata file.
    members: the names of the images and captions in a folder of kind images."""

    kind: str
    name: str
    bytes: int
    path: Path
    repository: Repository | None = None
    images: int = 0
    members: tuple = field(default=(), compare=False, repr=False)

    def fetch(self, folder: Path | None = None) -> Path:
        """Where it is on disk, once it has been downloaded if it is on the hub."""
        return self.repository.download(self.name, folder or self.repository.folder) if self.repository else self.path


@dataclass
class Part:
    """Consecutive files of one kind, or consecutive `lines` of a folder's list: those from the position `start`, the
    line number `line`, with the checksum `crc`. `bytes` of it are to be read, `done` have been, for the progress."""

    number: int
    files: list[File]
    bytes: int
    start: int = 0
    line: int = 1
    lines: int = 0
    crc: int = 0
    done: int = 0

    @property
    def kind(self) -> str:
        return self.files[0].kind

    @property
    def folder(self) -> Path | None:
        """For what is downloaded. Each part has its own: another rank's clean-up cannot take its files away."""
        repository = self.files[0].repository
        return repository.folder / f"part-{self.number:05d}" if repository else None

    def about(self) -> list:
        """What makes it this part, as JSON."""
        return [self.kind, self.start, self.bytes, self.crc, *([f.name, f.bytes] for f in self.files)]

    def read(self, fields: Fields, needs_captions: bool = True):
        if self.folder:
            for stale in self.folder.rglob("*.incomplete"):  # of a killed download; the hub's library starts another
                stale.unlink()
        before = 0
        for file in self.files:
            if self.kind == "tar":
                yield from read_tar(self, file, before, fields)
            elif self.kind == "parquet":
                yield from read_parquet(self, file, before, fields, needs_captions)
            else:
                yield from read_lines(self, file, fields)
            before += file.bytes

    def discard(self) -> None:
        """Deletes what was downloaded for this part."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def split_path(name: str) -> tuple[str, str, str]:
    """a/b.c.JPG -> (folder "a", file "b.c.JPG", extension "jpg"); the folder of a file without one is "."."""
    folder, _, file = name.rpartition("/")
    return folder or ".", file, file.rpartition(".")[2].lower()


def is_litter(name: str) -> bool:
    """Hidden files, and what systems leave in folders."""
    return any(part in LITTER or part.startswith(".") and part.strip(".") for part in name.split("/"))


def walk(folder: Path) -> dict[str, int]:
    """{name: bytes} of the files in a folder and its subfolders, links included, each folder once."""
    def stop(error):
        raise error

    found, seen = {}, set(Path(folder).resolve().parents)
    for path, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real, within = Path(path).resolve(), Path(path).relative_to(folder).as_posix()
        if real in seen:  # a link in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_litter(name))
        for name in files:
            file = os.path.join(path, name)
            if not is_litter(name) and (os.path.isfile(file) or os.path.islink(file)):  # one to nowhere will be missing
                size = os.path.getsize(file) if os.path.isfile(file) else 0
                found[name if within == "." else f"{within}/{name}"] = size
    return found


def list_files(source: str, downloads: Path) -> tuple[list[File], list[str]]:
    """The files of a path, a glob or an hf:// repository in the order in which they are read, and the names of those
    that are not. UserError if there is none to read."""
    repository, folders = None, {}
    if source.startswith("hf://"):
        repository, folders[downloads] = open_repository(source, downloads)
    else:
        for path in [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True)):
            if (path := Path(path)).is_dir():
                folders[path] = walk(path)
            else:
                folders.setdefault(path.parent, {})[path.name] = path.stat().st_size
        if not folders:
            raise UserError(f"{source} does not exist; SOURCE is {KINDS}")
    files, others = [], []
    for folder, found in folders.items():
        chosen, left = choose(found, folder, repository)
        files, others = files + chosen, others + left
    if not files:
        endings = ", ".join(sorted({split_path(name)[2] for name in others})[:10]) or "none"
        raise UserError(f"{source} has nothing to read among its {len(others)} file(s) (endings: {endings}); SOURCE "
                        f"is {KINDS}")
    return files, others


def choose(found: dict[str, int], root: Path, repository: Repository | None) -> tuple[list[File], list[str]]:
    """Of the files {name: bytes} in a folder those to read and the names of the others: all tars, Parquet and metadata
    files, or where there are none the images themselves."""
    names = {name: split_path(name) for name in sorted(found)}
    tables = {folder: name for kind in reversed(METADATA) for name, (folder, file, _) in names.items() if file == kind}
    images = collections.Counter(folder for folder, _, kind in names.values() if kind in IMAGE_EXTENSIONS)
    nearest = {folder: next((str(p) for p in PurePosixPath(folder, "x").parents if str(p) in tables), None)
               for folder in images}  # the folder whose metadata lists the images of a folder
    # img2dataset leaves 00000.parquet, without images, beside 00000.tar or the folder 00000
    twins = {name[:-4] for name in names if names[name][2] == "tar"} | images.keys()
    files, others = [], []
    for name, (folder, file, kind) in names.items():
        if tables.get(folder) == name:
            count = sum(images[below] for below in images if nearest[below] == folder)
            files.append(File(METADATA[file], name, found[name], root / name, repository, count))
        elif kind == "tar" or kind == "parquet" and file not in METADATA and name[:-8] not in twins:
            files.append(File(kind, name, found[name], root / name, repository))
        elif kind not in IMAGE_EXTENSIONS or not nearest[folder]:
            others.append(name)
    if images and not files:
        members = {n: found[n] for n in names if names[n][2] in (*IMAGE_EXTENSIONS, "txt", "json")}
        name = repository.id if repository else root.resolve().name
        files = [File("images", name, sum(members.values()), root, repository, images.total(), tuple(members))]
        others = [name for name in others if name not in members]
    return files, others


def cut(files: list[File], fields: Fields) -> list[Part]:
    """Parts of up to PART_BYTES of tars or Parquet files, or of PART_LINES lines."""
    parts = []
    for file in files:
        last = parts[-1] if parts else None
        if file.kind not in ("tar", "parquet"):
            start = 0
            for number, (end, line) in enumerate(lines_of(file, fields)):
                if number % PART_LINES == 0:
                    parts.append(Part(len(parts), [file], 0, start, 1 + number))
                parts[-1].lines += 1
                parts[-1].bytes = end - parts[-1].start
                parts[-1].crc = zlib.crc32(repr(line).encode(), parts[-1].crc)
                start = end
        elif last and last.kind == file.kind and last.bytes + file.bytes <= PART_BYTES:
            last.files.append(file)
            last.bytes += file.bytes
        else:
            parts.append(Part(len(parts), [file], file.bytes))
    return parts


# ---- image folders ---------------------------------------------------------------------------------------------------


def lines_of(file: File, fields: Fields, start: int = 0):
    """(position after it, line) of a folder's list from the position `start` on. A line is a dict of metadata, or
    {extension: name} of an image and what belongs to it, or Reject, or None for a blank one."""
    if file.kind == "jsonl":
        with open(file.fetch(), "rb") as opened:
            opened.seek(start)
            while line := opened.readline(MAX_BYTES):  # an endless one comes in pieces, which are no JSON
                try:
                    yield opened.tell(), parse_json(line) if line.strip() else None
                except Reject as reason:
                    yield opened.tell(), reason
    else:
        read = {"csv": csv_rows, "rows": parquet_rows}.get(file.kind)
        samples = (sample for _, sample in group(zip(file.members, file.members), fields))
        yield from itertools.islice(enumerate(read(file.fetch()) if read else samples, 1), start, None)


def parse_json(data: bytes) -> dict:
    try:
        return dict(**json.loads(data))
    except (ValueError, TypeError, RecursionError):  # no JSON, no object, nested without end
        raise Reject("bad metadata") from None


def csv_rows(path: Path):
    """The rows of a CSV file as dicts, or Reject. Columns are separated by what the first line has most of."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as opened:
        first = opened.readline(MAX_BYTES)
        lines = itertools.chain([first], iter(lambda: opened.readline(MAX_BYTES), ""))
        reader = csv.reader(lines, delimiter=max(",;\t", key=first.count))
        header = next(reader, [])
        while True:
            try:
                cells = next(reader)
                "".join(cells).encode()
                yield to_row(header, cells) or None
            except StopIteration:
                return
            except csv.Error:  # an endless field
                yield Reject("bad metadata")
            except UnicodeEncodeError:
                yield Reject("caption not in UTF-8")


def parquet_rows(path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(PARQUET_ROWS):
                for cells in zip(*(column.to_pylist() for column in batch.columns)):
                    yield to_row(batch.schema.names, cells)
    except (pa.ArrowException, OSError, ValueError):
        yield Reject(BROKEN_PARQUET)


def to_row(names, cells) -> dict:
    """{column: value}: of columns with the same name the first content, bytes as text if they are."""
    row = {}
    for name, cell in zip(names, cells):
        with contextlib.suppress(AttributeError, UnicodeDecodeError):
            cell = cell.decode()
        row[name] = row.get(name) or cell
    return row


def read_lines(part: Part, file: File, fields: Fields):
    """Samples of a folder of images, in the order of its list."""
    listed, key = file.kind != "images", fields.image or "file_name"
    folder = PurePosixPath(file.name).parent if listed else PurePosixPath()
    lines = lambda: itertools.islice(lines_of(file, fields, part.start), part.lines)
    if part.folder:
        found = [line for _, line in lines() if isinstance(line, dict)]
        names = {(folder / form).as_posix() for line in found for name in ([line.get(key)] if listed else line.values())
                 for form in forms(str(name))}
        with concurrent.futures.ThreadPoolExecutor(DOWNLOADS) as pool:
            fetch = functools.partial(file.repository.download, folder=part.folder)
            list(pool.map(fetch, sorted(names & file.repository.files.keys())))
    root = (part.folder / folder if part.folder else file.path.parent if listed else file.path).resolve()
    read = functools.partial(read_inside, root)
    for number, (position, line) in enumerate(lines(), part.line):
        part.done, name = position - part.start, f"{file.name}:{number}"
        if not listed and isinstance(line, dict):
            yield attempt(next(iter(line.values())), read_sample, line, read, fields)
        elif isinstance(line, Reject):
            yield name, line, None
        elif line is not None:
            image, texts = line.get(key), fields.captions(line)
            if isinstance(image, str):
                yield attempt((folder / image).as_posix(), lambda: (read(image), texts))
            else:
                yield name, Reject("no file name in this row"), None


def forms(name: str) -> list[str]:
    """A name as it is, with the other slash, and in both Unicode forms that systems write."""
    slashed = name.replace("\\", "/")
    return list(dict.fromkeys([name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))]))


def read_inside(root: Path, name: str) -> bytes:
    """The bytes of the file `name` in the folder `root` (resolved); Reject if it is missing, too large or elsewhere."""
    for form in forms(name):
        file = root / form
        try:
            if not (Path(os.path.normpath(file)).is_relative_to(root) or file.resolve().is_relative_to(root)):
                raise Reject("outside the folder")
            if file.is_file() and file.stat().st_size > MAX_BYTES:
                raise Reject("too many bytes")
            if file.is_file():
                return file.read_bytes()
        except PermissionError:
            raise Reject("unreadable file") from None
        except (OSError, ValueError, RuntimeError):  # a name that is too long; a null byte in it; a loop of links
            pass
    raise Reject("missing file")


# ---- samples by key: tars, and images with captions beside them ------------------------------------------------------


def split_name(name: str, fields: Fields) -> tuple[str, str] | None:
    """(key, extension) of a member, cut at the last dot or before an extension that the user named; None: litter."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")
    given = [f".{x}" for x in (fields.image, fields.long, fields.short) if x and name.endswith(f".{x}")]
    key, dot, extension = name.rpartition(given[0] if given else ".")
    if not dot or "/" in extension or is_litter(name):
        return None
    return key, given[0][1:] if given else extension.lower()


def group(members, fields: Fields):
    """(name, member) pairs in any order -> (key, {extension: member}) of the samples, in the order of their first ones.
    A dotted key such as x.mask without a caption belongs to the image x."""
    found = {}
    for name, member in members:
        if split := split_name(name, fields):
            samples = found.setdefault(split[0], [])
            if not samples or split[1] in samples[-1]:  # a second sample under the same key
                samples.append({})
            samples[-1][split[1]] = member
    for key, samples in found.items():
        folder, slash, file = key.rpartition("/")
        [owner, *_] = found.get(folder + slash + file.partition(".")[0], samples)
        for sample in samples:
            images = [extension for extension in sample if extension in IMAGE_EXTENSIONS]
            complete = images and {"txt", "json"} & sample.keys()
            if "." in file and not complete:
                fields.see(f"{file}.{extension}".partition(".")[2] for extension in sample)
            if owner is samples[0] or complete or not owner.keys() & {*IMAGE_EXTENSIONS, fields.image}:
                more = [] if fields.image else images[1:]
                yield key, {extension: member for extension, member in sample.items() if extension not in more}
                yield from ((key, Reject("another image under this key")) for _ in more)


def read_sample(members: dict, read, fields: Fields) -> tuple[bytes, dict]:
    """(image bytes, captions) of {extension: member}; `read` returns a member's bytes. KEY.txt, where it is not empty,
    is the long caption, unless the user named another file or a key of KEY.json. A caption that cannot be read is the
    reason only where there is no other."""
    if isinstance(members, Reject):
        raise members
    wanted = (fields.image, fields.image.lower()) if fields.image else IMAGE_EXTENSIONS
    image = next((member for extension, member in members.items() if extension in wanted), None)
    if image is None:
        fields.see(members)
        raise Reject("no image under this key")
    info, problem = dict.fromkeys(members), None
    for extension in ("json", "txt", fields.long, fields.short):
        try:
            if extension == "json" and extension in members:
                info |= parse_json(read(members[extension]))
            elif extension in members:
                info[extension] = read(members[extension]).decode("utf-8-sig")
        except UnicodeDecodeError:
            problem = Reject("caption not in UTF-8")
        except Reject as reason:
            problem = reason
    texts = fields.captions(info)
    if not fields.long:
        texts["long"] = first_text([info.get("txt"), texts["long"]])
    if problem and not texts["long"]:
        raise problem
    return read(image), texts


# ---- WebDataset tars -------------------------------------------------------------------------------------------------


def read_tar(part: Part, file: File, before: int, fields: Fields):
    """Samples of a tar: KEY.jpg or another image with KEY.txt or KEY.json, side by side or not."""
    try:
        with open(file.fetch(part.folder), "rb") as data:
            if data.read(8).startswith(COMPRESSED):
                yield file.name, Reject("compressed tar (decompress it first)"), None
                return

            def read(member):
                offset, size = member
                if size > MAX_BYTES:
                    raise Reject("too many bytes")
                part.done = before + offset
                data.seek(offset)
                return data.read(size)

            damage = []
            for key, sample in group(members_of(data, damage), fields):
                yield attempt(f"{file.name}:{key}", read_sample, sample, read, fields)
            if damage:
                yield file.name, Reject(BROKEN_TAR), None
    except OSError:
        yield file.name, Reject(BROKEN_TAR), None


def members_of(data, damage: list):
    """(name, (offset, size)) of the members of an open tar, and of tars joined to its end, from their headers alone.
    Links, devices and what is cut off are left out; `damage` gets the last error, if there is any."""
    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, *args):
            try:
                return super().frombuf(*args)
            except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
                damage[:] = [error]  # tarfile passes over it in silence
                raise

    total = data.seek(0, os.SEEK_END)
    data.seek(0)
    try:
        with tarfile.open(fileobj=data, mode="r:", tarinfo=Header, ignore_zeros=True) as tar:
            for member in tar:
                if member.isreg() and member.offset_data + member.size <= total:
                    yield member.name, (member.offset_data, member.size)
                tar.members.clear()  # or a tar of a million members keeps a million headers
    except (tarfile.TarError, EOFError, ValueError) as error:
        damage.append(error)


def samples_in(file: File, fields: Fields) -> int:
    with open(file.path, "rb") as data:
        return sum(1 for _ in group(members_of(data, []), fields))


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def parquet_columns(path: Path, name: str, fields: Fields, needs_captions: bool) -> tuple[dict, int]:
    """({"image", "long", "short"}: names of columns, number of rows) of a Parquet file; Reject if it is broken;
    UserError if no column fits."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(path) as table:
            schema, rows = table.schema_arrow, table.metadata.num_rows
            fields.see(schema.names)
    except (pa.ArrowException, OSError, ValueError):
        raise Reject(BROKEN_PARQUET) from None
    binary = [c.name for c in schema if holds(c.type, "binary") or
              pa.types.is_struct(c.type) and any(f.name == "bytes" and holds(f.type, "binary") for f in c.type)]
    text = [c.name for c in schema if holds(c.type, "binary", "string")]
    chosen = {}
    for what, among in (("image", binary), ("long", text), ("short", text)):
        given = getattr(fields, what)
        columns = [c for c in fields.names(what) if c in among]
        if what == "image" and not given and len(binary) == 1:
            columns = binary  # whatever its name
        if not columns and (given or what == "image" or what == "long" and needs_captions):
            sought = repr(given) if given else {"image": "of encoded images", "long": "of captions"}[what]
            raise UserError(f"{name} has no column {sought} that can serve as --{what}-field; its columns are "
                            f"{', '.join(f'{c.name} ({c.type})' for c in list(schema)[:40])}")
        chosen[what] = columns
    return chosen, rows


def holds(type, *kinds: str) -> bool:
    """Whether an Arrow type is binary or string, also a large one, a view or a dictionary of them."""
    name = str(type).removeprefix("dictionary<values=").partition("<")[0].partition(",")[0]
    return any(kind in name for kind in kinds)


def read_parquet(part: Part, file: File, before: int, fields: Fields, needs_captions: bool):
    """Samples of a Parquet file, a few rows at a time. Images are bytes, or structs {bytes, path} as `datasets` has."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    path, row = file.fetch(part.folder), 0
    try:
        columns, rows = parquet_columns(path, file.name, fields, needs_captions)
        with pq.ParquetFile(path, pre_buffer=False) as table:  # or a whole row group is read ahead
            for batch in table.iter_batches(PARQUET_ROWS, columns=list(itertools.chain(*columns.values()))):
                for i in range(batch.num_rows):
                    yield attempt(f"{file.name}:{row}", read_row, batch, i, columns)
                    row += 1
                    part.done = before + file.bytes * row // rows
    except UserError:
        yield file.name, Reject("no fitting column in this file"), None
    except (pa.ArrowException, OSError, ValueError, Reject):
        yield file.name, Reject(BROKEN_PARQUET), None


def read_row(batch, i: int, columns: dict) -> tuple[bytes, dict]:
    """(image bytes, captions) of row i of a record batch: the first content in the columns, whose names may repeat."""
    def values(what):
        for column in (n for name in columns[what] for n in batch.schema.get_all_field_indices(name)):
            value = batch.column(column)[i].as_py()
            yield value.get("bytes") if isinstance(value, dict) else value

    try:
        texts = {what: first_text(v.decode() if isinstance(v, bytes) else v for v in values(what))
                 for what in ("long", "short")}
    except UnicodeDecodeError:
        raise Reject("caption not in UTF-8") from None
    image = next((value for value in values("image") if isinstance(value, bytes)), None)
    if image is None:
        raise Reject("no image in this row")
    if len(image) > MAX_BYTES:
        raise Reject("too many bytes")
    return image, texts
