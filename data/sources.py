"""Where data/prepare.py gets its samples: image folders, WebDataset tars and Parquet files, on disk or in a dataset
repository on the Hugging Face hub.

`list_files` finds the files of a source, `cut` makes parts of them: the unit that is prepared, resumed and given to a
rank. Reading a part yields (name, image bytes, {"long": str, "short": str}), an absent caption being "", or for what
cannot be read (name, Reject, None). Everything is streamed: nothing is unpacked, no file is held as a whole. Names come
from strangers and are labels, never paths, except in metadata.jsonl, where they may not leave the folder.
"""

import concurrent.futures
import fnmatch
import glob
import itertools
import json
import re
import shutil
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from data.shards import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE_FIELDS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
LONG_FIELDS = ("text_long", "long_text", "long_caption", "caption_long", "text", "caption", "txt", "prompt",
               "description")
SHORT_FIELDS = ("text_short", "short_text", "short_caption", "caption_short")
MAX_BYTES = 100 * 10**6      # of an encoded image, a caption file or a line of metadata.jsonl
PART_BYTES = 2 * 10**9       # of tars or Parquet files in a part; also what is downloaded at a time
PART_LINES = 20_000          # of metadata.jsonl in a part
PARQUET_ROWS = 32            # read at a time
DOWNLOADS = 8                # files of an image folder that are fetched at the same time

KINDS = "an image folder with metadata.jsonl, WebDataset tars, Parquet files, a glob or hf://owner/name"


class Reject(Exception):
    """This sample cannot be used; the message is the reason it is counted under."""


@dataclass
class Fields:
    """Which columns or JSON keys hold what: a name that the user gave, or else the first usual one that has content.

    In tars `image` is the extension of the members to take. seen: the first field names met, for messages."""

    image: str | None = None
    long: str | None = None
    short: str | None = None
    seen: dict = field(default_factory=dict)

    def captions(self, info: dict) -> dict:
        """{"long": str, "short": str} of a metadata object."""
        self.seen |= dict.fromkeys(list(info)[:20 - len(self.seen)])
        return {"long": first_text(info, self.long, LONG_FIELDS), "short": first_text(info, self.short, SHORT_FIELDS)}


def first_text(info: dict, given: str | None, usual: tuple) -> str:
    values = (info.get(name) for name in ([given] if given else usual))
    return next((v for v in values if isinstance(v, str) and v.strip()), "")


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


def list_repository(source: str, downloads: Path) -> list["File"]:
    """hf://owner/name[@revision][/folder-or-glob] -> its tars and Parquet files, or else its folders of images."""
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
    found = {path: size for path, size in sorted(found.items()) if ".." not in path.split("/") and path[0] != "/"}
    repository = Repository(name, commit, downloads, found)
    chosen = [p for p in found if not within or p.startswith(within + "/") or fnmatch.fnmatchcase(p, within)]
    files = [File(kind_of(p), p, found[p], downloads / p, repository) for p in chosen if kind_of(p)]
    if not files:
        files = [File("lines", p, found[p], downloads / p, repository) for p in chosen
                 if p.rpartition("/")[2] == "metadata.jsonl"]
    if not files:
        others = sorted({p.rpartition(".")[2] for p in chosen if "." in p})[:10]
        raise UserError(f"{source} has no .tar, no .parquet and no metadata.jsonl among its {len(chosen)} files"
                        + (f" (endings: {', '.join(others)})" if others else ""))
    return files


# ---- files and parts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A tar, a Parquet file or the metadata.jsonl ("lines") of an image folder. `name` is for people: no path of this
    machine, but in a repository its path there."""

    kind: str
    name: str
    bytes: int
    path: Path
    repository: Repository | None = None

    def fetch(self, folder: Path | None = None) -> Path:
        """Where it is on disk, once it has been downloaded if it is on the hub."""
        return self.repository.download(self.name, folder or self.repository.folder) if self.repository else self.path


@dataclass
class Part:
    """Consecutive files of one kind, or consecutive `lines` of one metadata.jsonl: those from byte `start`, line number
    `line`, with the checksum `crc`. `bytes` of it are to be read, `done` have been, for the progress."""

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
        if self.kind == "lines":
            yield from read_lines(self, fields)
        else:
            before = 0
            for file in self.files:
                if self.kind == "tar":
                    yield from read_tar(self, file, before, fields)
                else:
                    yield from read_parquet(self, file, before, fields, needs_captions)
                before += file.bytes

    def discard(self) -> None:
        """Deletes what was downloaded for this part."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def kind_of(name: str) -> str | None:
    kind = name.rpartition(".")[2].lower()
    return kind if kind in ("tar", "parquet") and not name.rpartition("/")[2].startswith(".") else None


def list_files(source: str, downloads: Path) -> list[File]:
    """The files of a path, a glob or an hf:// repository, in the order in which they are read. UserError if none."""
    if source.startswith("hf://"):
        return list_repository(source, downloads)
    paths = [Path(source)]
    if not paths[0].exists():
        paths = [Path(p) for p in sorted(glob.glob(source, recursive=True))]
        if not paths:
            raise UserError(f"{source} does not exist; SOURCE is {KINDS}")
    found = []
    for path in paths:
        if (lines := path / "metadata.jsonl").is_file():
            found.append(File("lines", f"{path.resolve().name}/metadata.jsonl", lines.stat().st_size, lines))
        else:
            within = sorted(path.iterdir()) if path.is_dir() else [path]
            found += [File(kind_of(p.name), p.name, p.stat().st_size, p) for p in within
                      if kind_of(p.name) and p.is_file()]
    if not found:
        raise UserError(f"{source} has nothing to read: looked for .tar and .parquet files and for metadata.jsonl in "
                        f"it; SOURCE is {KINDS}")
    return found


def cut(files: list[File]) -> list[Part]:
    """Parts of up to PART_BYTES of tars or Parquet files, or of PART_LINES lines."""
    parts = []
    for kind, group in itertools.groupby(files, lambda f: f.kind):
        if kind == "lines":
            for file in group:
                with open(file.fetch(), "rb") as opened:
                    for number, line in enumerate(lines_of(opened)):
                        if number % PART_LINES == 0:
                            parts.append(Part(len(parts), [file], 0, opened.tell() - len(line), 1 + number))
                        parts[-1].lines += 1
                        parts[-1].bytes += len(line)
                        parts[-1].crc = zlib.crc32(line, parts[-1].crc)
        else:
            for file in group:
                last = parts[-1] if parts and parts[-1].kind == kind else None
                if last and last.bytes + file.bytes <= PART_BYTES:
                    last.files.append(file)
                    last.bytes += file.bytes
                else:
                    parts.append(Part(len(parts), [file], file.bytes))
    return parts


# ---- image folders ---------------------------------------------------------------------------------------------------


def lines_of(file):
    """Lines of a binary file; an endless one comes in pieces, which are no JSON and are counted as such."""
    return iter(lambda: file.readline(MAX_BYTES), b"")


def metadata(part: Part):
    """(line number, bytes of the part up to here, object or Reject) of the lines of a part that are not blank."""
    with open(part.files[0].fetch(), "rb") as file:
        file.seek(part.start)
        position = 0
        for number, line in enumerate(lines_of(file), part.line):
            if position >= part.bytes:
                break
            position += len(line)
            if line.strip():
                try:
                    yield number, position, parse_json(line)
                except Reject as reason:
                    yield number, position, reason


def read_lines(part: Part, fields: Fields):
    """Samples of an image folder (the Hugging Face ImageFolder convention), in the order of metadata.jsonl."""
    key, file = fields.image or "file_name", part.files[0]
    root = file.path.parent
    if part.folder:
        download_images(part, key)
        root = part.folder / Path(file.name).parent
    root = root.resolve()
    for number, part.done, info in metadata(part):
        name = f"metadata.jsonl:{number}"
        try:
            if isinstance(info, Reject):
                raise info
            texts = fields.captions(info)
            if not isinstance(info.get(key), str):
                raise Reject("bad metadata")
            name = info[key]
            yield name, read_inside(root, name), texts
        except Reject as reason:
            yield name, reason, None


def download_images(part: Part, key: str) -> None:
    """Fetches what the lines of a part name, as far as the repository has it."""
    repository, within = part.files[0].repository, part.files[0].name.removesuffix("metadata.jsonl")
    names = (within + str(info.get(key)) for _, _, info in metadata(part) if isinstance(info, dict))
    names = [name for name in dict.fromkeys(names) if name in repository.files]
    with concurrent.futures.ThreadPoolExecutor(DOWNLOADS) as pool:
        for _ in pool.map(lambda name: repository.download(name, part.folder), names):
            pass


def read_inside(root: Path, name: str) -> bytes:
    """The bytes of the file `name` in the folder `root` (resolved); Reject if it is missing, too large or elsewhere."""
    try:
        file = (root / name).resolve()  # follows links and "..": what counts is where the file really is
        if not file.is_relative_to(root):
            raise Reject("outside the folder")
        if not file.is_file():
            raise Reject("missing file")
        if file.stat().st_size > MAX_BYTES:
            raise Reject("too many bytes")
        return file.read_bytes()
    except (OSError, ValueError, RuntimeError):  # no permission, name too long; a null byte in it; a loop of links
        raise Reject("missing file") from None


def parse_json(data: bytes) -> dict:
    try:
        return dict(**json.loads(data))
    except (ValueError, TypeError, RecursionError):  # no JSON, no object, nested without end
        raise Reject("bad metadata") from None


# ---- WebDataset tars -------------------------------------------------------------------------------------------------


def read_tar(part: Part, file: File, before: int, fields: Fields):
    """Samples of a tar in stream order: KEY.jpg, .jpeg, .png or .webp with KEY.txt or KEY.json."""
    path = file.fetch(part.folder)
    try:
        with tarfile.open(path, "r:") as tar:
            members = (m for m in tar if m.isreg() and split_name(m.name))  # no links, devices or hidden files
            for key, group in itertools.groupby(members, lambda m: split_name(m.name)[0]):
                name = f"{file.name}:{key}"
                try:
                    yield name, *read_group(tar, group, fields)
                except Reject as reason:
                    yield name, reason, None
                part.done = before + tar.offset
                tar.members.clear()  # or a tar of a million members keeps a million headers
            # tarfile takes a damaged header for the end of the archive; a real end is zeros, or the end of the file
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError
    except (tarfile.TarError, OSError, EOFError, ValueError):
        yield file.name, Reject("broken tar (what follows the damage is lost)"), None


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member, cut at the first dot of its file name as in WebDataset; None for hidden files."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def read_group(tar: tarfile.TarFile, members, fields: Fields) -> tuple[bytes, dict]:
    """(image bytes, captions) of the members that share a key. KEY.txt, where it is not empty, is the long caption,
    unless the user named a JSON key."""
    parts, images = {}, [fields.image.lower()] if fields.image else IMAGE_EXTENSIONS
    for member in members:
        extension = split_name(member.name)[1]
        kind = "image" if extension in images else extension
        if kind in ("image", "txt", "json") and kind not in parts:  # of several images under one key, the first
            if member.size > MAX_BYTES:
                raise Reject("too many bytes")
            parts[kind] = tar.extractfile(member).read()
    if "image" not in parts:
        raise Reject("no image under this key")
    texts = fields.captions(parse_json(parts.get("json", b"{}")))
    try:
        text = parts.get("txt", b"").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Reject("caption not in UTF-8") from None
    return parts["image"], {**texts, "long": text} if text.strip() and not fields.long else texts


def samples_in(file: File, look: int = 100) -> float:
    """About how many samples a tar holds, by the size of its first ones."""
    keys = set()
    try:
        with tarfile.open(file.path, "r:") as tar:
            for member in tar:
                if split_name(member.name):
                    keys.add(split_name(member.name)[0])
                if len(keys) > look:
                    return look * file.bytes / max(member.offset, 1)
    except (tarfile.TarError, OSError, EOFError, ValueError):
        pass
    return len(keys)


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def parquet_columns(path: Path, name: str, fields: Fields, needs_captions: bool) -> tuple[dict, int] | None:
    """({"image", "long", "short"}: column names or None, number of rows) of a Parquet file; None if it is broken;
    UserError if no column fits."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(path) as table:
            schema, rows = table.schema_arrow, table.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError):
        return None
    binary = [c.name for c in schema if is_binary(c.type) or
              pa.types.is_struct(c.type) and any(f.name == "bytes" and is_binary(f.type) for f in c.type)]
    chosen = {}
    for what, usual, among in (("image", IMAGE_FIELDS, binary), ("long", LONG_FIELDS, schema.names),
                               ("short", SHORT_FIELDS, schema.names)):
        given = getattr(fields, what)
        column = next((c for c in ([given] if given else usual) if c in among), None)
        if what == "image" and not given and len(binary) == 1:
            column = binary[0]  # whatever its name
        if column is None and (given or what == "image" or what == "long" and needs_captions):
            sought = repr(given) if given else {"image": "of encoded images", "long": "of captions"}[what]
            raise UserError(f"{name} has no column {sought} that can serve as --{what}-field; its columns are "
                            f"{', '.join(f'{c.name} ({c.type})' for c in list(schema)[:40])}")
        chosen[what] = column
    return chosen, rows


def is_binary(type) -> bool:
    import pyarrow as pa
    return pa.types.is_binary(type) or pa.types.is_large_binary(type)


def read_parquet(part: Part, file: File, before: int, fields: Fields, needs_captions: bool):
    """Samples of a Parquet file, a few rows at a time. Images are bytes, or structs {bytes, path} as `datasets` has."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    path, broken = file.fetch(part.folder), Reject("broken Parquet file (what follows the damage is lost)")
    if (found := parquet_columns(path, file.name, fields, needs_captions)) is None:
        yield file.name, broken, None
        return
    columns, rows = found
    row = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False) as table:  # or a whole row group is read ahead
            for batch in table.iter_batches(PARQUET_ROWS, columns=[c for c in columns.values() if c]):
                for i in range(batch.num_rows):
                    name = f"{file.name}:{row}"
                    try:
                        yield name, *read_row(batch, i, columns)
                    except Reject as reason:
                        yield name, reason, None
                    row += 1
                    part.done = before + file.bytes * row // rows
    except (pa.ArrowException, OSError, ValueError):
        yield file.name, broken, None


def read_row(batch, i: int, columns: dict) -> tuple[bytes, dict]:
    """(image bytes, captions) of row i of a record batch."""
    try:
        values = {what: batch.column(name)[i].as_py() for what, name in columns.items() if name}
    except UnicodeDecodeError:
        raise Reject("caption not in UTF-8") from None
    image = values["image"].get("bytes") if isinstance(values["image"], dict) else values["image"]
    if not isinstance(image, bytes):
        raise Reject("no image in this row")
    if len(image) > MAX_BYTES:
        raise Reject("too many bytes")
    texts = {what: values.get(what) for what in ("long", "short")}
    return image, {what: text if isinstance(text, str) else "" for what, text in texts.items()}
