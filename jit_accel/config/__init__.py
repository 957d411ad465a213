"""Every setting of a training: stated, checked, completed. Imports no torch."""
