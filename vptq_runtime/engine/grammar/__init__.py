"""Grammars before they are used: what is refused, and that none hangs or fills the process."""
