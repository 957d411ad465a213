"""The order of the images, and batches of them."""
