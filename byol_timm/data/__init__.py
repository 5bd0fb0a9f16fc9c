"""Data: images from folders, tables, shards and the Hub, decoded and batched."""

from .batches import Batch as Batch
from .batches import TrainingBatches as TrainingBatches
from .batches import copied_ahead as copied_ahead
from .cache import Cache as Cache
from .cache import open_cache as open_cache
from .decoding import BadImage as BadImage
from .decoding import decode as decode
from .evaluation import evaluation_batches as evaluation_batches
from .evaluation import load_pixels as load_pixels
from .folders import EXTENSIONS as EXTENSIONS
from .images import Images as Images
from .images import Splits as Splits
from .images import fingerprint as fingerprint
from .images import warn_of_few_levels as warn_of_few_levels
from .opening import hold_out as hold_out
from .opening import hub_id as hub_id
from .opening import open_dataset as open_dataset
from .sampling import class_share_indices as class_share_indices
from .sampling import epoch_order as epoch_order
from .sampling import share_indices as share_indices
from .sampling import subset_indices as subset_indices
from .stream_batches import StreamBatches as StreamBatches
from .streams import StreamSplits as StreamSplits
from .streams import open_stream as open_stream
