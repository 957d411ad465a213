"""A pipeline's own model card, kept where diffusers saves or pushes the pipeline."""

from __future__ import annotations

import os
from pathlib import Path


class KeptCardMixin:
    """For a `DiffusionPipeline`: its model card goes along, where diffusers would write one that says nothing."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save as diffusers does, with the model card of this folder, else of the one that the pipeline came from."""
        places = [Path(str(place)) for place in (save_directory, self.config.get("_name_or_path")) if place]
        place = next((place for place in places if (place / "README.md").is_file()), None)
        files = [place / name for name in ("README.md", "samples.png")] if place else []
        self._own_card = {file.name: file.read_bytes() for file in files if file.is_file()}
        super().save_pretrained(save_directory, *args, **kwargs)
        self._put_own_card(save_directory)

    def _upload_folder(self, working_dir: str | os.PathLike, *args, **kwargs):
        self._put_own_card(working_dir)  # diffusers has just written its own there
        return super()._upload_folder(working_dir, *args, **kwargs)

    def _put_own_card(self, folder: str | os.PathLike) -> None:
        for name, content in self._own_card.items():
            (Path(str(folder)) / name).write_bytes(content)
