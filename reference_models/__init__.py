"""Reference models with Dynamic Sharing, one file each, read top to bottom."""
