"""`pretrain`: from settings to a trained encoder, top to bottom."""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..byol import BYOL
from ..config import PretrainConfig, check, output_dir, to_yaml
from ..data import Batch, Splits, copied_ahead, fingerprint, hub_id
from ..encoders import check_push, encoder_width, freeze_parts, has_batch_norm, normalization, push_encoder
from ..errors import ByolTimmError, redact
from ..evaluation import Examples, LinearProbe
from ..files import write_json
from ..training import (
    FIGURES,
    CheckpointWriter,
    CollapseAlarm,
    DeviceViews,
    GraphedStep,
    Interrupted,
    Interruption,
    LateCheck,
    MetricsLog,
    Processes,
    Schedule,
    _create_optimizer,
    _lay_out,
    _mends_itself,
    _open_batches,
    _read,
    _seed,
    check_resumable,
    claim_folder,
    create_accelerator,
    effective_rank,
    enable_grad_checkpointing,
    explain_exhaustion,
    optimizer_tensors,
    prepare,
    read_metrics,
    train_step,
)
from ..views import TwoViews
from .dry_run import _rehearse, _rehearsed_views
from .journal import (
    BAD_IMAGES,
    HEADS,
    _finish,
    _not_finite,
    _resume,
    _save_example_views,
    _start_from,
    _training_state,
    evaluation_preparation,
)
from .plan import (
    MANY_TINY,
    _backbone_kwargs,
    _decoded,
    _open_stream,
    initial_encoder,
    open_images,
    resolve_augmentation,
    resolve_backbone_kwargs,
    resolve_images,
    resolve_intervals,
    resolve_training,
)
from .summary import banner, environment

logger = logging.getLogger(__name__)

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
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(Processes(accelerator))
        commits: list[Callable[[], None]] = []
        if not config.dry_run:
            processes.on_main(lambda: commits.append(_claim(folder, config, stack)))
        interruption = stack.enter_context(Interruption(max_minutes=config.max_time))

        # The images, the encoder that fits them, and what both leave to choose.
        with processes.main_first():
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
        processes.check_same(to_yaml(settings), fault)

        # The two views, both networks, the optimizer.
        stack.enter_context(explain_exhaustion(settings.batch_size, settings.image_size))
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
            picture = processes.on_main(lambda: _rehearsed_views(folder, splits.bank, views))
            _rehearse(settings, schedule, splits, views, byol, optimizer, frozen, processes)
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
        processes.check_same(data["fingerprint"], fault)
        # Lay out, prepare, then resume: the restored state follows the memory format and the device of the parameters.
        _lay_out(byol, settings, accelerator)
        model, optimizer = prepare(accelerator, byol, optimizer)
        step = 0
        saved: dict[str, Any] = {}
        if settings.resume:
            step, saved = _resume(settings, schedule, data, folder, byol, optimizer.optimizer, probe)
            fault = f"finds other checkpoints in {folder} than process 0. Give all hosts one --output_dir to share"
            processes.check_same(str(step), fault)
        if accelerator.scaler is not None and "scaler" in saved:
            accelerator.scaler.load_state_dict(saved["scaler"])
        if accelerator.is_main_process:
            (folder / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
            write_json(folder / "environment.json", environment(accelerator))
        accelerator.init_trackers(
            "byol_timm", config={name: str(v) for name, v in redact(dataclasses.asdict(settings)).items()}
        )

        # What reads, watches and writes.
        decoded = _decoded(settings, splits, interruption, step)
        batches = _open_batches(settings, schedule, decoded, views, accelerator, step)
        stack.callback(batches.close)
        two_views = DeviceViews(
            views,
            accelerator.device,
            settings.channels_last,
            triton=settings.triton_views,
            dtype=torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32,
        )
        graphed = GraphedStep(accelerator, model, optimizer) if settings.cuda_graph else None
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
            # Step 0 has learned nothing that an earlier run should be given up for.
            saved_step = lambda step: commits[0]() if step else None  # noqa: E731
            writer = stack.enter_context(CheckpointWriter(folder / "checkpoints", saved=saved_step))
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
            preparation = evaluation_preparation(settings, mean, std)
            seed = settings.split_seed
            held_out = Examples.load(splits.bank, splits.test, preparation, seed=seed) if splits.test else None

        def bad_images() -> list[str]:
            """Why images could not be read, one reason an image, of all processes and from before a resumption."""
            reasons = [saved.get("bad_images", []), *processes.gather(list(batches.bad.values()))]
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
        # A GPU's step is checked when the next one is queued, and before anything of it is measured or saved.
        unchecked: list[tuple[LateCheck, tuple[int, float, dict[str, Tensor], list[Batch]]]] = []

        def check_steps(late: int = 0) -> None:
            while len(unchecked) > late:
                norm, facts = unchecked.pop(0)
                if not norm.is_finite():
                    raise _not_finite(folder, *facts, splits.train, processes)

        stream, skipped = copied_ahead(iter(batches), accelerator.device), 0
        while True:
            if held_out is not None and schedule.evaluates(step, settings.knn_every) and step not in evaluated:
                check_steps()
                with log.aside():
                    accuracies = held_out.evaluate(encoder, probe if step else None, interruption)
                if accuracies is not None:
                    log.log({"step": step, "epoch": schedule.epoch(step), **accuracies})

            # What is known now decides, on all processes alike, whether there is another step.
            over = step == schedule.total_steps
            micro_batches, failure = _read(stream, 0 if over else accelerator.gradient_accumulation_steps)
            stop = processes.agree(FAILED if failure else interruption.requested)
            if stop is not None:
                check_steps()
                bad = bad_images()
                if accelerator.is_main_process:
                    save(bad)
                    writer.close()
                processes.raise_first(failure)
                raise Interrupted(stop, step)
            if over:
                break

            lr, decay = schedule.lr(step), schedule.target_decay(step)
            for parameters in optimizer.param_groups:
                parameters["lr"] = lr
            _seed(settings.seed, step, accelerator.process_index)
            pairs = map(two_views, micro_batches)
            if graphed is not None:
                figures = graphed(pairs, lr=lr, target_decay=decay)
            else:
                figures = train_step(
                    accelerator, model, optimizer, pairs, target_decay=decay, recomputes=settings.grad_checkpointing
                )
            skipped = skipped + 1 if accelerator.optimizer_step_was_skipped else 0
            unchecked.append((LateCheck(figures["grad_norm"]), (step, lr, figures, micro_batches)))
            if accelerator.scaler is not None and _mends_itself(accelerator, figures["loss"], skipped):
                unchecked.clear()
            due = any((step + 1) % every == 0 for every in (settings.log_every, settings.save_every))
            at_once = due or step + 1 == schedule.total_steps or accelerator.scaler is not None
            check_steps(late=0 if at_once or accelerator.device.type != "cuda" else 1)
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
                url = push_encoder(folder, settings.push_to_hub, public=settings.public)
                logger.info("pushed to %s", url)
        processes.wait()
    return encoder.eval()


def _claim(folder: Path, config: PretrainConfig, stack: contextlib.ExitStack) -> Callable[[], None]:
    if config.push_to_hub:
        check_push(config.push_to_hub, public=config.public)
    if config.resume and not config.overwrite:
        check_resumable(folder)
    return stack.enter_context(claim_folder(folder, resume=config.resume, overwrite=config.overwrite))
