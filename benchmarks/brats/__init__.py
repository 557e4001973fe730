"""Tumour regions from MRI sequences (BraTS)."""
