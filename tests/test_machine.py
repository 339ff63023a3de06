import os
import platform

from smallgpt.machine import describe_machine


def test_the_description_names_the_processor_and_nobody() -> None:
    text = describe_machine()
    assert int(text.split(" cores of ")[0]) <= (os.cpu_count() or 1)
    assert len(text.split(" cores of ")[1]) > 2
    assert platform.node() not in text
