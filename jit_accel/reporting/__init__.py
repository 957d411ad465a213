"""A run, or several, as one HTML page: read (`curves`, `runs`, `sheets`), chosen (`charts`), written (`page`)."""
