"""What keeps a pipeline's own model card when diffusers saves or pushes it."""

from __future__ import annotations

import os
from pathlib import Path


class OwnCardMixin:
    """For a `DiffusionPipeline`: its model card goes along, where diffusers would write one that says nothing."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """diffusers' own, and the model card: that of the folder, else of the folder that the pipeline came from."""
        places = [save_directory, self.config.get("_name_or_path")]
        self._own_card = card_files([Path(str(place)) for place in places if place])
        super().save_pretrained(save_directory, *args, **kwargs)
        self._put_own_card(save_directory)

    def _upload_folder(self, working_dir: str | os.PathLike, *args, **kwargs):
        self._put_own_card(working_dir)  # diffusers has just written its own there
        return super()._upload_folder(working_dir, *args, **kwargs)

    def _put_own_card(self, folder: str | os.PathLike) -> None:
        for name, content in self._own_card.items():
            (Path(str(folder)) / name).write_bytes(content)


def card_files(folders: list[Path]) -> dict[str, bytes]:
    """The model card of the first folder that has one, and its picture, by their names."""
    folder = next((folder for folder in folders if (folder / "README.md").is_file()), None)
    files = [folder / name for name in ("README.md", "samples.png")] if folder else []
    return {file.name: file.read_bytes() for file in files if file.is_file()}
