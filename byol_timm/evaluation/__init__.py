"""Evaluation: features, nearest neighbours, classifiers, metrics."""

from .classifier import PROTOCOLS as PROTOCOLS
from .classifier import Protocol as Protocol
from .classifier import fit_linear as fit_linear
from .classifier import train_classifier as train_classifier
from .features import Preparation as Preparation
from .features import dataset_features as dataset_features
from .features import extract_features as extract_features
from .heldout import NEIGHBOURS as NEIGHBOURS
from .heldout import Examples as Examples
from .heldout import LinearProbe as LinearProbe
from .measure import evaluate as evaluate
from .measure import metrics_lines as metrics_lines
from .measure import open_evaluation as open_evaluation
from .metrics import classification_metrics as classification_metrics
from .metrics import label_subset as label_subset
from .neighbours import knn as knn
