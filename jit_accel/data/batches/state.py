"""Refusing to resume from the state of another loader."""

from __future__ import annotations

from jit_accel.base.errors import UserError

_REMEDIES = {
    "kind": ("--streaming", "the checkpoint was made with the other way of reading the data: use it again"),
    "version": ("the way of recording a stream's position", "use the version of jit_accel that saved it"),
    "seed": ("--seed", "the order of the images follows from the seed: use {saved} again"),
}


def check_state(state: dict, expected: dict) -> None:
    """Compare what a saved state says about its loader with what `expected` says about this one.

    Raises:
        UserError: naming the first difference and what to do.
    """
    for key, value in expected.items():
        saved = state.get(key)
        if saved != value:
            flag, remedy = _REMEDIES[key]
            raise UserError(
                f"{flag} was {saved} when the checkpoint was saved and is {value} now; "
                f"{remedy.format(saved=saved)}, or start anew with --resume none.",
                about="resume",
            )
