"""Processes and who has started them."""

import pytest

from jit_accel.base.processes import is_launcher


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        ("/venv/bin/python /venv/bin/accelerate launch --num_processes 2 -m jit_accel.train", True),
        ("/usr/bin/python3 /usr/local/bin/accelerate-launch train.py", True),
        ("python -m accelerate.commands.launch train.py", True),
        ("/venv/bin/python /venv/bin/torchrun --nproc_per_node 2 train.py", True),
        ("python -m torch.distributed.run train.py", True),
        ("bash /home/me/accelerate/train.sh", False),
        ("-bash", False),
        ("bash launch/train.sh --config accelerate_configs/fsdp2.yaml", False),
        ("", False),
    ],
)
def test_a_launcher_is_known_by_its_program_or_module_and_not_by_a_folder(command, is_one):
    assert is_launcher(command.replace(" ", "\0").encode()) is is_one
