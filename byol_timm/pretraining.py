"""`pretrain`: from settings to a trained encoder, top to bottom."""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from .augment import TwoViews
from .byol import BYOL, HEALTH, target_decay
from .cache import open_cache
from .card import redact
from .checkpoint import (
    Checkpoint,
    CheckpointWriter,
    compare_config,
    load_checkpoint,
    load_latest,
    lock_folder,
    optimizer_tensors,
    prepare_output_dir,
    restore_optimizer,
)
from .config import PretrainConfig, data_settings, parse, to_yaml
from .data import Batch, TrainingBatches, copied_ahead, share_indices
from .decoding import BadImage
from .defaults import (
    check,
    crop_pct,
    normalization,
    output_dir,
    resolve_augmentation,
    resolve_images,
    resolve_intervals,
    resolve_training,
)
from .encoder import (
    enable_grad_checkpointing,
    encoder_width,
    freeze_parts,
    has_batch_norm,
    parse_kwargs,
    small_image_kwargs,
    statistics_held,
)
from .errors import ByolTimmError
from .fidelity import points
from .hub import check_push, fetch_encoder, fetch_training_state, load_encoder, push_encoder, save_encoder
from .interruption import Interrupted, Interruption, agree
from .launch import (
    average_batch_statistics,
    check_same,
    create_accelerator,
    exhaustion_told,
    losing_processes_told,
    on_main_process,
    prepare,
    raise_first,
)
from .metrics import CollapseAlarm, MetricsLog, effective_rank, read_metrics, write_json
from .monitor import NEIGHBOURS, Examples, LinearProbe
from .optim import create_optimizer, learning_rate
from .report import save_curves, save_report, save_views
from .shards import Stream, StreamSplits, open_stream
from .sources import Images, Splits, fingerprint, hub_id, open_dataset, warn_of_few_levels
from .streaming import StreamBatches
from .summary import banner, closing, environment, paper_lines, rehearsal

logger = logging.getLogger(__name__)
# What may differ between a run and its continuation; everything else decides what the weights become.
MAY_CHANGE = frozenset(
    "batch_size output_dir save_every log_every knn_every resume overwrite max_time on_collapse report_to "
    "push_to_hub public license push_training_state dry_run debug workers memory_limit decoded_cache "
    "on_bad_image".split()
)
# What decides the shapes of projector and predictor.
HEADS = ("hidden_dim", "projection_dim", "num_head_layers")
MANY_TINY = 0.1
# In the folder of a run: the images that others stood in for, each with the reason.
BAD_IMAGES = "bad_images.txt"
MAX_SKIPPED_STEPS = 20
# A dry run measures up to so many steps after the first, or five seconds of them.
REHEARSED_STEPS, REHEARSAL_SECONDS = 10, 5
# Figures of a step that are averaged over processes and over the steps between two lines of metrics.
FIGURES = ("loss", *HEALTH)
# What a process says in place of a signal's number, all of which are lower, when it met a failure of its own.
FAILED = 1000


def pretrain(config: PretrainConfig) -> nn.Module:
    """The encoder that BYOL trained on the images of `config`, in eval mode; the run folder holds everything else.

    Devices, mixed precision and gradient accumulation are those of `accelerate launch`. Raises `ByolTimmError` for
    whatever the user can mend, before anything slow where it can be known, and `Interrupted` when asked to stop.
    """
    check(config)
    folder = output_dir(config)
    accelerator = create_accelerator(config.report_to, folder)
    with losing_processes_told(), contextlib.ExitStack() as stack:
        stack.callback(accelerator.end_training)
        if not config.dry_run:
            on_main_process(accelerator, lambda: _claim(folder, config, stack))
        interruption = stack.enter_context(Interruption(max_minutes=config.max_time))

        # The images, the encoder that fits them, and what both leave to choose.
        with accelerator.main_process_first():
            splits = _open_stream(config) if config.streaming else open_images(config)
            settings = resolve_images(config, splits.bank.side())
            tiny = splits.bank.share_below(settings.image_size / 4)
            start = _training_state(settings)
            if start is not None:
                known = {name: start.state["config"][name] for name in HEADS if getattr(settings, name) is None}
                settings = dataclasses.replace(settings, **known)
            settings = resolve_backbone_kwargs(settings)
            encoder = initial_encoder(settings)
        forwards = accelerator.num_processes * accelerator.gradient_accumulation_steps
        settings = resolve_training(settings, encoder, len(splits.train), forwards)
        schedule = Schedule.of(settings, len(splits.train), forwards)
        settings = resolve_intervals(settings, schedule.steps_per_epoch)
        fault = "was started with other settings than process 0. Give all the same command"
        check_same(to_yaml(settings), fault)

        # The two views, both networks, the optimizer.
        stack.enter_context(exhaustion_told(settings.batch_size, settings.image_size))
        mean, std = normalization(encoder, settings.in_chans)
        views = TwoViews(resolve_augmentation(settings), settings.image_size, seed=settings.seed, mean=mean, std=std)
        frozen = freeze_parts(encoder, settings.freeze)
        byol = BYOL(
            encoder,
            hidden_dim=settings.hidden_dim,
            projection_dim=settings.projection_dim,
            num_head_layers=settings.num_head_layers,
        )
        if settings.grad_checkpointing:
            enable_grad_checkpointing(encoder)
        if start is not None:
            _start_from(start, settings, byol)
        probe = None
        if splits.test is not None and isinstance(splits, Splits):
            probe = LinearProbe(encoder_width(encoder), splits.train, accelerator.device)
        optimizer = _create_optimizer(settings, byol, schedule.peak_lr)
        if "auto" in config.backbone_kwargs:
            logger.info("--backbone_kwargs auto: %s", " ".join(settings.backbone_kwargs) or "nothing to add")
        for line in banner(settings, schedule, splits, byol, accelerator, folder, frozen):
            logger.info(line)
        if tiny > MANY_TINY:
            logger.warning(
                "%.0f %% of the images have less than a quarter of the %d pixels that they are enlarged to. Lower "
                "--image_size if they are all like that",
                100 * tiny,
                settings.image_size,
            )
        if settings.dry_run:
            picture = on_main_process(accelerator, lambda: _rehearsed_views(folder, splits.bank, views))
            _rehearse(settings, schedule, splits, views, byol, optimizer, frozen, accelerator)
            logger.info("\ndry run: nothing is kept but the views, in %s", picture)
            if settings.decoded_cache is not None:
                logger.info("images were decoded as they came; the run itself reads them from --decoded_cache")
            return encoder.eval()

        # Where training stands.
        data: dict[str, Any] = {
            "name": splits.train.name,
            "images": len(splits.train),
            "channels": splits.train.channels,
            "fingerprint": fingerprint(splits.train),
            "hub_id": hub_id(settings.dataset),
        }
        fault = f"sees other images in {settings.dataset} than process 0. Give all hosts the same files"
        check_same(data["fingerprint"], fault)
        step = 0
        saved: dict[str, Any] = {}
        if settings.resume:
            step, saved = _resume(settings, schedule, data, folder, byol, optimizer, probe)
            fault = f"finds other checkpoints in {folder} than process 0. Give all hosts one --output_dir to share"
            check_same(str(step), fault)
        if accelerator.is_main_process:
            (folder / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
            write_json(folder / "environment.json", environment(accelerator))
        accelerator.init_trackers(
            "byol_timm", config={name: str(v) for name, v in redact(dataclasses.asdict(settings)).items()}
        )

        # Devices, processes, memory layout.
        _lay_out(byol, settings, accelerator)
        group: Any = None
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            group = torch.distributed.new_group(backend="gloo")
        model, optimizer = prepare(accelerator, byol, optimizer)
        if accelerator.scaler is not None and "scaler" in saved:
            accelerator.scaler.load_state_dict(saved["scaler"])

        # What reads, watches and writes.
        decoded = _decoded(settings, splits, interruption, step)
        batches = _open_batches(settings, schedule, decoded, views, accelerator, step)
        stack.callback(batches.close)
        two_views = DeviceViews(views, accelerator.device, settings.channels_last)
        alarm = CollapseAlarm(
            opt=settings.opt,
            lr=settings.lr,
            batch_size=schedule.global_batch,
            num_rows=schedule.global_batch // accelerator.num_processes,
            batch_norm=has_batch_norm(encoder),
            color=views.augmentation.jitter > 0,
            target_decay=settings.target_decay,
        )
        held_out, evaluated = None, set()
        if accelerator.is_main_process:
            writer = stack.enter_context(CheckpointWriter(folder / "checkpoints"))
            log = stack.enter_context(
                MetricsLog(
                    folder,
                    total_steps=schedule.total_steps,
                    images_per_step=schedule.global_batch,
                    resume_step=step,
                    seconds=saved.get("seconds", 0.0),
                    tracker=accelerator.log,
                )
            )
            evaluated = {row["step"] for row in read_metrics(folder / "metrics.jsonl") if "knn" in row}
            shape = dict(mean=mean, std=std, channels_last=settings.channels_last)
            held_out = Examples.held_out(settings, splits.bank, splits.test, **shape) if splits.test else None

        def bad_images() -> list[str]:
            """Why images could not be read, one reason an image, of all processes and from before a resumption."""
            reasons = [saved.get("bad_images", []), *gather_object([list(batches.bad.values())])]
            return list(dict.fromkeys(itertools.chain.from_iterable(reasons)))

        def save(bad: list[str]) -> None:
            state = {"config": dataclasses.asdict(settings), "data": data, "global_batch": schedule.global_batch}
            state |= {"samples_seen": step * schedule.global_batch, "since_log": since_log.tolist()}
            state |= {"seconds": log.seconds, "bad_images": bad}
            if accelerator.scaler is not None:
                state["scaler"] = accelerator.scaler.state_dict()
            tensors = {"byol": byol.state_dict(), "optimizer": optimizer_tensors(optimizer.optimizer)}
            writer.save(step, tensors | ({"probe": probe.tensors()} if probe else {}), state)

        # Sums of the figures since the last line of metrics, and of how many steps. Apple's GPUs have no float64.
        precision = torch.float32 if accelerator.device.type == "mps" else torch.float64
        sums = saved.get("since_log", [])
        if len(sums) != len(FIGURES) + 1:
            # A checkpoint without a count of the steps.
            sums = [0.0] * (len(FIGURES) + 1)
        since_log = torch.tensor(sums, dtype=precision, device=accelerator.device)
        stream, skipped = copied_ahead(iter(batches), accelerator.device), 0
        while True:
            if held_out is not None and schedule.evaluates(step, settings.knn_every) and step not in evaluated:
                with log.aside():
                    accuracies = held_out.evaluate(encoder, probe if step else None, interruption)
                if accuracies is not None:
                    log.log({"step": step, "epoch": schedule.epoch(step), **accuracies})

            # What is known now decides, on all processes alike, whether there is another step.
            over = step == schedule.total_steps
            micro_batches, failure = _read(stream, 0 if over else accelerator.gradient_accumulation_steps)
            stop = agree(FAILED if failure else interruption.requested, group)
            if stop is not None:
                bad = bad_images()
                if accelerator.is_main_process:
                    save(bad)
                    writer.close()
                raise_first(failure)
                raise Interrupted(stop, step)
            if over:
                break

            lr, decay = schedule.lr(step), schedule.target_decay(step)
            for parameters in optimizer.param_groups:
                parameters["lr"] = lr
            _seed(settings.seed, step, accelerator.process_index)
            pairs = map(two_views, micro_batches)
            figures = train_step(
                accelerator, model, optimizer, pairs, target_decay=decay, recomputes=settings.grad_checkpointing
            )
            skipped = skipped + 1 if accelerator.optimizer_step_was_skipped else 0
            if not figures["grad_norm"].isfinite() and not _mends_itself(accelerator, figures["loss"], skipped):
                raise _not_finite(folder, step, lr, figures, micro_batches, splits.train, accelerator)
            if accelerator.is_main_process and probe and not skipped:
                ordinals = torch.cat([batch.ordinals for batch in micro_batches])
                probe.learn(figures["representation"], ordinals, batches.bad)
            this_step = torch.stack([figures[name].to(precision) for name in FIGURES])
            since_log += torch.cat([accelerator.reduce(this_step, "mean"), this_step.new_ones(1)])
            step += 1

            if step % settings.log_every == 0 or step == schedule.total_steps:
                means = since_log[:-1] / since_log[-1]
                row = {"step": step, "epoch": schedule.epoch(step), "lr": lr, "target_decay": decay}
                row |= dict(zip(FIGURES, means.tolist(), strict=True))
                row["effective_rank"] = accelerator.reduce(effective_rank(figures["representation"]), "mean").item()
                since_log.zero_()
                if accelerator.is_main_process:
                    log.log(row)
                warning = alarm.check(row)
                if warning and settings.on_collapse == "stop":
                    raise ByolTimmError(f"{warning}. Stopped, as --on_collapse stop asks")
                if warning:
                    logger.warning(warning)
            if accelerator.is_main_process:
                log.advance(step)
                if not (folder / "views.png").exists():
                    # Not before the first step: to import matplotlib takes longer than many a step.
                    with log.aside():
                        _save_example_views(splits.bank, views, folder / "views.png")
            if step % settings.save_every == 0 or step == schedule.total_steps:
                bad = bad_images()
                if accelerator.is_main_process:
                    save(bad)

        # What it came to.
        bad = bad_images()
        if bad:
            logger.warning(
                "%d images could not be read and were replaced, the first: %s. All are in %s",
                len(bad),
                bad[0],
                folder / BAD_IMAGES,
            )
        if accelerator.is_main_process:
            writer.close()
            log.close()
            if bad:
                (folder / BAD_IMAGES).write_text("".join(f"{reason}\n" for reason in bad), encoding="utf-8")
            record = {
                "backbone": settings.backbone,
                "backbone_kwargs": _backbone_kwargs(settings),
                "config": dataclasses.asdict(settings),
                "data": data,
                "epochs": settings.epochs,
                "steps": step,
                "global_batch": schedule.global_batch,
                "bad_images": len(bad),
                "seconds": log.seconds,
                **environment(accelerator),
            }
            _finish(settings, folder, encoder, record, held_out, splits, mean=mean, std=std)
            if settings.push_to_hub:
                state = folder / "checkpoints" / f"step-{step}" if settings.push_training_state else None
                url = push_encoder(folder, settings.push_to_hub, public=settings.public, training_state=state)
                logger.info("pushed to %s", url)
        accelerator.wait_for_everyone()
    return encoder.eval()


def open_images(config: PretrainConfig) -> Splits:
    """The images that the settings name, of those to train on the share that they name, and those held out."""
    splits = open_dataset(**data_settings(config), in_chans=config.in_chans, seed=config.seed)
    warn_of_few_levels(splits.train)
    if config.image_share == 1:
        return splits
    train = splits.train.subset(share_indices(len(splits.train), config.image_share, config.seed))
    return Splits(train, splits.test, f"{splits.note}; {config.image_share:.3g} of the images to train on are used")


def resolve_backbone_kwargs(config: Any) -> Any:
    """`config`, its image size chosen, with what `auto` stands for among the arguments of the backbone."""
    if "auto" not in config.backbone_kwargs:
        return config
    source, _, place = config.backbone.partition(":")
    backbone = f"local-dir:{fetch_encoder(place)}" if source == "hf-hub" else config.backbone
    given = tuple(pair for pair in config.backbone_kwargs if pair != "auto")
    fitted = dict(image_size=config.image_size, in_chans=config.in_chans, **parse_kwargs(given))
    chosen = small_image_kwargs(backbone, **fitted)
    pairs = (*given, *(f"{name}={value}" for name, value in chosen.items()))
    return dataclasses.replace(config, backbone_kwargs=pairs)


def initial_encoder(config: Any) -> nn.Module:
    """The encoder that training starts from: weights drawn by the seed of the settings, or pretrained ones.

    config: with the size of the images chosen. torch's random state goes on from there.
    """
    torch.manual_seed(config.seed)
    return load_encoder(
        config.backbone,
        image_size=config.image_size,
        in_chans=config.in_chans,
        pretrained=config.pretrained,
        auto_kwargs="auto" in config.backbone_kwargs,
        zero_init_last=config.zero_init_last,
        **_backbone_kwargs(config),
    )


def redraw(folder: str | Path, *, method: Literal["pca", "tsne"] = "tsne") -> None:
    """`embedding.png`, `neighbours.png` and `confusion.png` of a finished run again, the map by that method.

    Raises `ByolTimmError` for a folder without config.yaml or encoder, and images that are no longer there.
    """
    folder = Path(folder)
    settings: Any = parse(PretrainConfig, ["--config", str(folder / "config.yaml")])
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    encoder = load_encoder(f"local-dir:{folder}/encoder").to(memory_format=layout)
    mean, std = normalization(encoder, settings.in_chans)
    shape = dict(mean=mean, std=std, channels_last=settings.channels_last)
    splits = _open_stream(settings) if settings.streaming else open_images(settings)
    examples = Examples.of(settings, splits.bank, splits.test, **shape)
    examples.save_pictures(encoder, folder, method=method)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pairs: Iterable[tuple[Tensor, Tensor]],
    *,
    target_decay: float,
    recomputes: bool = False,
) -> dict[str, Tensor]:
    """One step of BYOL: forward and backward for every micro-batch, optimizer, target network; the figures of it.

    model: a `BYOL`, prepared by the accelerator as the optimizer is. pairs: the views of each of the launch's
    `gradient_accumulation_steps` micro-batches. recomputes: whether the encoder's backward pass recomputes activations.
    Without a gradient scaler, a gradient that is not finite leaves parameters and target as they were. Returns the
    figures of `BYOL`, averaged over micro-batches, `grad_norm`, and `representation` of view 1, that of all
    micro-batches.

    The two directions of the loss share no activations once both target projections are known, so each has a backward
    pass of its own: the same gradients for half the memory. Processes exchange gradients in the very last one.
    """
    byol = accelerator.unwrap_model(model)
    accumulation = accelerator.gradient_accumulation_steps
    totals: dict[str, Tensor] = {}
    representations = []
    for number, (view1, view2) in enumerate(pairs, start=1):
        with accelerator.autocast():
            target1, target2 = byol.target_projections(view1, view2)
        for view, target, last in ((view1, target2, False), (view2, target1, number == accumulation)):
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                figures = model(view, target=target)
                with statistics_held(byol.encoder) if recomputes else contextlib.nullcontext():
                    accelerator.backward(figures["loss"])
            if view is view1:
                representations.append(figures["representation"])
            for name in FIGURES:
                share = accumulation if name == "loss" else 2 * accumulation
                totals[name] = totals.get(name, 0) + figures[name].detach() / share
    if accelerator.scaler is not None:
        accelerator.unscale_gradients(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in byol.parameters() if p.grad is not None])
    if accelerator.scaler is not None or norm.isfinite():
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            byol.update_target(target_decay)
    # Gradients of several processes lie in the buckets that travel. Let go of, they would be made anew beside them.
    optimizer.zero_grad(set_to_none=accelerator.num_processes == 1)
    if accelerator.num_processes > 1 and accelerator.device.type != "cuda":
        # Where there is no SyncBatchNorm: every process must export and resume the same statistics.
        average_batch_statistics(byol)
    return {**totals, "grad_norm": norm, "representation": torch.cat(representations)}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate, target decay and epoch as functions of the step; one step is one global batch."""

    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    global_batch: int
    peak_lr: float
    base_target_decay: float

    @classmethod
    def of(cls, config: Any, num_images: int, forwards: int) -> "Schedule":
        """forwards: of one batch each that make up a step, over processes and accumulation."""
        global_batch = config.batch_size * forwards
        if num_images < global_batch:
            raise ByolTimmError(
                f"{num_images} images are fewer than the global batch of {global_batch} ({config.batch_size} x "
                f"{forwards}). Lower --batch_size"
            )
        steps_per_epoch = num_images // global_batch
        total_steps = config.epochs * steps_per_epoch
        warmup_steps = round(config.warmup_epochs * steps_per_epoch)
        if warmup_steps >= total_steps:
            raise ByolTimmError(f"--warmup_epochs {config.warmup_epochs:g} leaves nothing of {config.epochs} epochs")
        return cls(
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            warmup_steps=warmup_steps,
            global_batch=global_batch,
            peak_lr=config.lr * global_batch / 256,
            base_target_decay=config.target_decay,
        )

    def lr(self, step: int) -> float:
        return learning_rate(step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, peak=self.peak_lr)

    def target_decay(self, step: int) -> float:
        return target_decay(step, self.total_steps, self.base_target_decay)

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def evaluates(self, step: int, every: int) -> bool:
        """Whether kNN is due after `step` steps: at the start, every so many epochs, at the end."""
        return step == self.total_steps or step % (every * self.steps_per_epoch) == 0


def _claim(folder: Path, config: PretrainConfig, stack: contextlib.ExitStack) -> None:
    if config.push_to_hub:
        check_push(config.push_to_hub, public=config.public)
    prepare_output_dir(folder, resume=config.resume, overwrite=config.overwrite)
    stack.enter_context(lock_folder(folder))


def _open_stream(config: PretrainConfig) -> StreamSplits:
    splits = open_stream(**data_settings(config), in_chans=config.in_chans, num_images=config.num_images)
    warn_of_few_levels(splits.bank)
    return splits


def _backbone_kwargs(config: Any) -> dict[str, Any]:
    return parse_kwargs(tuple(pair for pair in config.backbone_kwargs if pair != "auto"))


def _create_optimizer(config: Any, byol: BYOL, peak_lr: float) -> torch.optim.Optimizer:
    return create_optimizer(
        config.opt, byol, lr=peak_lr, weight_decay=config.weight_decay, no_weight_decay=byol.no_weight_decay()
    )


def _lay_out(byol: BYOL, config: Any, accelerator: Accelerator) -> None:
    """Memory layout, BatchNorm over all processes and compilation, as the settings ask."""
    byol.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # In place, but for a module that is itself a BatchNorm. torch's own drops the activations inside timm's layers.
        convert_sync_batchnorm(byol)
    if config.compile:
        for network in byol.children():
            network.compile()


def _rehearse(
    config: Any,
    schedule: Schedule,
    splits: Splits | StreamSplits,
    views: TwoViews,
    byol: BYOL,
    optimizer: torch.optim.Optimizer,
    frozen: Sequence[str],
    accelerator: Accelerator,
) -> None:
    """Say what of the paper the run keeps, and what it takes, by a few steps with a copy of the networks."""
    # On GPUs, BatchNorm sees what all processes have.
    sharing = accelerator.num_processes if accelerator.device.type == "cuda" else 1
    compared = points(
        config,
        schedule,
        views.augmentation,
        byol,
        optimizer,
        batch_norm_images=config.batch_size * sharing,
        frozen=frozen,
    )
    copied = copy.deepcopy(byol)
    _lay_out(copied, config, accelerator)
    model, optimizer = prepare(accelerator, copied, _create_optimizer(config, copied, schedule.peak_lr))
    two_views = DeviceViews(views, accelerator.device, config.channels_last)
    seconds: list[float] = []
    count = 1
    with contextlib.closing(_open_batches(config, schedule, splits, views, accelerator, 0)) as batches:
        stream = copied_ahead(iter(batches), accelerator.device)
        while len(seconds) < count:
            start = time.perf_counter()
            micro_batches, failure = _read(stream, accelerator.gradient_accumulation_steps)
            raise_first(failure)
            pairs = map(two_views, micro_batches)
            figures = train_step(
                accelerator, model, optimizer, pairs, target_decay=1.0, recomputes=config.grad_checkpointing
            )
            # Waits for the device.
            figures["loss"].item()
            seconds.append(time.perf_counter() - start)
            if len(seconds) == 1:
                count = on_main_process(
                    accelerator, lambda: 1 + min(REHEARSED_STEPS, int(REHEARSAL_SECONDS / seconds[0]))
                )
    for line in [*paper_lines(compared, schedule, config.epochs), "", *rehearsal(schedule, byol, accelerator, seconds)]:
        logger.info(line)


def _training_state(config: PretrainConfig) -> Checkpoint | None:
    """The networks to start from, of a checkpoint here or on the Hub."""
    if config.training_state is None:
        return None
    source, _, place = config.training_state.partition(":")
    checkpoint = load_checkpoint(
        fetch_training_state(place) if source == "hf-hub" else Path(config.training_state), {"byol"}
    )
    settings = checkpoint.state.get("config") if isinstance(checkpoint.state, dict) else None
    if (
        "byol" not in checkpoint.tensors
        or not isinstance(settings, dict)
        or not settings.keys() >= {*HEADS, "backbone"}
    ):
        raise ByolTimmError(f"{config.training_state} is no training state of byol_timm. Check --training_state")
    return checkpoint


def _start_from(checkpoint: Checkpoint, config: Any, byol: BYOL) -> None:
    made_with, tensors = checkpoint.state["config"], checkpoint.tensors["byol"]
    name, asked = f"the training state {config.training_state}", dataclasses.asdict(config)
    heads = {key: made_with[key] for key in HEADS}
    compare_config(heads, asked, may_change=(), checkpoint=name, otherwise="Give another --training_state")
    shapes = {key: tensor.shape for key, tensor in byol.state_dict().items()}
    for key in sorted(shapes.keys() | tensors.keys()):
        if key not in tensors or tensors[key].shape != shapes.get(key):
            raise ByolTimmError(
                f"{name} is of {made_with['backbone']} and does not fit {config.backbone} as it was asked for (they "
                f"differ in {key}). Give the --backbone, --backbone_kwargs and --in_chans that it was made with"
            )
    byol.load_state_dict(tensors)
    logger.info("all networks start from %s, step %d", config.training_state, checkpoint.step)


def _resume(
    config: Any,
    schedule: Schedule,
    data: dict[str, Any],
    folder: Path,
    byol: BYOL,
    optimizer: torch.optim.Optimizer,
    probe: LinearProbe | None,
) -> tuple[int, dict[str, Any]]:
    """The step and the state to go on from; networks and optimizers are put back. Step 0 where nothing was saved."""
    checkpoint = load_latest(folder / "checkpoints")
    if checkpoint is None:
        if (folder / "encoder").exists():
            raise ByolTimmError(
                f"{folder} has an encoder and no checkpoint to go on from. Discard both with --overwrite, or choose "
                "another --output_dir"
            )
        return 0, {}
    for reason in checkpoint.skipped:
        logger.warning("a damaged checkpoint is passed over: %s", reason)
    state, name = checkpoint.state, f"checkpoint {checkpoint.path.name}"
    if "auto" in state["config"]["backbone_kwargs"]:
        # A checkpoint without what it stood for.
        before = dataclasses.replace(config, backbone_kwargs=tuple(state["config"]["backbone_kwargs"]))
        state["config"]["backbone_kwargs"] = list(resolve_backbone_kwargs(before).backbone_kwargs)
    compare_config(state["config"], dataclasses.asdict(config), may_change=MAY_CHANGE, checkpoint=name)
    if state["data"]["fingerprint"] != data["fingerprint"]:
        raise ByolTimmError(
            f"{name} was made of other images ({state['data']['images']:,} then, {data['images']:,} now). "
            "Use another --output_dir"
        )
    if state["global_batch"] != schedule.global_batch:
        raise ByolTimmError(
            f"{name} was made with a global batch of {state['global_batch']}, this launch has {schedule.global_batch}. "
            "Change --batch_size so that it times processes and accumulation gives the same"
        )
    byol.load_state_dict(checkpoint.tensors["byol"])
    restore_optimizer(optimizer, checkpoint.tensors["optimizer"])
    if probe is not None:
        probe.restore(checkpoint.tensors["probe"])
    logger.info("resumed from %s", checkpoint.path)
    return checkpoint.step, state


def _decoded(
    config: Any, splits: Splits | StreamSplits, interruption: Interruption, step: int
) -> Splits | StreamSplits:
    """The same splits, the images to train on decoded already where the settings ask for it."""
    if config.decoded_cache is None or isinstance(splits, StreamSplits):
        return splits

    def poll() -> None:
        if interruption.requested is not None:
            raise Interrupted(interruption.requested, step)

    train = open_cache(
        splits.train,
        config.decoded_cache,
        side=config.decoded_side,
        workers=config.workers,
        on_bad_image=config.on_bad_image,
        poll=poll,
    )
    return dataclasses.replace(splits, train=train)


def _open_batches(
    config: Any,
    schedule: Schedule,
    splits: Splits | StreamSplits,
    views: TwoViews,
    accelerator: Accelerator,
    step: int,
) -> TrainingBatches | StreamBatches:
    settings: dict[str, Any] = dict(
        batch_size=config.batch_size,
        global_batch=schedule.global_batch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        seed=config.seed,
        start_step=step,
        cut=views.cut,
        reduction=views.reduction if config.fast_jpeg else None,
        workers=config.workers,
        on_bad_image=config.on_bad_image,
    )
    if isinstance(splits, StreamSplits):
        return StreamBatches(splits.train, splits.bank, shuffle_buffer=config.shuffle_buffer, **settings)
    return TrainingBatches(splits.train, memory_limit=int(config.memory_limit * 2**30), **settings)


def _read(stream: Iterator[Batch], count: int) -> tuple[list[Batch], ByolTimmError | None]:
    """The next `count` batches, or what went wrong: other processes must hear of it before this one ends."""
    try:
        return [next(stream) for _ in range(count)], None
    except ByolTimmError as error:
        return [], error


class DeviceViews:
    """Views of a batch of images, or of crops, on the device; the memory of the last ones is used again."""

    def __init__(self, views: TwoViews, device: torch.device, channels_last: bool) -> None:
        self.views, self.device = views, device
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        batch = batch.to(self.device)
        if batch.images is not None:
            self.last = self.views(batch.images, batch.ordinals, out=self.last)
        elif batch.crops is not None:
            self.last = self.views.finish(batch.crops, batch.ordinals, out=self.last)
        view1, view2 = (view.contiguous(memory_format=self.layout) for view in self.last or ())
        return view1, view2


def _seed(seed: int, step: int, process: int) -> None:
    """What is random in the online network (dropout, drop path) becomes a function of the step, as all else is."""
    digest = hashlib.blake2b(f"{seed} {step} {process}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)


def _mends_itself(accelerator: Accelerator, loss: Tensor, skipped: int) -> bool:
    """Whether a smaller scale of the loss, which float16 tries after a skipped step, can mend the gradient.

    It cannot when activations overflow: then the loss is no number either, and batch statistics are lost. The answer is
    that of all processes, which skip a step together.
    """
    return 0 < skipped <= MAX_SKIPPED_STEPS and bool(accelerator.reduce(loss.double(), "mean").isfinite())


def _not_finite(
    folder: Path,
    step: int,
    lr: float,
    figures: dict[str, Tensor],
    batches: list[Batch],
    images: Stream | Images,
    accelerator: Accelerator,
) -> ByolTimmError:
    """The error for a gradient that is not finite, with what is known about it in `debug/step-N.json`."""
    loss, norm = figures["loss"].item(), figures["grad_norm"].item()
    seen: list[Any] = [ordinal for batch in batches for ordinal in batch.ordinals.tolist()]
    if isinstance(images, Images):
        # Those of a stream have no place of their own in an epoch.
        seen = [images.describe(ordinal % len(images)) for ordinal in seen]
    seen = gather_object(seen)
    if accelerator.is_main_process:
        facts = {"step": step, "lr": lr, "loss": loss, "grad_norm": norm, "images": seen}
        (folder / "debug").mkdir(exist_ok=True)
        write_json(folder / "debug" / f"step-{step}.json", {name: _number(value) for name, value in facts.items()})
    return ByolTimmError(
        f"loss or gradient is not finite at step {step} (loss {loss:g}, gradient norm {norm:g}, lr {lr:g}). Lower --lr "
        f"and start anew; see {folder / 'debug' / f'step-{step}.json'}. Checkpoints hold the last good step"
    )


def _number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _rehearsed_views(folder: Path, images: Images, views: TwoViews) -> Path:
    """Where the views are: beside the folder of the run, which stays free for it, or as it is."""
    rehearsed = Path(f"{folder if folder.name else folder.absolute()}-dry_run")
    try:
        rehearsed.mkdir(parents=True, exist_ok=True)
        _save_example_views(images, views, rehearsed / "views.png")
    except OSError as error:
        raise ByolTimmError(f"cannot write to {rehearsed} ({error.strerror}). Choose another --output_dir") from error
    return rehearsed / "views.png"


def _save_example_views(images: Images, views: TwoViews, path: Path) -> None:
    examples: list[Tensor] = []
    for index in range(len(images)):
        with contextlib.suppress(BadImage):
            examples.append(images.decode(index * 7919 % len(images)))
        if len(examples) == 8:
            break
    ordinals = torch.arange(len(examples))
    crops = torch.stack([views.cut(image, ordinal) for ordinal, image in enumerate(examples)])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (views.mean, views.std))
    view1, view2 = ((view * std + mean).clamp(0, 1) for view in views.finish(crops, ordinals))
    save_views(examples, view1, view2, path)


def _finish(
    config: Any,
    folder: Path,
    encoder: nn.Module,
    record: dict[str, Any],
    held_out: Examples | None,
    splits: Splits | StreamSplits,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write the encoder, results.json and the pictures, and say what came out.

    Figures that a user has deleted with metrics.jsonl are left out.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    record["health"] = {name: trained[-1][name] for name in (*HEALTH, "effective_rank")} if trained else {}
    baselines = {}
    if held_out is not None:
        accuracies = {row["step"]: row["knn"] for row in rows if "knn" in row}
        baselines = {"raw pixels": held_out.knn_of_pixels()}
        if 0 in accuracies:
            baselines["before training"] = accuracies[0]
        record["results"] = {
            "knn_raw_pixels": 100 * baselines["raw pixels"],
            **({"knn_random": 100 * accuracies[0]} if 0 in accuracies else {}),
            "knn_byol": 100 * accuracies[record["steps"]],
            "k": NEIGHBOURS,
            "protocol": held_out.protocol,
        }
        linear = [row["linear"] for row in rows if "linear" in row]
        if linear:
            record["results"]["linear_byol"] = 100 * linear[-1]
    shape = dict(mean=mean, std=std, channels_last=config.channels_last)
    examples = held_out or Examples.of(config, splits.bank, splits.test, **shape)
    examples.save_pictures(encoder, folder)
    save_curves(rows, folder / "curves.png", baselines=baselines)
    save_encoder(
        encoder,
        folder / "encoder",
        image_size=config.image_size,
        mean=mean,
        std=std,
        crop_pct=crop_pct(config.image_size),
        license=config.license,
        record=record,
        pictures=[folder / "curves.png", folder / "embedding.png"],
    )
    write_json(folder / "results.json", redact(record))
    save_report(folder)
    for line in closing(config, folder, record):
        logger.info(line)
