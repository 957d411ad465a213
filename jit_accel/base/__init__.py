"""The ground that every room stands on; nothing of JiT."""
