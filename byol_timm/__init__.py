"""BYOL pretraining for any timm backbone (Grill et al. 2020, arXiv 2006.07733)."""

__version__ = "0.1.0.dev0"
