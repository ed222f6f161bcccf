"""The same pictures in each kind of storage, behind real servers on loopback."""

from __future__ import annotations

import csv
import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest

from s3_server import Relay, S3Server
from simpletuner.config.dataset_options import ImageDataset
from simpletuner.data.storage import DataBackend, LocalBackend
from simpletuner.data.storage_csv import CsvBackend
from simpletuner.data.storage_hub import HubBackend
from simpletuner.data.storage_s3 import S3Backend
from simpletuner.retry import Retry

Answer = tuple[int, dict[str, str], bytes]


class FileServer(ThreadingHTTPServer):
    """`files` by path; `failures` are statuses of the next answers; `fetched` are the paths of files that were sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.kinds: dict[str, str] = {}
        self.moved: dict[str, str] = {}
        self.failures: list[int] = []
        self.fetched: list[str] = []
        self.num_requests = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str) -> Answer:
        if path in self.moved:
            return 302, {"Location": self.moved[path]}, b""
        if path not in self.files:
            return 404, {}, b""
        return 200, {"Content-Type": self.kinds.get(path, "image/png")}, self.files[path]


class HubServer(FileServer):
    """A hub with one dataset, `me/pictures`, whose commit is a hash of its files."""

    private = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def answer(self, method: str, path: str) -> Answer:
        parts = path.strip("/").split("/")
        match parts:
            case ["api", "datasets", "me", "pictures", *rest] if self.private:
                return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
            case ["api", "datasets", "me", "pictures", *rest]:
                if rest and rest[:1] == ["revision"] and rest[1] not in ("main", self.commit):
                    return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
                rows = [
                    {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
                    for name, content in self.files.items()
                ]
                answer = {"id": "me/pictures", "sha": self.commit, "siblings": rows, "private": False, "tags": []}
                return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
            case ["datasets", "me", "pictures", "resolve", commit, *rest] if "/".join(rest) in self.files:
                content = self.files["/".join(rest)]
                names = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
                return 200, names, content
            case ["datasets", "me", "pictures", *_]:
                return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
            case _:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


class _Exchange(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.num_requests += 1
        failed = self.server.failures.pop(0) if self.server.failures else None
        status, headers, content = (failed, {}, b"") if failed else self.server.answer(self.command, path)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
            if status == 200 and not path.startswith("/api/"):
                self.server.fetched.append(path)

    do_GET = do_HEAD = do_any

    def log_message(self, *_: Any) -> None:
        pass


class World(ABC):
    """One kind of storage, with pictures and captions in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.waits: list[float] = []
        self.retry = Retry(self.waits.append, (1.0, 2.0))

    @abstractmethod
    def put(self, pictures: Mapping[str, bytes], captions: Mapping[str, str]) -> None:
        """Replace what is there. Captions by name of the picture."""

    @property
    @abstractmethod
    def keys(self) -> dict[str, Any]:
        """Of the dataset's entry."""

    @abstractmethod
    def backend(self, dataset: ImageDataset) -> DataBackend: ...
    @abstractmethod
    def fetched(self) -> list[str]:
        """Files that were asked for since the last call."""

    def fail(self, *statuses: int) -> None:
        """Of the next requests."""
        raise AssertionError(f"nothing answers here with {statuses}")

    def path(self, name: str, names: Mapping[str, bytes]) -> str:
        """What the picture is called in the dataset."""
        return name

    def dataset(self, **more: Any) -> ImageDataset:
        defaults: dict[str, Any] = {"id": "set", "resolution": 64, "crop": True, "crop_style": "center"}
        return ImageDataset(cache_dir_vae=str(self.root / "vae"), **defaults | self.keys | more)

    @property
    def scans(self) -> Path:
        return self.root / "vae"


class LocalWorld(World):
    @property
    def keys(self) -> dict[str, Any]:
        return {"instance_data_dir": str(self.root / "in"), "caption_strategy": "textfile"}

    def put(self, pictures: Mapping[str, bytes], captions: Mapping[str, str]) -> None:
        for name, content in with_texts(pictures, captions).items():
            path = self.root / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)

    def backend(self, dataset: ImageDataset) -> DataBackend:
        return LocalBackend(Path(dataset.instance_data_dir or ""))

    def fetched(self) -> list[str]:
        return []


class S3World(World):
    first_bytes = 100_000
    """Most bytes that the server sends for a header."""

    def __init__(self, root: Path, server: S3Server) -> None:
        super().__init__(root)
        self.server = server
        self.prefix = root.name
        self.statuses: list[int] = []
        self.asked: list[str] = []
        self.relay = Relay(server.port, self._before)

    def _before(self, method: str, path: str) -> int | None:
        if "list-type" not in path:
            self.asked.append(path)
        return self.statuses.pop(0) if self.statuses else None

    @property
    def keys(self) -> dict[str, Any]:
        return {
            "type": "aws", "aws_bucket_name": "results", "aws_data_prefix": f"/{self.prefix}/", "aws_region_name":
            "us-east-1", "aws_endpoint_url": self.relay.url, "caption_strategy": "textfile",
        }  # fmt: skip

    def put(self, pictures: Mapping[str, bytes], captions: Mapping[str, str]) -> None:
        for name, content in with_texts(pictures, captions).items():
            self.server.client.put_object(Bucket="results", Key=f"{self.prefix}/{name}", Body=content)

    def backend(self, dataset: ImageDataset) -> DataBackend:
        return S3Backend(dataset, self.retry)

    def fetched(self) -> list[str]:
        asked, self.asked[:] = list(self.asked), []
        return asked

    def fail(self, *statuses: int) -> None:
        self.statuses += statuses


class CsvWorld(World):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.server = FileServer()

    @property
    def keys(self) -> dict[str, Any]:
        return {
            "type": "csv", "csv_file": str(self.root / "list.csv"), "csv_cache_dir": str(self.root / "fetched"),
            "caption_strategy": "csv",
        }  # fmt: skip

    def put(self, pictures: Mapping[str, bytes], captions: Mapping[str, str]) -> None:
        for name, content in pictures.items():
            if self.server.files.get(f"/{name}") != content:
                kept = hashlib.sha256(self.url(name).encode()).hexdigest()
                (self.root / "fetched" / kept[:2] / kept).unlink(missing_ok=True)
        self.server.files = {f"/{name}": content for name, content in pictures.items()}
        self.write([(self.url(name), captions.get(name, "")) for name in pictures])

    def write(self, lines: list[tuple[str, str]]) -> None:
        text = StringIO()
        csv.writer(text).writerows([("url", "caption"), *lines])
        (self.root / "list.csv").write_text(text.getvalue(), encoding="utf-8")

    def url(self, name: str) -> str:
        return f"{self.server.url}/{quote(name)}"

    def path(self, name: str, names: Mapping[str, bytes]) -> str:
        return f"{self.server.url.removeprefix('http://')}/{name}"

    def backend(self, dataset: ImageDataset) -> DataBackend:
        return CsvBackend(dataset, self.retry)

    def fetched(self) -> list[str]:
        asked, self.server.fetched[:] = list(self.server.fetched), []
        return asked

    def fail(self, *statuses: int) -> None:
        self.server.failures += statuses


class HubFilesWorld(World):
    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(root)
        self.server = HubServer()
        values: dict[str, Any] = {"ENDPOINT": self.server.url, "HF_HUB_OFFLINE": False}
        values["HF_HUB_CACHE"] = str(root / "hub")
        template = f"{self.server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        values |= {"HF_HUB_DISABLE_XET": True, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        for name, value in values.items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)

    @property
    def keys(self) -> dict[str, Any]:
        return {"type": "huggingface", "dataset_name": "me/pictures", "caption_strategy": "huggingface"}

    def put(self, pictures: Mapping[str, bytes], captions: Mapping[str, str]) -> None:
        lines = [json.dumps({"file_name": name, "caption": text}) for name, text in captions.items()]
        self.server.files = {f"train/{name}": content for name, content in pictures.items()}
        self.server.files |= {"train/metadata.jsonl": "\n".join(lines).encode(), "README.md": b"# pictures"}

    def path(self, name: str, names: Mapping[str, bytes]) -> str:
        return f"train/{name}"

    def backend(self, dataset: ImageDataset) -> DataBackend:
        return HubBackend(dataset, self.scans, self.retry)

    def fetched(self) -> list[str]:
        asked, self.server.fetched[:] = list(self.server.fetched), []
        return asked

    def fail(self, *statuses: int) -> None:
        self.server.failures += statuses


class HubRowsWorld(HubFilesWorld):
    """Two shards, row groups of two."""

    def put(self, pictures: Mapping[str, bytes], captions: Mapping[str, str]) -> None:
        names = sorted(pictures)
        half = (len(names) + 1) // 2
        self.server.files = {"README.md": b"# pictures", "data/test-00000-of-00001.parquet": shard([], {}, {})}
        for number, part in enumerate((names[:half], names[half:])):
            self.server.files[f"data/train-{number:05d}-of-00002.parquet"] = shard(part, pictures, captions)

    def path(self, name: str, names: Mapping[str, bytes]) -> str:
        return f"train/{sorted(names).index(name):06d}{Path(name).suffix}"


def shard(names: list[str], pictures: Mapping[str, bytes], captions: Mapping[str, str]) -> bytes:
    cell = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    cells = [{"bytes": pictures[name] or None, "path": Path(name).name} for name in names]
    texts = [captions.get(name) for name in names]
    columns = {"image": pyarrow.array(cells, cell), "caption": pyarrow.array(texts, pyarrow.string())}
    file = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=2)
    return file.getvalue()


def with_texts(pictures: Mapping[str, bytes], captions: Mapping[str, str]) -> dict[str, bytes]:
    texts = {str(Path(name).with_suffix(".txt")): text.encode() for name, text in captions.items()}
    return {**pictures, **texts}
