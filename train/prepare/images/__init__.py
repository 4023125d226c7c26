"""Bytes of a picture to pixels and what they look like. Which pictures there are is told by sources/."""
