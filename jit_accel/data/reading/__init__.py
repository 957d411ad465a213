"""From bytes, files and servers to pixels."""
