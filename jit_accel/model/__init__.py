"""The network, the path from noise to image, and a trained model as a folder."""
