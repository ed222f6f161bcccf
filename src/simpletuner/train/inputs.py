"""From dataset entries to batches: discovery with its ledgers, caches, the plan of epochs. training.md §3, §8.1."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpletuner.config.dataset_options import ConditioningDataset, PictureDataset
from simpletuner.config.prompt import plan_prompts
from simpletuner.config.train_config import TrainConfig
from simpletuner.data.cache import CacheStore, cache_key
from simpletuner.data.ledger import check_defects, dataset_report, write_ledger
from simpletuner.data.loader import Batch, BatchReader, LatentSource, TextSource
from simpletuner.data.manifest import NUM_NEWEST, Manifest, discover
from simpletuner.data.masks import MaskEncoder
from simpletuner.data.pairs import pair_all, targets_of
from simpletuner.data.plan import START, Entry, EpochPlan, Group
from simpletuner.data.prepare import MASK, LatentEncoder, Prepared, check_dropped, encode_latents, encode_texts
from simpletuner.errors import Level
from simpletuner.families.base import Family
from simpletuner.train.memory import MemoryPlan
from simpletuner.train.ranks import ALONE, Ranks
from simpletuner.train.references import Reference, prompt_reference, sample_references
from simpletuner.train.report import Reporter, StageReport
from simpletuner.train.requests import RequestReader

_PLURALS = {"reference": "references", "mask": "masks"}


class StageWatch:
    """A stage that listens: progress goes out, a stop comes in."""

    def __init__(self, stage: StageReport, requests: RequestReader) -> None:
        self._stage = stage
        self._requests = requests

    def report(self, current: int, total: int) -> None:
        self._stage.advance(current, total)

    def should_stop(self) -> bool:
        """Raises Ended instead of answering: what was encoded is stored on the way out."""
        self._requests.raise_if_ended()
        return False


@dataclass(slots=True)
class Inputs:
    """What preparation leaves behind; the encoders are gone by then."""

    manifests: dict[str, Manifest]
    latents: dict[str, LatentSource]
    text: TextSource
    prompts: dict[str, dict[str, Tensor]]
    library: list[Reference]
    """Pictures of the prompts that bring their own, in the order of prompts."""
    config: TrainConfig
    ranks: Ranks

    def plan(self, seed: int) -> EpochPlan:
        """Of the datasets that are trained on."""
        names = [entry.id for entry in self.config.image_datasets]
        return EpochPlan(
            [self.manifests[name].planned_set() for name in names],
            seed=seed,
            batch_size=self.config.run.train_batch_size,
            world_size=self.ranks.count,
            uniform=self.config.data.data_backend_sampling == "uniform",
        )

    def reader(self, family: Family, seed: int, *, pin_memory: bool) -> BatchReader:
        return BatchReader(
            self.latents,
            self.text,
            seed=seed,
            collate_text=family.collate_text,
            pin_memory=pin_memory,
            combined=self.config.data.conditioning_multidataset_sampling == "combined",
            mask_probability=self.config.loss.masked_loss_probability,
        )

    def validation_references(self, dataset_id: str, n: int) -> list[Reference]:
        """Of the first `n` kept samples of an image or eval dataset, then of the prompt library."""
        return sample_references(self.latents[dataset_id], n) + self.library

    def some_latents(self, n: int) -> list[Tensor]:
        """C×H×W, of the first pictures that are trained on."""
        source = self.latents[self.config.image_datasets[0].id]
        return source.read(source.manifest.kept.tolist()[:n])

    def held_out_batches(self, dataset_id: str, reader: BatchReader, size: int) -> list[Batch]:
        """Every kept sample of a dataset once, in a fixed order."""
        batches: list[Batch] = []
        for bucket, members in self.manifests[dataset_id].buckets().items():
            rows = members.tolist()
            for start in range(0, len(rows), size):
                uses = tuple(Entry(row, 0) for row in rows[start : start + size])
                group = Group(dataset_id, bucket, uses, START, START)
                batches.append(reader.read(group, uses, held_out=True))
        return batches

    def fingerprint(self, only: str | None = None) -> str:
        """Names the data that is trained on, or one dataset of it: samples, plans, captions, uses.

        Moving a folder does not change it.
        """
        digest = hashlib.sha256()
        for entry in self.config.image_datasets:
            if only not in (None, entry.id):
                continue
            manifest = self.manifests[entry.id]
            digest.update(
                f"{entry.id}\0{entry.repeats}\0{entry.probability}\0{entry.caption_dropout_probability}".encode()
            )
            for row in manifest.kept.tolist():
                captions = [manifest.captions.texts[i] for i in manifest.captions.of(row)]
                digest.update(manifest.content(row))
                digest.update("\0".join([manifest.paths[row], manifest.plan(row).transform, *captions]).encode())
                for mates in manifest.mates:
                    digest.update(mates.content(row))
                    digest.update(f"{mates.dataset.id}\0{mates.kind}\0{mates.plan(row).transform}".encode())
        return digest.hexdigest()


class Preparation:
    """Runs the stages before the denoiser is loaded, in the order of the contract."""

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        reporter: Reporter,
        requests: RequestReader,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._family = family
        self._reporter = reporter
        self._requests = requests
        self._device = device

    def encode(self, manifests: dict[str, Manifest], prompts: Iterable[str], memory: MemoryPlan) -> Inputs:
        """Fill the caches; the ranks share what is to be encoded, and rank 0 draws, so `prompts` are its own.

        Raises UserError (65) for broken pictures, (71) for no room, Ended when asked to end.
        """
        self._memory = memory
        text_store = CacheStore(Path(self._config.text_embeds.cache_dir))
        text, embeddings = self._encode_texts(manifests, text_store, list(dict.fromkeys(prompts)))
        latents = self._encode_latents(manifests)
        found = {name: source.manifest for name, source in latents.items()}
        library = self._encode_library() if self._ranks.is_main else []
        return Inputs(found, latents, text, embeddings, library, self._config, self._ranks)

    def discover(self, ledgers: Path, submitted_at: datetime | None = None) -> dict[str, Manifest]:
        """Of the image and eval datasets, by id. Raises UserError (65) for defects, Ended when asked to end.

        Files that changed after `submitted_at` are named.
        """
        with self._ranks.main_first():
            return self._discover(ledgers, submitted_at)

    def _discover(self, ledgers: Path, submitted_at: datetime | None) -> dict[str, Manifest]:
        found: list[Manifest] = []
        data = self._config.data
        with self._reporter.stage("init_data_backend", "Looking through the datasets") as stage:
            entries = self._config.picture_datasets
            for number, entry in enumerate(entries):
                self._requests.raise_if_ended()
                scans = Path(entry.cache_dir_vae) / "scan"
                place = self._config.pointer_of(entry)
                found.append(discover(entry, alignment=data.aspect_bucket_alignment, cache_dir=scans, pointer=place))
                stage.advance(number + 1, len(entries))
            found = pair_all(found)
            for manifest in found if self._ranks.is_main else []:
                write_ledger(manifest, ledgers / f"ledger-{manifest.dataset.id}.jsonl")
                self._report_dataset(manifest)
                self._report_changes(manifest, submitted_at)
            for problem in check_defects(targets_of(found), ignore_missing_files=data.ignore_missing_files):
                if problem.level is Level.WARNING:
                    self._reporter.warn(problem.code, problem.message, hint=problem.hint, pointer=problem.pointer)
        return {manifest.dataset.id: manifest for manifest in targets_of(found)}

    def _report_changes(self, manifest: Manifest, submitted_at: datetime | None) -> None:
        """A job may have waited for days: what it trains on then is said, not silently another dataset."""
        changed = manifest.changed_since(submitted_at) if submitted_at else []
        if changed:
            name, more = manifest.dataset.id, " and perhaps more" if len(changed) == NUM_NEWEST else ""
            message = f"{name} changed after the job was submitted: {', '.join(changed)}{more}."
            self._reporter.warn("dataset_changed", message, hint="The run uses them as they are now.")

    def _report_dataset(self, manifest: Manifest) -> None:
        report = dataset_report(manifest)
        name, num_buckets = manifest.dataset.id, len(report["buckets"])
        message = f"{name}: {report['kept']} of {report['found']} pictures in {num_buckets} buckets"
        self._reporter.notify("dataset_report", message, **report)

    def _encode_texts(
        self, manifests: dict[str, Manifest], store: CacheStore, prompts: list[str]
    ) -> tuple[TextSource, dict[str, dict[str, Tensor]]]:
        fingerprint = self._family.caption_fingerprint()
        captions = list(dict.fromkeys(["", *(c for m in manifests.values() for c in m.effective_captions())]))
        encoder = _LazyCaptions(self._family, fingerprint, self._device, self._memory)
        entry = self._config.text_embeds
        with self._reporter.stage("init_text_embed_cache", "Caching captions") as stage:
            prepared = encode_texts(
                captions,
                store,
                encoder,
                watch=StageWatch(stage, self._requests),
                batch_size=entry.text_encoder_batch_size,
                write_batch_size=entry.write_batch_size,
                rank=self._ranks.rank,
                world_size=self._ranks.count,
            )
            prepared = prepared.merged(self._ranks.gather(prepared))
        self._report(entry.id, "captions", prepared)
        with self._reporter.stage("validation_prompt_encoding", "Encoding validation prompts") as stage:
            embeddings: dict[str, dict[str, Tensor]] = {}
            for number, prompt in enumerate(prompts):
                self._requests.raise_if_ended()
                key = cache_key("prompt", fingerprint, "", prompt.encode())
                if store.missing([key]):
                    store.put({key: encoder.encode_prompt(prompt)})
                embeddings[prompt] = {name: value.clone() for name, value in store.get([key])[0].items()}
                stage.advance(number + 1, len(prompts))
        return TextSource(store, fingerprint), embeddings

    def _encode_latents(self, manifests: dict[str, Manifest]) -> dict[str, LatentSource]:
        fingerprint = self._family.picture_fingerprint()
        encoder = _LazyPictures(self._family, fingerprint, self._device, self._memory)
        sources: dict[str, LatentSource] = {}
        with self._reporter.stage("init_vae_cache", "Caching latents") as stage:
            stores = {entry.id: CacheStore(Path(entry.cache_dir_vae)) for entry in self._config.picture_datasets}
            for name, manifest in manifests.items():
                dropped: dict[int, str] = {}
                fingerprints: list[str] = []
                for part in (manifest, *manifest.mates):
                    chosen = self._mask_encoder(part.dataset) if part.kind == MASK else encoder
                    prepared = encode_latents(
                        part,
                        stores[part.dataset.id],
                        chosen,
                        watch=StageWatch(stage, self._requests),
                        write_batch_size=self._config.data.write_batch_size,
                        rank=self._ranks.rank,
                        world_size=self._ranks.count,
                    )
                    prepared = prepared.merged(self._ranks.gather(prepared))
                    check_dropped(part, prepared.dropped)
                    self._report(part.dataset.id, _PLURALS.get(part.kind, part.kind), prepared)
                    fingerprints.append(chosen.fingerprint)
                    dropped |= prepared.dropped
                kept = manifest.without(dropped)
                parts = zip((kept, *kept.mates), fingerprints, strict=True)
                own, *mates = [LatentSource(part, stores[part.dataset.id], name) for part, name in parts]
                sources[name] = replace(own, mates=tuple(mates))
        return sources

    def _encode_library(self) -> list[Reference]:
        """Beside the latents of the first dataset, in its cache."""
        flavour = self._family.spec.flavours[self._config.model.model_flavour]
        prompts = [prompt for prompt in plan_prompts(self._config.validation) if prompt.images]
        if not flavour.edits_references or not prompts:
            return []
        encoder = _LazyPictures(self._family, self._family.picture_fingerprint(), self._device, self._memory)
        store = CacheStore(Path(self._config.image_datasets[0].cache_dir_vae))
        return [prompt_reference(prompt, flavour.reference_sizes, encoder, store) for prompt in prompts]

    def _mask_encoder(self, entry: PictureDataset) -> LatentEncoder:
        is_segmentation = isinstance(entry, ConditioningDataset) and entry.conditioning_type == "segmentation"
        return MaskEncoder(self._family.spec.latent.stride, is_segmentation=is_segmentation)

    def _report(self, dataset_id: str, kind: str, prepared: Prepared) -> None:
        message = f"{dataset_id}: {prepared.encoded} {kind} encoded, {prepared.reused} reused"
        counts: dict[str, Any] = {
            "encoded": prepared.encoded,
            "reused": prepared.reused,
            "kind": kind,
            "id": dataset_id,
        }
        self._reporter.notify("cache_report", message, **counts)
        for fault in prepared.dropped.values():
            self._reporter.warn("unreadable", fault, hint="It is left out of this run.", id=dataset_id)
        if prepared.rebuilt:
            message = f"{dataset_id}: {len(prepared.rebuilt)} damaged cache entries were made anew."
            self._reporter.warn("cache_entry_rebuilt", message, keys=prepared.rebuilt)


class _LazyCaptions:
    """Loads the text encoders when something has to be encoded: a full cache needs none."""

    def __init__(self, family: Family, fingerprint: str, device: torch.device, memory: MemoryPlan) -> None:
        self.fingerprint = fingerprint
        self._load = lambda: family.load_caption_encoder(device)
        self._memory = memory
        self._encoder = None

    def encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        return self._loaded().encode(captions)

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        return self._loaded().encode_prompt(prompt)

    def _loaded(self):
        if self._encoder is None:
            self._memory.enter("text")
            self._encoder = self._load()
        return self._encoder


class _LazyPictures:
    """The same for the autoencoder."""

    def __init__(self, family: Family, fingerprint: str, device: torch.device, memory: MemoryPlan) -> None:
        self.fingerprint = fingerprint
        self._load = lambda: family.load_picture_encoder(device)
        self._memory = memory
        self._encoder = None

    def encode(self, pixels_BCHW: Tensor, keys: Sequence[str], *, sample: bool) -> list[Tensor]:
        if self._encoder is None:
            self._memory.enter("latents")
            self._encoder = self._load()
        return self._encoder.encode(pixels_BCHW, keys, sample=sample)
