"""Self-supervised pretraining (BYOL) for any timm backbone."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .byol import BYOL as BYOL
    from .config import PretrainConfig as PretrainConfig
    from .encoders import create_encoder as create_encoder
    from .encoders import push_encoder as push_encoder
    from .encoders import register as register
    from .encoders import save_encoder as save_encoder
    from .errors import ByolTimmError as ByolTimmError
    from .evaluation import evaluate as evaluate
    from .evaluation import extract_features as extract_features
    from .pretraining import pretrain as pretrain
    from .views import TwoViews as TwoViews

__version__ = "0.1.0"

_HOMES = {
    "BYOL": "byol",
    "ByolTimmError": "errors",
    "PretrainConfig": "config",
    "TwoViews": "views",
    "create_encoder": "encoders",
    "evaluate": "evaluation",
    "extract_features": "evaluation",
    "pretrain": "pretraining",
    "push_encoder": "encoders",
    "register": "encoders",
    "save_encoder": "encoders",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Imported on first use: `--help` and a wrong flag need not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
