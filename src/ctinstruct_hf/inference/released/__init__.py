"""The authors' released checkpoint: found, fetched, read, and brought into this package's format."""
