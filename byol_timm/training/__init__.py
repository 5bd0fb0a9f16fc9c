"""Training: the step, the optimizer, checkpoints, processes."""

from .checkpoint import (
    Checkpoint as Checkpoint,
)
from .checkpoint import (
    CheckpointWriter as CheckpointWriter,
)
from .checkpoint import (
    load_checkpoint as load_checkpoint,
)
from .checkpoint import (
    load_latest as load_latest,
)
from .checkpoint import (
    optimizer_tensors as optimizer_tensors,
)
from .checkpoint import (
    restore_optimizer as restore_optimizer,
)
from .checkpoint import (
    save_checkpoint as save_checkpoint,
)
from .folder import (
    compare_config as compare_config,
)
from .folder import (
    lock_folder as lock_folder,
)
from .folder import (
    prepare_output_dir as prepare_output_dir,
)
from .health import CollapseAlarm as CollapseAlarm
from .health import effective_rank as effective_rank
from .interruption import Interrupted as Interrupted
from .interruption import Interruption as Interruption
from .interruption import agree as agree
from .log import MetricsLog as MetricsLog
from .log import read_metrics as read_metrics
from .optim import (
    LARS as LARS,
)
from .optim import (
    Schedule as Schedule,
)
from .optim import (
    create_optimizer as create_optimizer,
)
from .optim import (
    learning_rate as learning_rate,
)
from .optim import (
    parameter_groups as parameter_groups,
)
from .processes import (
    check_same as check_same,
)
from .processes import (
    create_accelerator as create_accelerator,
)
from .processes import (
    exhaustion_told as exhaustion_told,
)
from .processes import (
    losing_processes_told as losing_processes_told,
)
from .processes import (
    on_main_process as on_main_process,
)
from .processes import (
    prepare as prepare,
)
from .processes import (
    raise_first as raise_first,
)
from .step import (
    FIGURES as FIGURES,
)
from .step import (
    MAX_SKIPPED_STEPS as MAX_SKIPPED_STEPS,
)
from .step import (
    DeviceViews as DeviceViews,
)
from .step import (
    _create_optimizer as _create_optimizer,
)
from .step import (
    _lay_out as _lay_out,
)
from .step import (
    _mends_itself as _mends_itself,
)
from .step import (
    _open_batches as _open_batches,
)
from .step import (
    _read as _read,
)
from .step import (
    _seed as _seed,
)
from .step import (
    enable_grad_checkpointing as enable_grad_checkpointing,
)
from .step import (
    train_step as train_step,
)
