"""Puts a run together from its job directory, part by part."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.checkpoints import remove_temporary
from simpletuner.config.prompt import plan_pictures, plan_prompts
from simpletuner.config.train_config import TrainConfig
from simpletuner.data.loader import Loader
from simpletuner.data.plan import EpochPlan, check_full_batch
from simpletuner.diffusion.flow import FlowObjective
from simpletuner.diffusion.loss import Loss
from simpletuner.diffusion.objective import DiffusionObjective, Objective
from simpletuner.families.base import Family, build_family
from simpletuner.families.registry import load_spec
from simpletuner.families.weights import autocast_dtype, check_base
from simpletuner.job import JobDir
from simpletuner.train.buffer import build_buffers
from simpletuner.train.checkpoint import (
    CheckpointSaver,
    ResumePoint,
    check_resume,
    find_resume_point,
    load_checkpoint,
    run_facts,
)
from simpletuner.train.disk import DiskWatch, make_output_dir
from simpletuner.train.due import Due
from simpletuner.train.ema import Ema
from simpletuner.train.external_validation import ExternalValidation
from simpletuner.train.heldout import HeldOut
from simpletuner.train.hooks import Hooks
from simpletuner.train.inputs import Inputs, Preparation
from simpletuner.train.inspection import Inspection
from simpletuner.train.lock import begin_lock
from simpletuner.train.loop import Run
from simpletuner.train.memory import MemoryPlan
from simpletuner.train.metrics import Metrics, keep_metrics_until
from simpletuner.train.model_card import ModelCard
from simpletuner.train.optim import build_optimizers
from simpletuner.train.preview import build_previews
from simpletuner.train.publish import Publisher
from simpletuner.train.references import Reference
from simpletuner.train.rehearsal import plan_memory
from simpletuner.train.report import Reporter
from simpletuner.train.requests import RequestReader
from simpletuner.train.sentinel import Sentinel
from simpletuner.train.state import TrainState, seed_generators
from simpletuner.train.tracker import Trackers
from simpletuner.train.trained import AdapterWeights, FullWeights, Trained, load_adapter_file, prepare_denoiser
from simpletuner.train.update import Update
from simpletuner.train.validation import Validation


@dataclass(slots=True)
class Built:
    """A run that is ready to step, and what is needed at its end."""

    run: Run
    inspection: Inspection
    loader: Loader
    make_loader: Callable[[], Loader]
    """A new one, from the state's position on."""
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
    spec = job.read_spec()
    values = job.read_config()["config"]
    family_spec = load_spec(values["model_family"])
    config = TrainConfig.from_flat(values, job.read_datasets(), family_spec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_base(config, device)
    torch.set_flush_denormal(True)
    assert config.run.seed is not None
    seed_generators(config.run.seed)
    make_output_dir(Path(spec.output_dir))
    family = build_family(config, family_spec)
    prompts = plan_prompts(config.validation)
    texts = [prompt.text for prompt in prompts] + [config.validation.validation_negative_prompt]
    preparation = Preparation(config, family, reporter, requests, device)
    manifests = preparation.discover(job.artifacts)
    memory = plan_memory(config, family_spec, manifests, device)
    reporter.predicted_bytes = memory.predicted_bytes()
    inputs = preparation.encode(manifests, texts, memory)
    built = _Builder(config, family, inputs, job, reporter, requests, device, memory).build()
    begin_lock(job, config, inputs, device, resumed=built.resumed_from is not None)
    return built


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
    ) -> None:
        self._config = config
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

    def build(self) -> Built:
        started_at = time.monotonic()
        config, reporter = self._config, self._reporter
        plan = self._inputs.plan(self._seed)
        total = total_steps(config, plan)
        facts = run_facts(config, self._inputs.fingerprint(), self._spec.job_id)
        point = find_resume_point(
            config.checkpoint.resume_from_checkpoint,
            self._output_dir,
            reporter,
            own_job=self._spec.job_id if self._spec.continues else None,
        )
        if point is not None and not check_resume(point, facts, config, reporter):
            point.state.position = plan.position_after(point.state.samples // plan.group_size)
        remove_temporary(self._output_dir)
        with reporter.stage("init_load_base_model", "Loading the model"):
            denoiser = self._family.load_denoiser().to(self._device)
        with reporter.stage("init_prepare_models", "Preparing the model"):
            trained = self._prepare(denoiser)
            update = self._build_update(denoiser, total)
            file = self._output_dir / "training_metrics.jsonl"
            keep_metrics_until(file, point.state.step if point else 0)
            trackers = Trackers(config.publishing, self._output_dir, config.without_secrets(), reporter)
            state = point.state if point else TrainState()
            self._sentinel = Sentinel(
                state.quarantine, reporter, lambda name: self._job.artifacts / f"ledger-{name}.jsonl",
                action=config.checkpoint.nonfinite_action, adapter=trained.adapter_name,
            )  # fmt: skip
            metrics = Metrics(reporter.emit, file, total, self._device, self._sentinel.see, trackers.log)
            saver = CheckpointSaver(self._output_dir, config.checkpoint.checkpoints_total_limit, facts, reporter, point)
            inspection = self._build_inspection(trained, update, saver, metrics, total)
        if config.validation.disable_benchmark:
            reporter.skip_stage("benchmark_base_model", "Drawing the base model")
        else:
            inspection.benchmark(config.model.pretrained_model_name_or_path)
        self._resume(point, trained, update)
        reporter.notify("memory_plan", str(self._memory), **self._memory.as_facts())
        make_loader = partial(self._make_loader, plan, state)
        loader = make_loader()
        run = self._build_run(denoiser, update, state, metrics, inspection, loader)
        final_epoch = plan.position_after(total * self._accumulation).epoch
        return Built(
            run, inspection, loader, make_loader, metrics, trackers, self._memory, point.folder.name if point else None,
            final_epoch, started_at,
        )  # fmt: skip

    def _prepare(self, denoiser: nn.Module) -> Trained:
        """Choose what is trained."""
        config = self._config
        # Again, so that an adapter begins alike whatever had to be encoded before.
        seed_generators(self._seed)
        adapter = prepare_denoiser(denoiser, config, self._family.spec)
        if adapter is None:
            return FullWeights(self._family, denoiser, self._probe)
        if config.adapter.init_lora:
            load_adapter_file(adapter, config.adapter.init_lora)
        trained = AdapterWeights(denoiser, adapter, self._family.spec.name)
        self._reporter.notify("adapter_attached", f"{trained.adapter_name}.", **adapter.facts())
        return trained

    def _build_update(self, denoiser: nn.Module, total: int) -> Update:
        config = self._config
        buffers = build_buffers(denoiser)
        ema = Ema(buffers, config.precision.ema_decay) if config.precision.use_ema else None
        optimizers = build_optimizers(config.optimizer.optimizer, buffers, self._seed)
        keeps = config.model.model_type == "lora"
        return Update(buffers, optimizers, config.optimizer, total, ema, keeps_weights=keeps)

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
            samples_per_step=self._config.run.train_batch_size * self._accumulation,
            prediction_type=prediction,
        )

    def _build_inspection(
        self, trained: Trained, update: Update, saver: CheckpointSaver, metrics: Metrics, total: int
    ) -> Inspection:
        config = self._config
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
            update=update,
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
            due=Due.from_config(config, total),
            output_dir=self._output_dir,
            device=self._device,
            ema_mode=config.precision.ema_validation,
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
            seed_generators(self._seed)
            return
        with self._reporter.stage("init_resume_checkpoint", "Resuming"):
            load_checkpoint(point, trained, update, self._device)

    def _make_loader(self, plan: EpochPlan, state: TrainState) -> Loader:
        data = self._config.data
        return Loader(
            plan,
            self._inputs.reader(self._family, self._seed, pin_memory=self._device.type == "cuda"),
            position=state.position,
            accumulation=self._accumulation,
            prefetch=data.dataloader_prefetch_qlen if data.dataloader_prefetch else 0,
            without=state.quarantine.names,
        )

    def _build_run(
        self,
        denoiser: nn.Module,
        update: Update,
        state: TrainState,
        metrics: Metrics,
        inspection: Inspection,
        loader: Loader,
    ) -> Run:
        config = self._config
        return Run(
            batches=loader,
            family=self._family,
            denoiser=denoiser,
            objective=self._objective(),
            loss=Loss(config.loss),
            update=update,
            state=state,
            metrics=metrics,
            requests=self._requests,
            due=inspection.due,
            inspection=inspection,
            accumulation=self._accumulation,
            autocast=autocast_dtype(config),
        )

    def _probe(self, denoiser: nn.Module) -> Tensor:
        """One forward pass on the first batch of the plan, with fixed noise."""
        reader = self._inputs.reader(self._family, self._seed, pin_memory=False)
        group = next(iter(self._inputs.plan(self._seed).walk()))
        batch = reader.read(group, group.entries[:1]).to(self._device)
        noise = torch.randn(batch.latents_BCHW.shape, generator=torch.Generator().manual_seed(0)).to(self._device)
        t_B = torch.full((1,), 500, device=self._device)
        return self._family.predict(denoiser, noise, t_B, batch)


def total_steps(config: TrainConfig, plan: EpochPlan) -> int:
    """`max_train_steps`, or the steps that hold every group of `num_train_epochs`."""
    if config.run.max_train_steps:
        return config.run.max_train_steps
    check_full_batch(plan, config.run.num_train_epochs)
    return math.ceil(plan.groups_before(config.run.num_train_epochs) / config.run.gradient_accumulation_steps)
