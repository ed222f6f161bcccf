"""The files of a model: a local diffusers folder, or a hub repository brought to disk part by part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from simpletuner.errors import ExitCode, UserError

_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.h5"]


class Repository:
    """Names the folder of each part (`vae`, `transformer`, …). Hub parts are fetched when first asked for."""

    def __init__(
        self, name: str, *, revision: str | None = None, variant: str | None = None, without_weights: bool = False
    ) -> None:
        """`without_weights`: of what is on the hub only configurations and tokenizers are fetched."""
        self._ignored = _WEIGHTS if without_weights else None
        self.name = name
        self.revision = revision
        self.variant = variant

    def part(self, subfolder: str) -> Path:
        """Raises UserError `model_part_missing` or `hub_unavailable` (69)."""
        local = Path(self.name)
        folder = (local if local.is_dir() else self._fetch(subfolder)) / subfolder
        if not folder.is_dir():
            raise UserError(
                "model_part_missing",
                f"{self.name} has no folder {subfolder!r}.",
                hint="A diffusers folder holds model_index.json, transformer, vae, text_encoder, tokenizer, scheduler.",
                pointer="/--pretrained_model_name_or_path",
                exit_code=ExitCode.OUTSIDE,
            )
        return folder

    def config(self, subfolder: str) -> dict[str, Any]:
        """The part's configuration file."""
        folder = self.part(subfolder)
        names = ("scheduler_config.json", "config.json", "tokenizer_config.json")
        return json.loads(next(folder / name for name in names if (folder / name).exists()).read_text())

    def hash_of(self, subfolders: Iterable[str]) -> str:
        """SHA-256 over names and contents of all files of the parts: what a cache entry depends on."""
        files = sorted(path for part in subfolders for path in self.part(part).iterdir() if path.is_file())
        with ThreadPoolExecutor(4) as pool:
            hashes = list(pool.map(_hash_file, files))
        return hashlib.sha256(
            "\0".join(f"{p.name}\0{h}" for p, h in zip(files, hashes, strict=True)).encode()
        ).hexdigest()

    def _fetch(self, subfolder: str) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            wanted = [f"{subfolder}/*"]
            return Path(
                snapshot_download(
                    self.name, revision=self.revision, allow_patterns=wanted, ignore_patterns=self._ignored
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
            raise UserError(
                "hub_unavailable",
                f"{subfolder}/ of {self.name} is neither on this disk nor to be had from the hub: {error}",
                hint="Check the name, the network, HF_ENDPOINT, and HF_TOKEN for a gated repository.",
                pointer="/--pretrained_model_name_or_path",
                exit_code=ExitCode.OUTSIDE,
            ) from error


def _hash_file(path: Path) -> str:
    """Hub snapshots link to blobs that are named by their hash: those need no reading."""
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and len(target.name) == 64:
        return target.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
