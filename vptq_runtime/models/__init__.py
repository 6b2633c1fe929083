"""Models by name: found in the cache, or downloaded and converted into it. docs/models.md."""
