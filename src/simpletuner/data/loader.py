"""Batches from the caches, in the order of the epoch plan. training.md §3.7, §10.2.

Legend: B samples, C H W latent (a reference's may be of another size), L tokens, D width of the embedding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from simpletuner.data.cache import CacheStore, CorruptEntry, Entry
from simpletuner.data.captions import choose_caption
from simpletuner.data.geometry import Size, bucket_name
from simpletuner.data.keys import below, u
from simpletuner.data.manifest import Manifest
from simpletuner.data.plan import START, EpochPlan, Group, Position
from simpletuner.data.plan import Entry as Use
from simpletuner.data.prepare import LATENTS, MASK, latent_key, text_key
from simpletuner.errors import ExitCode, UserError

CollateText = Callable[[Sequence[Entry]], dict[str, Tensor]]
"""The text entries of the samples of a batch → its tensors, first dimension B."""


@dataclass(frozen=True, slots=True)
class Members:
    """The samples of a group, those of all ranks in order."""

    samples: tuple[str, ...]
    visits: tuple[int, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One rank's share of one group."""

    latents_BCHW: Tensor
    text: dict[str, Tensor]
    samples: tuple[str, ...]
    """`<dataset id>/<path>`: with `visits` the key of every random draw of a sample."""
    visits: tuple[int, ...]
    captions: tuple[str, ...]
    """Effective captions used; empty where dropped."""
    dataset_id: str
    target: Size
    """(width, height) of the pictures in pixels."""
    position: Position
    next_position: Position
    """Where a run goes on that has used this batch."""
    references: tuple[Tensor, ...] = ()
    """Latents B×C×H×W of each reference, in the order of `conditioning_data`."""
    mask_BHW: Tensor | None = None
    """Weight of each latent in the loss."""
    is_last_micro: bool = True
    """Whether the optimizer steps after it."""
    others: Members | None = None
    """The whole group, where this rank's share is not all of it."""

    @classmethod
    def of_nobody(
        cls, latents_BCHW: Tensor, text: dict[str, Tensor], target: Size, references: tuple[Tensor, ...] = ()
    ) -> Batch:
        """Of no dataset: for rehearsals and measurements, which look at shapes alone."""
        count = len(latents_BCHW)
        return cls(
            latents_BCHW=latents_BCHW,
            text=text,
            samples=("",) * count,
            visits=(0,) * count,
            captions=("",) * count,
            dataset_id="",
            target=target,
            position=START,
            next_position=START,
            references=references,
        )

    @property
    def members(self) -> Members:
        return self.others or Members(self.samples, self.visits, self.captions)

    def to(self, device: torch.device) -> Batch:
        """On the device. Does not wait for the copy where the batch is pinned."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """For copies to a GPU that nobody waits for."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            latents_BCHW=move(self.latents_BCHW),
            text={name: move(tensor) for name, tensor in self.text.items()},
            references=tuple(map(move, self.references)),
            mask_BHW=None if self.mask_BHW is None else move(self.mask_BHW),
        )


@dataclass(frozen=True, slots=True)
class LatentSource:
    """A dataset whose latents are cached."""

    manifest: Manifest
    store: CacheStore
    fingerprint: str
    mates: tuple[LatentSource, ...] = ()
    """References and mask, in the order of `manifest.mates`."""

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """The latents CHW of the rows. Raises CorruptEntry, or UserError `cache_entry_missing`."""
        keys = [latent_key(self.manifest, row, self.fingerprint) for row in rows]
        return [entry[LATENTS] for entry in _get(self.store, keys)]

    @property
    def references(self) -> list[LatentSource]:
        return [mates for mates in self.mates if mates.manifest.kind != MASK]

    @property
    def mask(self) -> LatentSource | None:
        return next((mates for mates in self.mates if mates.manifest.kind == MASK), None)


@dataclass(frozen=True, slots=True)
class TextSource:
    """Where the embeddings of all captions are, the empty one too."""

    store: CacheStore
    fingerprint: str


def collate_prompts(entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Pads `prompt_embeds` (L, D) with zeros to the longest of the batch and adds `prompt_mask` (B, L), true on tokens.

    Other tensors are stacked; they must be of one shape.
    """
    batch = {name: torch.stack([entry[name] for entry in entries]) for name in entries[0] if name != "prompt_embeds"}
    if "prompt_embeds" in entries[0]:
        embeds_LD = [entry["prompt_embeds"] for entry in entries]
        lengths = torch.tensor([len(embeds) for embeds in embeds_LD])
        batch["prompt_embeds"] = torch.nn.utils.rnn.pad_sequence(embeds_LD, batch_first=True)
        batch["prompt_mask"] = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    return batch


class BatchReader:
    """Makes a batch of any uses of a dataset's samples. Nothing is decoded: cached tensors are stacked."""

    def __init__(
        self,
        latents: Mapping[str, LatentSource],
        text: TextSource,
        *,
        seed: int,
        collate_text: CollateText = collate_prompts,
        pin_memory: bool = False,
        combined: bool = False,
        mask_probability: float = 1.0,
    ) -> None:
        """`latents` by dataset id; `combined`: all references of a sample, not one a visit."""
        self._combined = combined
        self._mask_probability = mask_probability
        self._latents = latents
        self._text = text
        self._seed = seed
        self._collate_text = collate_text
        self._pin_memory = pin_memory

    def read(self, group: Group, uses: Sequence[Use], *, held_out: bool = False) -> Batch:
        """The batch of `uses`, all of the group's dataset and bucket. `held_out`: all references, every mask.

        Raises CorruptEntry, or UserError `cache_entry_missing`.
        """
        source = self._latents[group.dataset_id]
        own = self.members(group, uses)
        rows = [use.sample for use in uses]
        texts = _get(self._text.store, [text_key(caption, self._text.fingerprint) for caption in own.captions])
        chosen = None if self._combined or held_out else self._chosen_references(group, source, uses)
        batch = Batch(
            latents_BCHW=torch.stack(source.read(rows)),
            text=self._collate_text(texts),
            references=_references(source, rows, chosen),
            mask_BHW=self._mask(source, uses, own.samples, held_out=held_out),
            samples=own.samples,
            visits=own.visits,
            captions=own.captions,
            dataset_id=group.dataset_id,
            target=(group.bucket[0], group.bucket[1]),
            position=group.position,
            next_position=group.next_position,
        )
        return batch.pinned() if self._pin_memory else batch

    def members(self, group: Group, uses: Sequence[Use]) -> Members:
        """Who the uses of a group are; nothing is read."""
        manifest = self._latents[group.dataset_id].manifest
        samples = tuple(manifest.sample(use.sample) for use in uses)
        captions = tuple(self._caption(manifest, use, sample) for use, sample in zip(uses, samples, strict=True))
        return Members(samples, tuple(use.visit for use in uses), captions)

    def others(self, group: Group, without: AbstractSet[str]) -> list[int]:
        """Samples of the group's bucket that are not in `without`."""
        manifest = self._latents[group.dataset_id].manifest
        members = manifest.buckets()[group.bucket].tolist()
        return [row for row in members if manifest.sample(row) not in without]

    def _chosen_references(self, group: Group, source: LatentSource, uses: Sequence[Use]) -> list[int] | None:
        """Of several sets the one that each visit uses. Where sets differ in size, a group's first visit speaks for
        all of it: one micro-batch has one shape, whatever the ranks."""
        references = source.references
        if len(references) < 2:
            return None
        targets = {_size(mates, uses[0].sample) for mates in references}
        deciding = uses if len(targets) == 1 else [group.entries[0]] * len(uses)
        names = [source.manifest.sample(use.sample) for use in deciding]
        return [
            below(len(references), "cond", self._seed, name, use.visit)
            for name, use in zip(names, deciding, strict=True)
        ]

    def _mask(
        self, source: LatentSource, uses: Sequence[Use], samples: Sequence[str], *, held_out: bool
    ) -> Tensor | None:
        if source.mask is None:
            return None
        masks = [mask_1HW[0] for mask_1HW in source.mask.read([use.sample for use in uses])]
        for place, (use, sample) in enumerate(zip(uses, samples, strict=True)):
            if not held_out and u("mask", self._seed, sample, use.visit) >= self._mask_probability:
                masks[place] = torch.ones_like(masks[place])
        return torch.stack(masks)

    def _caption(self, manifest: Manifest, use: Use, sample: str) -> str:
        variants = manifest.captions.of(use.sample)
        dropout = manifest.dataset.caption_dropout_probability
        choice = choose_caption(len(variants), dropout, seed=self._seed, sample=sample, visit=use.visit)
        return "" if choice.is_dropped else manifest.captions.texts[variants[choice.variant]]


def _size(mates: LatentSource, row: int) -> Size | None:
    return mates.manifest.target(row)


def _references(source: LatentSource, rows: Sequence[int], chosen: Sequence[int] | None) -> tuple[Tensor, ...]:
    """All references, or of each row the chosen one."""
    if chosen is None:
        return tuple(torch.stack(mates.read(rows)) for mates in source.references)
    sets = source.references
    return (torch.stack([sets[which].read([row])[0] for row, which in zip(rows, chosen, strict=True)]),)


def _get(store: CacheStore, keys: Sequence[str]) -> list[Entry]:
    try:
        return store.get(keys)
    except KeyError as error:
        raise UserError(
            "cache_entry_missing",
            f"The cache {store.root} has lost the entry {error.args[0]}.",
            hint="Start the run again: what is missing is encoded before training.",
            exit_code=ExitCode.DATA,
        ) from error


class Made(NamedTuple):
    group: Group
    batch: Batch


class Loader:
    """This rank's batches from a position on, without end.

    One worker thread makes them, `prefetch` batches ahead (0: when asked for): the batches are the same. A failure in
    the worker is raised by the next call, also while good batches are waiting.
    """

    def __init__(
        self,
        plan: EpochPlan,
        reader: BatchReader,
        *,
        position: Position = START,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 10,
        without: AbstractSet[str] = frozenset(),
    ) -> None:
        """`position` lies between optimizer steps: the first batch is the first of `accumulation` micro-batches.

        `without`: samples that others of their group stand in for; it may grow while batches are made ahead.
        """
        self._without = without
        self._groups = plan.walk(position)
        self._reader = reader
        self._accumulation = accumulation
        self._rank = rank
        self._world_size = world_size
        self._num_ahead = prefetch
        self._num_made = 0
        self._worker = ThreadPoolExecutor(1, "loader")
        self._waiting: deque[Future[Made]] = deque()
        self._ready: deque[Made] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises UserError `loader_failed` (70; 65 where the data is at fault), its cause the worker's own error."""
        while len(self._waiting) + len(self._ready) <= self._num_ahead:
            self._waiting.append(self._worker.submit(self._make))
        while self._waiting and (not self._ready or self._waiting[0].done()):
            if error := self._waiting[0].exception():  # waits for it; a failed one stays first in line
                raise _failure(error) from error
            self._ready.append(self._waiting.popleft().result())
        made = self._ready.popleft()
        return made.batch if self._without.isdisjoint(made.batch.members.samples) else self._stand_in(made)

    def close(self) -> None:
        """Ends the worker, after the batch it is making."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> Made:
        group = next(self._groups)
        self._num_made += 1
        return Made(group, self._read(group, is_last_micro=self._num_made % self._accumulation == 0))

    def _read(self, group: Group, *, is_last_micro: bool) -> Batch:
        """This rank's share."""
        batch = self._reader.read(group, group.of_rank(self._rank, self._world_size))
        others = None if self._world_size == 1 else self._reader.members(group, group.entries)
        return replace(batch, is_last_micro=is_last_micro, others=others)

    def _stand_in(self, made: Made) -> Batch:
        """The batch with healthy samples of its group, else of its bucket, in the places of those left out.

        Chosen for the whole group, so that all ranks choose alike.
        """
        uses = made.group.entries
        is_out = [sample in self._without for sample in made.batch.members.samples]
        healthy = [use.sample for use, out in zip(uses, is_out, strict=True) if not out]
        healthy = healthy or self._reader.others(made.group, self._without)
        if not healthy:
            raise UserError(
                "data_defects",
                f"Every picture of dataset {made.group.dataset_id!r} in the bucket {bucket_name(made.group.bucket)} "
                "had to be left out.",
                hint="Look at the pictures that the warnings name.",
                exit_code=ExitCode.DATA,
            )
        spare = cycle(healthy)
        chosen = tuple(Use(next(spare), use.visit) if out else use for use, out in zip(uses, is_out, strict=True))
        return self._read(replace(made.group, entries=chosen), is_last_micro=made.batch.is_last_micro)


def _failure(error: BaseException) -> UserError:
    if isinstance(error, CorruptEntry):
        hint = "Start the run again: the damaged entry is encoded anew before training."
        return UserError(
            "loader_failed", f"The next batch cannot be made: {error}.", hint=hint, exit_code=ExitCode.DATA
        )
    is_data = isinstance(error, UserError) and error.exit_code is ExitCode.DATA
    return UserError(
        "loader_failed",
        f"The next batch cannot be made: {error or type(error).__name__}",
        hint=error.hint if isinstance(error, UserError) else "This is a bug; please report it with its traceback.",
        exit_code=ExitCode.DATA if is_data else ExitCode.BUG,
    )
