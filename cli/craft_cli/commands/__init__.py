"""One file per command; each is a thin call."""
