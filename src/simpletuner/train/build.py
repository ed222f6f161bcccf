"""Puts a run together from its job directory, part by part."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.checkpoints import remove_temporary
from simpletuner.config.prompt import plan_pictures, plan_prompts
from simpletuner.config.sources import written_options
from simpletuner.config.train_config import TrainConfig
from simpletuner.data.loader import Loader
from simpletuner.diffusion.flow import FlowObjective
from simpletuner.diffusion.loss import Loss
from simpletuner.diffusion.objective import DiffusionObjective, Objective
from simpletuner.families.base import Family, build_family
from simpletuner.families.registry import load_spec
from simpletuner.families.weights import autocast_dtype, check_base
from simpletuner.job import JobDir
from simpletuner.train.budget import CHOICE, BudgetPlanner
from simpletuner.train.checkpoint import (
    ResumePoint,
    check_resume,
    find_resume_point,
    load_checkpoint,
    run_facts,
)
from simpletuner.train.disk import DiskWatch, make_output_dir
from simpletuner.train.due import Due, total_steps
from simpletuner.train.external_validation import ExternalValidation
from simpletuner.train.heldout import HeldOut
from simpletuner.train.hooks import Hooks
from simpletuner.train.inputs import Inputs, Preparation
from simpletuner.train.inspection import Inspection
from simpletuner.train.kernel_choice import KERNEL_ORDER, choose_kernels
from simpletuner.train.lead import Between, Follower, Lead, Speaker
from simpletuner.train.lock import begin_lock
from simpletuner.train.loop import Run
from simpletuner.train.memory import MemoryPlan
from simpletuner.train.metrics import Metrics, keep_metrics_until
from simpletuner.train.model_card import ModelCard
from simpletuner.train.prepared import Prepared, prepare
from simpletuner.train.preview import build_previews
from simpletuner.train.publish import Publisher
from simpletuner.train.ranks import ALONE, Ranks
from simpletuner.train.references import Reference
from simpletuner.train.replica import Replica
from simpletuner.train.report import Reporter
from simpletuner.train.requests import RequestReader
from simpletuner.train.saver import CheckpointSaver
from simpletuner.train.sentinel import Sentinel, Used
from simpletuner.train.state import TrainState, seed_generators
from simpletuner.train.tracker import Trackers
from simpletuner.train.trained import Trained
from simpletuner.train.update import Update
from simpletuner.train.validation import Validation


@dataclass(slots=True)
class Built(Replica):
    """The first rank's, or that of the only one, and what is needed at its end."""

    inspection: Inspection
    metrics: Metrics
    trackers: Trackers
    memory: MemoryPlan
    resumed_from: str | None
    final_epoch: int
    started_at: float
    """When the caches were full, on the monotonic clock."""

    def close(self) -> None:
        self.inspection.close()
        self.loader.close()
        self.metrics.close()
        self.trackers.close()


def build_run(job: JobDir, reporter: Reporter, requests: RequestReader) -> Built:
    """Fills the caches and puts the run together, up to its first step. Raises UserError and Ended."""
    return _prepare(job, reporter, requests, ALONE).build()


def build_rank(
    job: JobDir, reporter: Reporter, requests: RequestReader, ranks: Ranks
) -> Built | tuple[Replica, Follower]:
    """The same for one rank of several. All but the first have a muted `reporter`."""
    builder = _prepare(job, reporter, requests, ranks)
    return builder.build() if ranks.is_main else builder.build_follower()


def _prepare(job: JobDir, reporter: Reporter, requests: RequestReader, ranks: Ranks) -> _Builder:
    spec = job.read_spec()
    frozen = job.read_config()
    family_spec = load_spec(frozen["config"]["model_family"])
    config = TrainConfig.from_flat(frozen["config"], job.read_datasets(), family_spec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_base(config, device)
    torch.set_flush_denormal(True)
    assert config.run.seed is not None
    seed_generators(config.run.seed)
    asked = config.checkpoint.resume_from_checkpoint
    own_job = spec.job_id if spec.continues else None
    output_dir = Path(spec.output_dir)
    make_output_dir(output_dir)
    point = ranks.share(find_resume_point(asked, output_dir, reporter, own_job=own_job) if ranks.is_main else None)
    texts: list[str] = []
    if ranks.is_main:
        texts = [prompt.text for prompt in plan_prompts(config.validation)]
        texts.append(config.validation.validation_negative_prompt)
    family = build_family(config, family_spec)
    preparation = Preparation(config, family, reporter, requests, device, ranks)
    manifests = preparation.discover(job.artifacts, None if spec.continues else datetime.fromisoformat(spec.created_at))
    written = written_options(frozen["provenance"])
    planner = BudgetPlanner(config, family_spec, manifests, device, ranks, reporter, written)
    config, manifests, memory = planner.plan(point)
    if memory.choice:
        family = build_family(config, family_spec)
        preparation = Preparation(config, family, reporter, requests, device, ranks)
    reporter.predicted_bytes = memory.predicted_bytes()
    kernels = choose_kernels(config, family_spec, manifests, device, ranks, reporter, point)
    inputs = preparation.encode(manifests, texts, memory)
    return _Builder(config, family, inputs, job, reporter, requests, device, memory, ranks, point, kernels)


class _Builder:
    """Holds what the parts share while they are put together."""

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        inputs: Inputs,
        job: JobDir,
        reporter: Reporter,
        requests: RequestReader,
        device: torch.device,
        memory: MemoryPlan,
        ranks: Ranks,
        point: ResumePoint | None,
        kernels: tuple[str, ...] | None,
    ) -> None:
        self._point = point
        self._config = config
        self._ranks = ranks
        self._spec = job.read_spec()
        self._job = job
        self._memory = memory
        self._family = family
        self._inputs = inputs
        self._output_dir = Path(self._spec.output_dir)
        self._reporter = reporter
        self._requests = requests
        self._device = device
        self._seed = config.run.seed or 0
        self._accumulation = config.run.gradient_accumulation_steps
        self._plan = inputs.plan(self._seed)
        self._total = total_steps(config, self._plan)
        self._kernels = kernels

    def build(self) -> Built:
        started_at = time.monotonic()
        config, reporter, ranks = self._config, self._reporter, self._ranks
        point = ranks.share(self._checked_point())
        remove_temporary(self._output_dir)
        denoiser = self._load()
        with reporter.stage("init_prepare_models", "Preparing the model"):
            prepared = self._prepare(denoiser)
            trained, update, _ = prepared
            file = self._output_dir / "training_metrics.jsonl"
            keep_metrics_until(file, point.state.step if point else 0)
            trackers = Trackers(config.publishing, self._output_dir, config.without_secrets(), reporter)
            state = point.state if point else TrainState()
            self._sentinel = Sentinel(
                state.quarantine, reporter, lambda name: self._job.artifacts / f"ledger-{name}.jsonl", self._timesteps,
                action=config.checkpoint.nonfinite_action, adapter=trained.adapter_name,
                in_parts=config.optimizer.optimizer_release_gradients,
            )  # fmt: skip
            metrics = Metrics(reporter.emit, file, self._total, self._device, self._sentinel.see, trackers.log)
            saver = CheckpointSaver(
                self._output_dir, config.checkpoint.checkpoints_total_limit, self._facts(), reporter, point
            )
            inspection = self._build_inspection(prepared, saver, metrics)
        if config.validation.disable_benchmark:
            reporter.skip_stage("benchmark_base_model", "Drawing the base model")
        else:
            inspection.benchmark(config.model.pretrained_model_name_or_path)
            inspection.release()
        self._resume(point, trained, update)
        reporter.notify("memory_plan", str(self._memory), **self._memory.as_facts())
        speaker = Speaker(metrics, self._requests, state, inspection.due, ranks)
        replica = self._replica(denoiser, trained, update, state, speaker, inspection)
        final_epoch = self._plan.position_after(self._total * self._accumulation).epoch
        begin_lock(self._job, config, self._inputs, self._device, resumed=point is not None)
        return Built(
            replica.run, trained, replica.loader, replica.make_loader, replica.resume,
            inspection, metrics, trackers, self._memory, point.folder.name if point else None, final_epoch, started_at,
        )  # fmt: skip

    def build_follower(self) -> tuple[Replica, Follower]:
        point = self._ranks.share(None)
        denoiser = self._load()
        prepared = self._prepare(denoiser)
        trained, update, _ = prepared
        state = point.state if point else TrainState()
        if not self._config.validation.disable_benchmark:
            prepared.attend()
        self._resume(point, trained, update)
        follower = Follower(state, Due.from_config(self._config, self._total), self._ranks, prepared.attend)
        return self._replica(denoiser, trained, update, state, follower, follower), follower

    def _checked_point(self) -> ResumePoint | None:
        point = self._point
        if point is not None and not check_resume(point, self._facts(), self._config, self._reporter):
            point.state.position = self._plan.position_after(point.state.samples // self._plan.group_size)
        return point

    def _facts(self) -> dict[str, Any]:
        facts = run_facts(self._config, self._inputs.fingerprint(), self._spec.job_id, self._ranks.count)
        if self._memory.budget_bytes is not None:
            facts[CHOICE] = self._memory.choice
        if self._kernels is not None:
            facts[KERNEL_ORDER] = list(self._kernels)
        return facts

    def _load(self) -> nn.Module:
        with self._reporter.stage("init_load_base_model", "Loading the model"):
            return self._family.load_denoiser().to(self._device)

    def _prepare(self, denoiser: nn.Module) -> Prepared:
        return prepare(
            denoiser, self._config, self._family, self._total, device=self._device, ranks=self._ranks,
            reporter=self._reporter, probe=self._probe, kernels=self._kernels,
        )  # fmt: skip

    def _objective(self) -> Objective:
        spec = self._family.spec
        if spec.objective == "flow":
            scheduler, options = self._family.scheduler_config(), self._config
            return FlowObjective(scheduler, options.loss, options.flux, seed=self._seed, patch=spec.latent.patch)
        prediction = self._config.model.prediction_type
        assert prediction != "flow_matching"
        return DiffusionObjective(
            self._family.scheduler_config(),
            self._config.loss,
            seed=self._seed,
            samples_per_step=self._plan.group_size * self._accumulation,
            prediction_type=prediction,
        )

    def _build_inspection(self, prepared: Prepared, saver: CheckpointSaver, metrics: Metrics) -> Inspection:
        config, trained = self._config, prepared.trained
        hooks = Hooks(config, self._reporter, self._requests.asked_to_end)
        card = ModelCard(config, self._family.spec, trained.adapter_name)
        references = self._references()
        own = len(self._inputs.library)
        pictures = plan_pictures(config, plan_prompts(config.validation), len(references) - own)
        validation = Validation(
            config.validation, pictures, self._inputs.prompts, self._output_dir, self._reporter, references,
            build_previews(config, self._family, self._inputs, self._device, self._reporter),
        )  # fmt: skip
        return Inspection(
            family=self._family,
            trained=trained,
            update=prepared.update,
            validation=validation,
            held_out=[] if config.validation.eval_loss_disable else self._build_held_out(),
            saver=saver,
            hooks=hooks,
            publisher=Publisher(self._job, config, card, hooks, self._reporter, self._requests.asked_to_end),
            disk=DiskWatch(config.checkpoint, self._output_dir, self._reporter, self._requests.asked_to_end, hooks),
            external=ExternalValidation(config.validation, hooks, self._reporter),
            metrics=metrics,
            sentinel=self._sentinel,
            reporter=self._reporter,
            due=Due.from_config(config, self._total),
            output_dir=self._output_dir,
            device=self._device,
            ranks=self._ranks,
            ema_mode=config.precision.ema_validation,
            release=prepared.release,
        )

    def _references(self) -> list[Reference]:
        """What an edit family draws on: the first pictures of `eval_dataset_id`, else of the first dataset."""
        config = self._config
        if not self._family.spec.flavours[config.model.model_flavour].edits_references:
            return []
        name = config.validation.eval_dataset_id or config.image_datasets[0].id
        return self._inputs.validation_references(name, config.validation.num_eval_images)

    def _build_held_out(self) -> list[HeldOut]:
        # Held-out captions are never dropped: the loss is of the pictures as they are described.
        reader = self._inputs.reader(self._family, self._seed, pin_memory=False)
        objective, loss = self._objective(), Loss(self._config.loss)
        size = self._config.run.train_batch_size
        return [
            HeldOut(
                entry.id,
                lambda name=entry.id: [
                    batch.to(self._device) for batch in self._inputs.held_out_batches(name, reader, size)
                ],
                objective,
                loss,
                self._family.predict,
                self._config.validation.eval_timesteps,
            )
            for entry in self._config.eval_datasets
        ]

    def _resume(self, point: ResumePoint | None, trained: Trained, update: Update) -> None:
        if point is None:
            self._reporter.skip_stage("init_resume_checkpoint", "Resuming")
            # Again, so that training starts alike whatever had to be encoded or loaded before.
            seed_generators(self._seed + self._ranks.rank)
        else:
            with self._reporter.stage("init_resume_checkpoint", "Resuming"):
                self._go_back(trained, update, point)
        self._ranks.copy_from_main([buffer.weights for buffer in update.buffers if not buffer.is_sharded])

    def _go_back(self, trained: Trained, update: Update, point: ResumePoint) -> None:
        rank = self._ranks.rank
        load_checkpoint(point, trained, update, self._device, rank=rank, seed=self._seed + rank)

    def _make_loader(self, state: TrainState) -> Loader:
        data = self._config.data
        return Loader(
            self._plan,
            self._inputs.reader(self._family, self._seed, pin_memory=self._device.type == "cuda"),
            position=state.position,
            accumulation=self._accumulation,
            rank=self._ranks.rank,
            world_size=self._ranks.count,
            prefetch=data.dataloader_prefetch_qlen if data.dataloader_prefetch else 0,
            without=state.quarantine.names,
        )

    def _replica(
        self, denoiser: nn.Module, trained: Trained, update: Update, state: TrainState, lead: Lead, between: Between
    ) -> Replica:
        config = self._config
        make_loader = partial(self._make_loader, state)
        loader = make_loader()
        run = Run(
            batches=loader,
            family=self._family,
            denoiser=denoiser,
            objective=self._objective(),
            loss=Loss(config.loss),
            update=update,
            state=state,
            lead=lead,
            due=Due.from_config(config, self._total),
            between=between,
            ranks=self._ranks,
            accumulation=self._accumulation,
            autocast=autocast_dtype(config),
        )
        return Replica(run, trained, loader, make_loader, partial(self._go_back, trained, update))

    def _timesteps(self, used: Used, step: int) -> Tensor:
        visits = list(zip(used.members.samples, used.members.visits, strict=True))
        return self._objective().timesteps(used.shape, visits, step=step, first=used.first)

    def _probe(self, denoiser: nn.Module) -> Tensor:
        """One forward pass on the first batch of the plan, with fixed noise."""
        reader = self._inputs.reader(self._family, self._seed, pin_memory=False)
        group = next(self._plan.walk())
        batch = reader.read(group, group.entries[:1]).to(self._device)
        noise = torch.randn(batch.latents_BCHW.shape, generator=torch.Generator().manual_seed(0)).to(self._device)
        t_B = torch.full((1,), 500, device=self._device)
        return self._family.predict(denoiser, noise, t_B, batch)
