"""What a run measures, judges, writes down and shows."""
