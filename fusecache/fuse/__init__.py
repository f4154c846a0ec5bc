"""The mounted filesystem. pyfuse3 stops here, and so do errnos."""
