"""fusecache: VM images from shared storage, served through a shared SSD block cache."""

__version__ = "0.1.0"
