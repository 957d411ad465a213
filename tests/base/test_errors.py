"""Errors of the user carry the setting, its value and the rule, wherever they travel."""

import pickle

import pytest

from jit_accel.base.errors import UserError, common_error, lookup, message_of, renamed_settings

TOO_LARGE = UserError("must be below 3.", about="size", value=4, remedy="Use 2.")


def test_python_reads_an_argument_and_programs_print_a_flag():
    assert str(TOO_LARGE) == "size 4: must be below 3. Use 2."
    assert message_of(TOO_LARGE) == "--size 4: must be below 3. Use 2."
    assert message_of(UserError("no space.")) == "no space."
    assert message_of(ValueError("odd")) == "ValueError: odd"


def test_parts_survive_the_trip_between_processes():
    error = UserError("gone", about="data_path", value="x", remedy="look")
    error.everywhere = False
    copy = pickle.loads(pickle.dumps(error))
    assert vars(copy) == vars(error)
    both = pickle.loads(pickle.dumps(common_error([error, None])))
    assert str(both) == "process 0: data_path x: gone look"


def test_errors_of_processes_are_said_once_or_by_process():
    gone, other = UserError("gone", about="data_path"), UserError("other")
    assert common_error([None, None]) is None
    assert common_error([gone] * 3) is gone
    assert str(common_error([None, gone, None])) == "process 1: data_path: gone"
    assert message_of(common_error([gone, other, gone])) == "processes 0, 2: --data_path: gone\nprocess 1: other"


def test_an_error_is_about_the_callers_own_setting():
    with pytest.raises(UserError, match=r"^reference x: gone$") as caught, renamed_settings(data_path="reference"):
        raise UserError("gone", about="data_path", value="x")
    assert caught.value.about == "reference"
    several = [UserError("gone", about="data_path"), None]
    with pytest.raises(UserError, match=r"^process 0: reference: gone$"), renamed_settings(data_path="reference"):
        raise common_error(several)


def test_unknown_names_are_answered_with_the_choices_and_the_nearest():
    table = {"heun": 1, "euler": 2}
    assert lookup(table, "euler", "method") == 2
    with pytest.raises(UserError, match=r"^method eular: unknown; choose from heun, euler. Did you mean 'euler'\?$"):
        lookup(table, "eular", "method")
