"""The accepted set as an ordinary dataset: pictures, captions, weights."""
