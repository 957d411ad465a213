"""What every room stands on; nothing of JiT."""
