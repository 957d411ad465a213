"""The network, the path from noise to image, and a trained model as a folder."""


def __getattr__(name: str):
    # Pipeline folders of version 0.1.0 look for the class here, and diffusers for its base beside it.
    if name in ("JiTTransformer2DModel", "ModelMixin"):
        from jit_accel.model import transformer

        return getattr(transformer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
