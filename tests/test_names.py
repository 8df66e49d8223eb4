"""What jsonargparse says of values, in our words."""

import pytest

from involution.names import mistaken

_UNION = """Parser key "trainer.max_epochs":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: x
"""


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (_UNION, "`trainer.max_epochs` must be a whole number or null; got x."),
        (
            "Parser key \"name\": Expected a typing.Literal['imagenet', 'coco']. Got value: foo",
            "`name` must be one of imagenet, coco; got foo.",
        ),
        (
            "Parser key \"a.b\": Expected a <class 'bool'>. Got value: no way",
            "`a.b` must be true or false; got no way.",
        ),
        ("unrecognized arguments: --foo", "unrecognized arguments: --foo"),
        ('Parser key "a": something else entirely', 'Parser key "a": something else entirely'),
    ],
)
def test_values_of_the_wrong_kind(message: str, told: str) -> None:
    assert mistaken(message) == told
