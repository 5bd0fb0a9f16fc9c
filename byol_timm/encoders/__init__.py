"""Encoders: timm backbones without a classifier, created, checked, saved and pushed."""

from .check import read_record as read_record
from .create import create_encoder as create_encoder
from .create import parse_kwargs as parse_kwargs
from .facts import encoder_width as encoder_width
from .facts import freeze_parts as freeze_parts
from .facts import has_batch_norm as has_batch_norm
from .facts import has_convolutions as has_convolutions
from .facts import has_residual_init as has_residual_init
from .facts import is_patch_transformer as is_patch_transformer
from .facts import normalization as normalization
from .fetch import cache_alone_without_network as cache_alone_without_network
from .fetch import fetch_encoder as fetch_encoder
from .fit import Fit as Fit
from .fit import closest_backbones as closest_backbones
from .fit import fit_backbone as fit_backbone
from .fit import small_image_kwargs as small_image_kwargs
from .folder import save_encoder as save_encoder
from .hub import check_push as check_push
from .hub import files_to_push as files_to_push
from .hub import push_encoder as push_encoder
from .hub import register as register
