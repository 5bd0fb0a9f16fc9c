"""Evaluation: features, nearest neighbours, classifiers, metrics."""

from .classifier import (
    CROP_AND_FLIP as CROP_AND_FLIP,
)
from .classifier import (
    PROTOCOLS as PROTOCOLS,
)
from .classifier import (
    Protocol as Protocol,
)
from .classifier import (
    fit_linear as fit_linear,
)
from .classifier import (
    train_classifier as train_classifier,
)
from .features import (
    Preparation as Preparation,
)
from .features import (
    RawPixels as RawPixels,
)
from .features import (
    dataset_features as dataset_features,
)
from .features import (
    extract_features as extract_features,
)
from .features import (
    open_evaluation as open_evaluation,
)
from .heldout import NEIGHBOURS as NEIGHBOURS
from .heldout import Examples as Examples
from .heldout import LinearProbe as LinearProbe
from .jobs import (
    accuracy_lines as accuracy_lines,
)
from .jobs import (
    evaluate_classifier as evaluate_classifier,
)
from .jobs import (
    evaluation_folder as evaluation_folder,
)
from .jobs import (
    save_evaluation as save_evaluation,
)
from .metrics import (
    classification_metrics as classification_metrics,
)
from .metrics import (
    confidence_interval as confidence_interval,
)
from .metrics import (
    label_subset as label_subset,
)
from .neighbours import knn as knn
from .neighbours import knn_scores as knn_scores
from .neighbours import nearest_neighbours as nearest_neighbours
