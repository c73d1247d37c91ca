"""The examples in the docstrings of runs and spaces, in a folder with the run that they name."""

import doctest

import pytest
from run_tables import write_run

import search
from search.runs.run_record import RunRecord
from search.spaces.space import Range, Space

NAMES = {each.__name__: each for each in (Range, RunRecord, Space, search.load)}
"""What the examples use besides Python itself."""


@pytest.mark.parametrize("documented", [search.load, RunRecord, Space], ids=lambda each: each.__name__)
def test_the_example_in_a_docstring_runs(tmp_path, monkeypatch, documented):
    write_run(tmp_path / "results" / "pets")
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(documented.__doc__, dict(NAMES), documented.__name__, None, None)
    assert example.examples
    problems: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=problems.append)
    assert not problems, "".join(problems)
