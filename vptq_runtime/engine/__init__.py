"""Many requests in one batch: scheduling, a cache of prefixes, speculation, constraints."""
