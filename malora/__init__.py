"""Mixtures of asymmetric LoRA experts (MALoRA, arXiv 2410.22782): training, format, kernels."""
