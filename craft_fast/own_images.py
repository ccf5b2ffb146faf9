"""Own pictures with captions, brought in as candidates."""
